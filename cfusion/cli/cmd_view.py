"""`cfusion view`: slides, heatmaps and survival in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(view)


def view(
    slides: Annotated[Path | None, typer.Argument(help="A slide, or a folder of slides.")] = None,
    explanations: Annotated[Path | None, typer.Option(help="Folder that `cfusion explain` wrote.")] = None,
    run: Annotated[Path | None, typer.Option(help="Output folder of `cfusion train`, for survival curves.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the default: this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free port.", min=0, max=65535)] = 0,
    default_mpp: Annotated[
        float | None, typer.Option(help="µm/px of slides that state none.", min=0.05, max=10)
    ] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Download OpenSeadragon through npm, for deep zoom.")] = False,
) -> None:
    """Show slides in the browser: deep zoom, heatmaps, the patches under a click, the patient's survival.

    Runs until Ctrl-C. The page loads nothing from other hosts and shows only files in SLIDES.

    \b
      cfusion view slides
      cfusion view slides --explanations explained --run runs/blca
    """  # noqa: D301 - the escape is typer's mark for lines that stay as they are
    from cfusion.errors import ConfigError
    from cfusion.view import openseadragon

    if fetch:
        typer.echo(f"OpenSeadragon {openseadragon.VERSION} (BSD-3-Clause): {openseadragon.fetch_package()}")
    if slides is None:
        if fetch:
            return
        raise ConfigError("view: no slides were named.", "Give a slide or a folder of slides.", topic="viewer")
    from cfusion.view.api import Viewer, load_deep_zoom
    from cfusion.view.explanations import Explanations
    from cfusion.view.patient_curve import CohortCurves
    from cfusion.view.served_slides import SlideFolder
    from cfusion.view.server import serve

    viewer = Viewer(
        SlideFolder(slides, default_mpp), Explanations(explanations), CohortCurves(run) if run is not None else None
    )
    load_deep_zoom(viewer)
    if viewer.deep_zoom_trouble:
        typer.echo(f"no deep zoom, only still pictures: {viewer.deep_zoom_trouble} Run: cfusion view --fetch", err=True)
    count = len(viewer.slides.slides)
    serve(
        viewer, host, port, lambda address: typer.echo(f"{count} slide{'s' * (count != 1)} at {address} (Ctrl-C ends)")
    )
    typer.echo("stopped")

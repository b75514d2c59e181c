"""`cfusion explain`: what raises and lowers a slide's risk, tile by tile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cfusion.cli.options import TrustCode


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(explain)


def explain(
    source: Annotated[
        Path, typer.Argument(help="Slides (file or folder), a store, or one slide's group in it (.zarr).")
    ],
    model: Annotated[str, typer.Option(help="models:/NAME@champion, a run's folder, or one fold's.")],
    out: Annotated[Path, typer.Option(help="Folder to write; each slide gets its own folder in it.")],
    uri: Annotated[str | None, typer.Option(help="MLflow server; default: MLFLOW_TRACKING_URI.")] = None,
    cases: Annotated[
        Path | None, typer.Option(help="CSV slide_id,case_id, or slide,patient; default: by the slides' names.")
    ] = None,
    cohort: Annotated[
        str | None, typer.Option(help="Cohort of the patients, for a model that was trained on several.")
    ] = None,
    slide: Annotated[list[str] | None, typer.Option(help="For a store: only this slide; default: all.")] = None,
    slides: Annotated[Path | None, typer.Option(help="For a store: folder of its slides, for the pictures.")] = None,
    magnification: Annotated[list[float] | None, typer.Option(help="Report only this one; default: all.")] = None,
    occlusion: Annotated[
        Literal["cells", "tiles", "none"],
        typer.Option(help="Remove coarsest tiles with all inside, or every single tile."),
    ] = "cells",
    most_removals: Annotated[
        int, typer.Option(help="Maximum removals; if there are more cells, squares of cells are removed.", min=1)
    ] = 256,
    faithfulness: Annotated[bool, typer.Option("--faithfulness", help="Also draw deletion curves.")] = False,
    heatmap_slides: Annotated[
        bool, typer.Option("--heatmap-slides", help="Also write heatmaps as OME-TIFF pyramids of the slide's size.")
    ] = False,
    default_mpp: Annotated[float | None, typer.Option(help="µm/px of slides whose files do not state it.")] = None,
    masks: Annotated[Path | None, typer.Option(help="For slides: folder of tissue masks to use.")] = None,
    weights: Annotated[Path | None, typer.Option(help="For slides: folder of encoder checkpoints.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never download weights.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, …; default: a GPU if available.")] = None,
    trust_code: TrustCode = None,
) -> None:
    """Score every tile of a slide: attention, input×gradient, occlusion; mean and spread over folds.

    Each slide gets a folder with index.html, explanation.zarr, overlays, a gallery of the tiles that raise and lower
    the risk most, and GeoJSON that QuPath opens. Slides are preprocessed with the encoder of the model. A patient of
    the training is explained by the fold models that have not seen the patient; where there is none, the page says so.

    \b
      cfusion explain a.svs --model models:/blca@champion --out explained
      cfusion explain features --slides slides --model runs/blca --out explained
    """  # noqa: D301 - the escape is typer's mark for lines that stay as they are
    from cfusion.apply.explain import checked_device, explain_inputs
    from cfusion.apply.inputs import Extraction, open_inputs
    from cfusion.apply.loading import load_ensemble, load_ranking
    from cfusion.types import magnification_name

    ensemble = load_ensemble(model, uri, trust_code).of_chosen(cohort)
    settings = {"default_mpp": default_mpp, "masks": masks, "weights": weights, "offline": offline}
    inputs = open_inputs(
        [str(source)], ensemble.models[0].card, Extraction(out / "features", settings, overwrite=True)
    )  # fmt: skip
    results = explain_inputs(
        inputs.choose(slide, slides),
        ensemble,
        out,
        cases=cases,
        magnifications=[magnification_name(m) for m in magnification or ()] or None,
        occlusion=occlusion,
        most_removals=most_removals,
        faithfulness=faithfulness,
        heatmap_slides=heatmap_slides,
        ranking=load_ranking(model, uri),
        default_mpp=default_mpp,
        device=checked_device(device),
        cohort=cohort,
    )
    for done in results:
        typer.echo(f"{done.explanation.slide_id}: {done.explanation.risk_text}; {done.page}")
        if note := done.explanation.attrs.get("note"):
            typer.echo(f"{done.explanation.slide_id}: {note}")
        if done.areas is not None:
            typer.echo(done.areas.to_string(index=False, float_format="{:.3g}".format))

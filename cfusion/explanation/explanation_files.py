"""Write all files of an explanation to one folder: zarr, GeoJSON, pictures, curves, page."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pandas as pd

from cfusion.errors import DataError
from cfusion.explanation.faithfulness import deletion_areas, draw_deletion
from cfusion.explanation.geojson import write_geojson
from cfusion.explanation.overlays import OVERVIEW_PX, Pictures, draw_gallery, draw_overlay
from cfusion.explanation.result import ZARR_NAME, Explanation, write_explanation
from cfusion.explanation.slide_page import draw_curve, render_slide_page
from cfusion.files import atomic_path
from cfusion.report.standalone import standalone


def write_results(
    explanation: Explanation,
    folder: str | os.PathLike[str],
    *,
    pictures: Pictures | None = None,
    curves: pd.DataFrame | None = None,
) -> Path:
    """Write the folder of one slide atomically; replace an earlier explanation.

    The folder contains `explanation.zarr`, `survival.svg` and `index.html`; for every magnification `x20.geojson`, and
    for every method `overlays/x20-attention.png`; with `pictures` also `gallery/x20.png`; with `curves` also
    `deletion.csv`, `deletion-areas.csv` and `deletion/x20.svg`.

    Args:
        explanation: The scores.
        folder: Folder to write.
        pictures: Pixels of the slide; None: overlays have a white background, and there is no gallery.
        curves: Result of `deletion_curves`.

    Returns:
        Path of the page.

    Raises:
        DataError: The folder exists and contains something else.
    """
    folder = Path(folder)
    check_target(folder)
    backdrop = None
    if pictures:
        backdrop = pictures.overview(OVERVIEW_PX)
        explanation = replace(explanation, attrs={**explanation.attrs, "slide_size_px": list(pictures.size_px)})
    overlays = {
        name: {
            method: draw_overlay(explanation, name, method, backdrop)
            for method in explanation.methods
            if explanation.has(name, method)
        }
        for name in explanation.levels
    }
    galleries = {name: draw_gallery(explanation, name, pictures) for name in explanation.levels} if pictures else {}
    page = render_slide_page(explanation, overlays, galleries, curves)
    with atomic_path(folder) as temporary:
        for place in ("overlays", *(["gallery"] if galleries else [])):
            (temporary / place).mkdir(parents=True)
        write_explanation(explanation, temporary / ZARR_NAME)
        for name, pngs in overlays.items():
            write_geojson(explanation, name, temporary / f"{name}.geojson")
            for method, png in pngs.items():
                (temporary / "overlays" / f"{name}-{method}.png").write_bytes(png)
        for name, png in galleries.items():
            (temporary / "gallery" / f"{name}.png").write_bytes(png)
        if curves is not None:
            _write_curves(explanation, curves, temporary)
        (temporary / "survival.svg").write_text(standalone(draw_curve(explanation)), encoding="utf-8")
        (temporary / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


def check_target(folder: Path) -> None:
    """Check that the target can be written: it does not exist, is empty, or contains an earlier explanation.

    Raises:
        DataError: The target is a file, or a folder that contains something else.
    """
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / ZARR_NAME).is_dir():
        raise DataError(
            f"{folder}: exists and contains no explanation, so it is not replaced.", "Choose another output folder."
        )


def _write_curves(explanation: Explanation, curves: pd.DataFrame, folder: Path) -> None:
    curves.to_csv(folder / "deletion.csv", index=False)
    deletion_areas(curves).to_csv(folder / "deletion-areas.csv", index=False)
    (folder / "deletion").mkdir()
    for name in curves["magnification"].unique():
        svg = standalone(draw_deletion(curves, name, explanation.slide_id))
        (folder / "deletion" / f"{name}.svg").write_text(svg, encoding="utf-8")

"""Write all files of an explanation to one folder: zarr, GeoJSON, pictures, heatmap slides, curves, page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from cfusion.errors import DataError
from cfusion.explanation.faithfulness import deletion_areas, draw_deletion
from cfusion.explanation.gallery import Strip, draw_gallery, sides
from cfusion.explanation.geojson import write_geojson
from cfusion.explanation.heatmap_slides import write_heatmap
from cfusion.explanation.overlays import OVERVIEW_PX, Pictures, draw_overlay, paint
from cfusion.explanation.result import METHODS, ZARR_NAME, Explanation, write_explanation
from cfusion.explanation.slide_page import draw_curve, render_slide_page
from cfusion.files import atomic_path
from cfusion.report.standalone import standalone


def write_results(
    explanation: Explanation,
    folder: str | os.PathLike[str],
    *,
    pictures: Pictures | None = None,
    curves: pd.DataFrame | None = None,
    heatmap_slides: bool = False,
) -> Path:
    """Write the folder of one slide atomically; replace an earlier explanation.

    The folder contains `explanation.zarr`, `survival.svg` and `index.html`; for every magnification `x20.geojson`, and
    for every method `overlays/x20-attention.png`; with `pictures` also `gallery/x20-raises-1.jpg` and so on; with
    `curves` also `deletion.csv`, `deletion-areas.csv` and `deletion/x20.svg`; with `heatmap_slides` also
    `heatmaps/x20-attention.ome.tif`.

    Args:
        explanation: The scores.
        folder: Folder to write.
        pictures: Pixels of the slide; None: overlays have a white background, and there is no gallery.
        curves: Result of `deletion_curves`.
        heatmap_slides: Also write every heatmap as a pyramidal OME-TIFF of the slide's size.

    Returns:
        Path of the page.

    Raises:
        DataError: The folder exists and contains something else; heatmap slides are wanted of a slide of unknown size.
    """
    folder = Path(folder)
    check_target(folder)
    backdrop = None
    if pictures:
        backdrop = pictures.overview(OVERVIEW_PX)
        explanation = replace(explanation, attrs={**explanation.attrs, "slide_size_px": list(pictures.size_px)})
    painted, with_noise = (
        {
            method: {
                name: paint(explanation, name, method, backdrop, noise=noise)
                for name in reversed(explanation.levels)
                if explanation.has(name, method)
            }
            for method in METHODS
            if method in explanation.methods and (explanation.tested or not noise)
        }
        for noise in (False, True)
    )
    galleries = {n: draw_gallery(explanation, n, pictures) for n in reversed(explanation.levels)} if pictures else None
    page = render_slide_page(explanation, painted, with_noise, galleries, curves)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        write_explanation(explanation, temporary / ZARR_NAME)
        for name in explanation.levels:
            write_geojson(explanation, name, temporary / f"{name}.geojson")
        _write_heatmaps(explanation, painted, temporary, heatmap_slides)
        _write_gallery(galleries or {}, temporary)
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


def _write_heatmaps(
    explanation: Explanation, painted: Mapping[str, Mapping[str, np.ndarray]], folder: Path, slides: bool
) -> None:
    (folder / "overlays").mkdir()
    if slides:
        (folder / "heatmaps").mkdir()
    for method, pictures in painted.items():
        for name, picture in pictures.items():
            overlay = draw_overlay(explanation, name, method, picture)
            (folder / "overlays" / f"{name}-{method}.png").write_bytes(overlay)
            if slides:
                write_heatmap(explanation, name, method, folder / "heatmaps" / f"{name}-{method}.ome.tif")


def _write_gallery(galleries: Mapping[str, list[Strip]], folder: Path) -> None:
    if any(galleries.values()):
        (folder / "gallery").mkdir()
    for name, strips in galleries.items():
        for side, _, shown in sides(strips):
            for number, strip in enumerate(shown, start=1):
                strip.picture.save(folder / "gallery" / f"{name}-{side}-{number}.jpg", quality=90)


def _write_curves(explanation: Explanation, curves: pd.DataFrame, folder: Path) -> None:
    curves.to_csv(folder / "deletion.csv", index=False)
    deletion_areas(curves).to_csv(folder / "deletion-areas.csv", index=False)
    (folder / "deletion").mkdir()
    for name in curves["magnification"].unique():
        svg = standalone(draw_deletion(curves, name, explanation.slide_id))
        (folder / "deletion" / f"{name}.svg").write_text(svg, encoding="utf-8")

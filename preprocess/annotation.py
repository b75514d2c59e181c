"""Exchange formats for tissue: masks, GeoJSON contours in level-0 px, and review sheets."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unicodedata import normalize

import cv2
import numpy as np
from PIL import Image
from skimage.draw import polygon

from cfusion.errors import ConfigError, DataError
from cfusion.files import atomic_path, write_text
from cfusion.types import SLIDE_SUFFIXES
from preprocess.artefacts import Artefacts
from preprocess.grid import TileGrid
from preprocess.names import without_suffix
from preprocess.slides import Overview

logger = logging.getLogger(__name__)

NAME_ENDINGS = ("", *SLIDE_SUFFIXES)
"""A mask has the name of its slide, with or without the suffix of the slide."""

ARTEFACT_SUFFIX = ".artefacts.geojson"
"""Suffix of the contours of artefacts."""

SHEET_SUFFIXES = (".geojson", ".png", ".jpg", ARTEFACT_SUFFIX)
"""Suffixes of what `write_sheets` writes for a slide."""

MIN_SHEET_PX = 512
"""Longer side of a sheet, at least; small overviews are enlarged."""

MASK_SUFFIXES = (".geojson", ".json", ".png", ".tif", ".tiff")
"""Suffixes of user masks, in order of preference."""


def find_mask(folder: Path | None, slide_id: str) -> Path | None:
    """Return the user's mask or GeoJSON of a slide, or None."""
    return next(iter(_masks_of(folder, slide_id)), None) if folder is not None else None


def _masks_of(folder: Path, slide_id: str) -> list[Path]:
    # macOS writes an accent as a separate character.
    names = [f"{name}{ending}" for name in {slide_id: 0, normalize("NFD", slide_id): 0} for ending in NAME_ENDINGS]
    return [p for s in MASK_SUFFIXES for name in names if (p := folder / f"{name}{s}").is_file()]


def check_masks(folder: Path | None, slide_ids: Iterable[str]) -> None:
    """Check that the user's masks are used, and warn of those that are of no slide.

    Raises:
        ConfigError: The folder is missing, none of its masks has the name of a slide, a slide has two, or a mask has
            the name of a slide in another case.
    """
    if folder is None:
        return
    if not folder.is_dir():
        raise ConfigError(f"masks={folder}: no such folder.")
    used = {slide_id: _masks_of(folder, slide_id) for slide_id in slide_ids}
    for slide_id, masks in used.items():
        if len(masks) > 1:
            raise ConfigError(
                f"masks={folder}: {masks[0].name} and {masks[1].name} are both masks of slide {slide_id}.", "Keep one."
            )
    taken = {mask for masks in used.values() for mask in masks}
    others = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in MASK_SUFFIXES and p not in taken)
    if not taken:
        found = f"none of its files has the name of a slide, such as {others[0]}" if others else "contains no masks"
        raise ConfigError(f"masks={folder}: {found}.", f"Expected SLIDE_ID with one of {', '.join(MASK_SUFFIXES)}.")
    folded = {slide_id.casefold(): slide_id for slide_id, masks in used.items() if not masks}
    for name in others:
        if (meant := folded.get(without_suffix(Path(name).stem).casefold())) is not None:
            raise ConfigError(
                f"masks={folder}: {name} has the name of slide {meant} in another case.",
                f"Rename it to {meant}{Path(name).suffix.lower()}.",
            )
    if others:
        logger.warning("%s: %d masks are used for no slide: %s", folder, len(others), ", ".join(others[:5]))


def read_mask(path: Path, shape: tuple[int, int], px_level0: tuple[float, float]) -> np.ndarray:
    """Read a user's tissue mask on the overview's grid.

    Args:
        path: A picture of the entire slide at any scale, nonzero where there is tissue (with a palette, where the
            index is; transparent pixels are not); or GeoJSON polygons in level-0 px.
        shape: Height and width of the overview.
        px_level0: Level-0 px per pixel of the overview, in x and y.

    Returns:
        bool [h, w].

    Raises:
        DataError: The file is unreadable, contains no polygon, or is of a slide of another shape.
    """
    if path.suffix.lower() in (".geojson", ".json"):
        return _rasterised(path, shape, px_level0)
    try:
        with Image.open(path) as image:
            painted = _painted(image)
    except MemoryError:
        raise
    except Exception as error:  # damaged pictures end in errors of many kinds
        raise DataError(f"{path}: not a readable mask ({error}).", "Expected a PNG or TIFF picture.") from error
    (height, width), (tall, wide) = shape, painted.shape
    size = (round(width * px_level0[0]), round(height * px_level0[1]))
    # A mask at any scale is rounded to integer pixels.
    if abs(wide * size[1] - tall * size[0]) > max(0.02 * wide * size[1], size[0] + size[1]):
        raise DataError(
            f"{path}: the mask has {wide} × {tall} px, but the slide has {size[0]} × {size[1]} px, another shape.",
            "Give a mask of the entire slide.",
        )
    mask = Image.fromarray(painted.astype(np.uint8)).resize((shape[1], shape[0]), Image.Resampling.NEAREST)
    return np.asarray(mask) > 0


def _painted(image: Image.Image) -> np.ndarray:
    """Return where a picture is painted, bool [h, w]: its value or index is not zero, and it is not transparent."""
    values = np.asarray(image)
    if values.ndim == 2:
        return np.asarray(values > 0)
    if image.mode in ("LA", "RGBA", "PA", "La", "RGBa"):
        return np.asarray((values[..., :-1] > 0).any(axis=2) & (values[..., -1] > 0))
    return np.asarray((values > 0).any(axis=2))


def contours_geojson(mask: np.ndarray, px_level0: tuple[float, float], name: str = "Tissue") -> dict[str, Any]:
    """Return the outlines of a mask as a GeoJSON FeatureCollection of polygons with holes, in level-0 px.

    Args:
        mask: bool [h, w].
        px_level0: Level-0 px per pixel of the mask, in x and y.
        name: QuPath's classification of the polygons.
    """
    padded = np.pad(mask.astype(np.uint8), 1)
    # At twice the size, pixel edges have integer coordinates, so a polygon encloses its pixels rather than their
    # centres.
    doubled: Any = np.kron(padded, np.ones((2, 2), np.uint8))
    outlines, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    polygons: dict[int, list[list[list[float]]]] = {}
    for number, outline in enumerate(outlines):
        parent = int(tree[0][number][3])
        ring = ((outline[:, 0] + 1) // 2 - 1) * np.asarray(px_level0)
        if len(ring) >= 3:
            points = [[round(float(x), 1), round(float(y), 1)] for x, y in [*ring, ring[0]]]
            polygons.setdefault(number if parent < 0 else parent, []).append(points)
    features = [
        {"type": "Feature", "properties": {"classification": {"name": name}},
         "geometry": {"type": "Polygon", "coordinates": rings}}
        for rings in polygons.values()
    ]  # fmt: skip
    return {"type": "FeatureCollection", "features": features}


def write_sheets(
    folder: Path, slide_id: str, overview: Overview, mask: np.ndarray, grid: TileGrid, artefacts: Artefacts | None
) -> None:
    """Write the review sheet `{slide_id}.jpg`, and the tissue as a `.png` mask and `.geojson` contours.

    Artefacts, if they were looked for, are drawn on the sheet, and have a file of contours.
    """
    if artefacts is not None:
        named = {"Fold": artefacts.folds, "Blurred": artefacts.blurred}
        features = [f for name, m in named.items() for f in contours_geojson(m, overview.px_level0, name)["features"]]
        content = json.dumps({"type": "FeatureCollection", "features": features})
        write_text(folder / f"{slide_id}{ARTEFACT_SUFFIX}", content + "\n")
    write_text(folder / f"{slide_id}.geojson", json.dumps(contours_geojson(mask, overview.px_level0)) + "\n")
    with atomic_path(folder / f"{slide_id}.png") as temporary:
        Image.fromarray(mask.astype(np.uint8) * 255).save(temporary, "PNG")
    with atomic_path(folder / f"{slide_id}.jpg") as temporary:
        Image.fromarray(draw_sheet(overview, mask, grid, artefacts)).save(temporary, "JPEG", quality=85)


def draw_sheet(overview: Overview, mask: np.ndarray, grid: TileGrid, artefacts: Artefacts | None = None) -> np.ndarray:
    """Draw on the overview tissue in green, artefacts in red and the kept cells in blue, u8 [h, w, 3]."""
    zoom = max(1, round(MIN_SHEET_PX / max(mask.shape)))
    sheet = np.ascontiguousarray(np.kron(overview.rgb, np.ones((zoom, zoom, 1), np.uint8)))
    coarsest = grid.names[-1]
    scale = zoom / np.asarray(overview.px_level0)
    for cell in grid.cells:
        first, last = (np.rint(grid.edge_px_level0(c, coarsest) * scale).astype(int) for c in (cell, cell + 1))
        cv2.rectangle(sheet, first.tolist(), (last - 1).tolist(), (30, 90, 220), 1)
    drawn: list[tuple[np.ndarray, tuple[int, int, int]]] = [(mask, (0, 160, 60))]
    drawn += [(artefacts.mask, (220, 30, 30))] if artefacts is not None else []
    for area, colour in drawn:
        large: Any = np.kron(area.astype(np.uint8), np.ones((zoom, zoom), np.uint8))
        outlines, _ = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(sheet, outlines, -1, colour, 1)
    return sheet


def _rasterised(path: Path, shape: tuple[int, int], px_level0: tuple[float, float]) -> np.ndarray:
    try:
        found = _polygons(json.loads(path.read_text(encoding="utf-8")))
        rings = [[np.asarray(ring, np.float64)[:, :2] for ring in rings] for rings in found]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{path}: not readable GeoJSON ({error}).", "Expected polygons in level-0 px.") from error
    if not rings:
        raise DataError(f"{path}: contains no polygon.", "Expected polygons in level-0 px.")
    mask = np.zeros(shape, bool)
    for outline, *holes in rings:
        piece = _inside(outline, shape, px_level0)
        for hole in holes:
            piece &= ~_inside(hole, shape, px_level0)
        mask |= piece
    return mask


def _inside(ring: np.ndarray, shape: tuple[int, int], px_level0: tuple[float, float]) -> np.ndarray:
    """Return the pixels of the overview whose centres lie inside a ring."""
    column, row = (ring / px_level0 - 0.5).T
    inside = np.zeros(shape, bool)
    inside[polygon(row, column, shape)] = True
    return inside


def _polygons(node: dict[str, Any]) -> Iterator[list[Any]]:
    """Return the polygons of a GeoJSON object, each a list of rings: the outline, then the holes."""
    kind = node["type"]
    if kind == "FeatureCollection":
        for feature in node["features"]:
            yield from _polygons(feature)
    elif kind == "Feature":
        yield from _polygons(node["geometry"])
    elif kind == "GeometryCollection":
        for geometry in node["geometries"]:
            yield from _polygons(geometry)
    elif kind == "MultiPolygon":
        yield from node["coordinates"]
    elif kind == "Polygon":
        yield node["coordinates"]

"""Levels of one slide that is imported: read from its files, placed in pixels, linked to their parents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.spatial import KDTree

from cfusion.data.tile_places import LEVEL_0, TILE_PX
from cfusion.errors import LayoutError
from cfusion.types import SLIDE, magnification_value
from preprocess.feature_files import SAME_SIDE, Level
from preprocess.layouts import FeatureFile
from preprocess.resolution import power_of
from preprocess.slides import SlideGeometry

USUAL_TILE_PX = 256
"""Side of tiles at their magnification, of files that do not state it."""

LOST_IN_F16 = 0.01
"""Largest relative error of features stored as f16."""

MANY_DROPPED = 0.1
"""Share of tiles without a parent from which on a warning says so."""

F16_LIMIT = 65520.0
"""From here on, numbers become infinite in f16."""


def read_levels(slide_id: str, files: Sequence[FeatureFile]) -> dict[str, Level]:
    """Read a slide's files, finest magnification first."""
    by_name: dict[str, FeatureFile] = {}
    for file in files:
        if not file.magnification:
            raise LayoutError(
                f"{file.paths[0]}: does not state its magnification.", "Give --magnification, such as 20."
            )
        value = magnification_value(file.magnification)
        if file.magnification != SLIDE and not 0.1 <= value <= 200:
            raise LayoutError(
                f"{file.paths[0]}: says a magnification of {value:g}, expected 0.1 to 200.",
                "Correct its attributes, or extract the slide again.",
            )
        if file.magnification in by_name:
            raise LayoutError(
                f"{by_name[file.magnification].paths[0]} and {file.paths[0]} are both slide {slide_id} at "
                f"{file.magnification}.",
                "Choose one with --only FOLDER, or rename one.",
            )
        by_name[file.magnification] = file
    levels = {n: by_name[n].read() for n in sorted(by_name, key=magnification_value, reverse=True)}
    widths = {level.features.shape[1] for level in levels.values() if len(level.features)}
    if not widths:
        raise LayoutError(f"slide {slide_id}: has no tiles.")
    if len(widths) > 1:
        raise LayoutError(
            f"slide {slide_id}: its magnifications have embeddings of different widths: {sorted(widths)}."
        )
    _check_sides(slide_id, levels)
    return levels


def _check_sides(slide_id: str, levels: Mapping[str, Level]) -> None:
    """Refuse magnifications whose tiles have sides that contradict each other."""
    sides = {
        name: level.side_px * magnification_value(name) / (level.tile_px or USUAL_TILE_PX)
        for name, level in levels.items()
        if level.side_px is not None and level.um_px is None
    }
    finest, coarsest = max(sides, key=sides.__getitem__, default=""), min(sides, key=sides.__getitem__, default="")
    if sides and sides[finest] > (1 + SAME_SIDE) * sides[coarsest]:
        first, second = sorted((finest, coarsest), key=magnification_value, reverse=True)
        raise LayoutError(
            f"slide {slide_id}: its tiles have {levels[first].side_px:g} px of level 0 at {first} and "
            f"{levels[second].side_px:g} px at {second}, so one magnification is not what its folder or file says.",
            "Name the folders after the magnifications of their tiles, or choose folders with --only.",
        )


def geometry_attrs(slide_id: str, levels: Mapping[str, Level], geometry: SlideGeometry | None) -> dict[str, Any]:
    """Return what is known of the slide, from the files or from the slide itself."""
    sizes = {level.size_px for level in levels.values() if level.size_px is not None}
    if len(sizes) > 1:
        raise LayoutError(f"slide {slide_id}: its files are of slides of different sizes: {sorted(sizes)}.")
    size = next(iter(sizes), None)
    if geometry is None:
        return {} if size is None else {"slide_size_px": list(size)}
    if size is not None and size != geometry.size_px:
        raise LayoutError(
            f"slide {slide_id}: its files are of a slide of {size[0]} × {size[1]} px, but {geometry.path} has "
            f"{geometry.size_px[0]} × {geometry.size_px[1]} px.",
            "Give the slides that the features were made from with --slides.",
        )
    attrs: dict[str, Any] = {"slide_size_px": list(geometry.size_px), "slide_digest": geometry.quickhash}
    if geometry.resolution is not None:
        _check_scanned(slide_id, levels, geometry)
        attrs |= {"mpp": geometry.resolution.mpp, "mpp_source": geometry.resolution.source}
    return attrs


def _check_scanned(slide_id: str, levels: Mapping[str, Level], geometry: SlideGeometry) -> None:
    """Refuse features whose program took the slide's magnification for another."""
    mpp, source = geometry.known_resolution().mpp, geometry.known_resolution().source
    for name, level in levels.items():
        if level.scanned_at is not None and power_of(mpp) != level.scanned_at:
            raise LayoutError(
                f"slide {slide_id}, {name}: its file says that the slide was scanned at {level.scanned_at:g}x, but "
                f"{geometry.path} has {mpp:g} µm/px ({source}), which is {power_of(mpp) or 0:g}x.",
                "Give the slide's µm/px with --mpp-table if the features are right, or extract the slide again.",
            )


def to_pixels(
    slide_id: str, levels: Mapping[str, Level], geometry: SlideGeometry | None
) -> tuple[dict[str, Level], dict[str, Any]]:
    """Convert coordinates in µm to px: of level 0 if the slide's resolution is known, or else of the tiles."""
    with_coords = [level for level in levels.values() if level.coords is not None]
    known_from = "; ".join(dict.fromkeys(level.coords_from for level in with_coords))
    in_um = {level.um_px for level in with_coords if level.um_px is not None}
    if not in_um:
        return dict(levels), {"coords_space": LEVEL_0, "coords_from": known_from}
    if geometry is not None:
        mpp = geometry.known_resolution().mpp
        px = dict.fromkeys(levels, mpp)
        space: dict[str, Any] = {"coords_space": LEVEL_0, "coords_from": f"{known_from}; the slide has {mpp:g} µm/px"}
    elif len(in_um) == 1:
        px = {name: next(iter(in_um)) for name in levels}
        space = {"coords_space": TILE_PX, "coords_um_px": next(iter(in_um)), "coords_from": known_from}
    else:
        raise LayoutError(
            f"slide {slide_id}: its magnifications have coordinates in different units, of {sorted(in_um)} µm.",
            "Give the folder of the slides with --slides.",
        )
    scaled = {}
    for name, level in levels.items():
        assert level.coords is not None
        assert level.um_px is not None
        assert level.side_px is not None
        places = np.rint(level.coords / px[name])
        if not (np.abs(places) < 2**31).all():
            raise LayoutError(
                f"slide {slide_id}, {name}: with {px[name]:g} µm per px a tile lies at {places.max():g} px.",
                "Check the size of the tiles in the file's attributes.",
            )
        coords = places.astype(np.int64)
        scaled[name] = replace(level, coords=coords, side_px=level.side_px * (level.um_px / px[name]))
    return scaled, space


def linked(slide_id: str, levels: Mapping[str, Level]) -> tuple[dict[str, Level], dict[str, np.ndarray]]:
    """Link tiles to their parents; tiles without one are dropped, and many are a warning of the level."""
    levels, names, parents = dict(levels), list(levels), {}
    # From the coarsest down, so that a tile is linked only to a parent that is itself kept.
    for coarse, fine in zip(names[::-1], names[-2::-1], strict=False):
        if levels[fine].coords is None or levels[coarse].coords is None:
            continue
        parent = find_parents(levels[fine], levels[coarse])
        keep = parent >= 0
        if not keep.any():
            raise LayoutError(f"slide {slide_id}: no tile of {fine} lies in a tile of {coarse}.")
        level = levels[fine].subset(keep)
        if (dropped := int((~keep).sum())) > MANY_DROPPED * len(keep):
            why = f"{dropped} of {len(keep)} tiles of {fine} lie in no tile of {coarse} and were left out"
            level = replace(level, warnings=(*level.warnings, why))
        levels[fine] = level
        parents[fine] = parent[keep].astype(np.int32)
    return levels, parents


def as_f16(slide_id: str, name: str, values: np.ndarray) -> np.ndarray:
    """Convert features to f16, which is refused if it changes them."""
    if len(unusable := np.flatnonzero(~np.isfinite(values).all(axis=1))):
        raise LayoutError(
            f"slide {slide_id}, {name}: the features of tile {unusable[0]} are not finite "
            f"({len(unusable)} of {len(values)} tiles).",
            "Extract the slide again, for example in f32.",
        )
    if (largest := float(np.abs(values).max())) >= F16_LIMIT:
        raise LayoutError(
            f"slide {slide_id}, {name}: its features reach {largest:.3g}, more than f16 can hold (65504).",
            "Scale them and save them again.",
        )
    with np.errstate(over="ignore", invalid="ignore"):
        halves = values.astype(np.float16)
        size = float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))
        change = float(np.sqrt(np.mean((halves.astype(np.float64) - values) ** 2)))
    if change > LOST_IN_F16 * size:
        raise LayoutError(
            f"slide {slide_id}, {name}: its features are of the size {size:.2g}, too small for f16.",
            "Scale them and save them again.",
        )
    return halves


def find_parents(fine: Level, coarse: Level) -> np.ndarray:
    """Return, for each tile, the row of the coarser tile that contains its centre, i64 [N]; −1 if none does.

    Where coarser tiles overlap, the one whose centre is nearest wins.
    """
    if fine.coords is None or coarse.coords is None or fine.side_px is None or coarse.side_px is None:
        raise LayoutError("tiles without coordinates or size have no parents.")
    centres = fine.coords + fine.side_px / 2
    distance, row = KDTree(coarse.coords + coarse.side_px / 2).query(centres, p=np.inf)
    return np.where(distance <= coarse.side_px / 2, row, -1)

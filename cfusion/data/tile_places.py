"""Where tiles lie: in which space a slide's coordinates are, how that is known, and whether they lie on a given slide.

`coords_space` in a slide's attributes is `level-0 px`, or `tile px`: pixels at the tiles' own magnification, of
`coords_um_px` µm each. `coords_from` says how it is known. `tile_px_level0` counts the same pixels as the coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from cfusion.errors import StoreError
from cfusion.types import SlideFeatures

LEVEL_0, TILE_PX = "level-0 px", "tile px"
"""The two spaces of coordinates."""


def coords_space(attrs: Mapping[str, Any]) -> str:
    """Return the space of a slide's coordinates; version 0.1.0 did not record it, and stored STAMP's in tile pixels."""
    return str(attrs.get("coords_space") or (TILE_PX if attrs.get("imported_from") == "stamp" else LEVEL_0))


def on_slide(slide: SlideFeatures, size_px: tuple[int, int], mpp: float) -> SlideFeatures:
    """Return a slide's features with coordinates in level-0 px of the slide at hand.

    Args:
        slide: The features.
        size_px: Width and height of the slide's level 0.
        mpp: µm per level-0 px of the slide.

    Raises:
        StoreError: The features belong to a slide of another size, or their tiles do not lie on this one.
    """
    if coords_space(slide.attrs) != LEVEL_0:
        slide = _scaled(slide, mpp)
    check_on_slide(slide, size_px)
    return slide


def check_on_slide(slide: SlideFeatures, size_px: tuple[int, int]) -> None:
    """Check that tiles with coordinates in level-0 px lie on a slide of this size.

    Raises:
        StoreError: The features belong to a slide of another size, or a tile lies outside.
    """
    remedy = "Give the slide that the features were made from."
    width, height = size_px
    stored = slide.attrs.get("slide_size_px")
    if stored and tuple(stored) != tuple(size_px):
        raise StoreError(
            f"the slide has {width} × {height} px, but the features of {slide.slide_id} are of a slide of "
            f"{stored[0]} × {stored[1]} px.", remedy, topic="geometry",
        )  # fmt: skip
    sides = slide.attrs.get("tile_px_level0", {})
    for name, coords in slide.coords.items():
        if not len(coords):
            continue
        outside = ((coords < 0) | (coords >= size_px)).any(axis=1)
        if outside.any():
            reach_x, reach_y = (round(float(v)) for v in coords.max(axis=0) + sides.get(name, 0))
            raise StoreError(
                f"slide {slide.slide_id}, {name}: its tiles reach {reach_x} × {reach_y} px, but the slide has "
                f"{width} × {height} px; {int(outside.sum())} of {len(coords)} tiles lie outside.",
                remedy, topic="geometry",
            )  # fmt: skip


def check_level_0(slide: SlideFeatures) -> None:
    """Check that coordinates are in level-0 px, which a heatmap needs.

    Raises:
        StoreError: They are in another space.
    """
    if (space := coords_space(slide.attrs)) != LEVEL_0:
        raise StoreError(
            f"slide {slide.slide_id}: its coordinates are in {space}, not in {LEVEL_0}, so no heatmap can be placed.",
            "Give the slides with --slides, or import the features again with --slides.", topic="geometry",
        )  # fmt: skip


def _scaled(slide: SlideFeatures, mpp: float) -> SlideFeatures:
    um_px = slide.attrs.get("coords_um_px")
    if um_px is None and coords_space(slide.attrs) == TILE_PX and len(slide.coords) == 1:
        # Version 0.1.0 named the magnification after the tiles' own µm/px, to three decimals.
        um_px = 10 / float(next(iter(slide.coords)).removeprefix("x"))
    if um_px is None:
        raise StoreError(
            f"slide {slide.slide_id}: its coordinates are in {coords_space(slide.attrs)} of unknown size.",
            "Import the features again with --slides.", topic="geometry",
        )  # fmt: skip
    factor = float(um_px) / mpp
    coords = {name: np.rint(places * factor).astype(np.int32) for name, places in slide.coords.items()}
    sides = {name: side * factor for name, side in slide.attrs.get("tile_px_level0", {}).items()}
    attrs = {
        **slide.attrs, "coords_space": LEVEL_0, "tile_px_level0": sides,
        "coords_from": f"{slide.attrs.get('coords_from', 'tile px')}, at {mpp:g} µm/px of the slide",
    }  # fmt: skip
    return replace(slide, coords=coords, attrs=attrs)

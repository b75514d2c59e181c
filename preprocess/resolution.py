"""Resolution of slides: µm per level-0 pixel, its source, and level-0 pixels per pixel of a magnification."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cfusion.errors import ResolutionError

logger = logging.getLogger(__name__)

NOMINAL_POWERS = (40.0, 20.0, 10.0)
"""Scanner magnifications that the nominal policy knows; at 40x a pixel is 0.25 µm."""

UM_PX_AT_1X = 10.0
"""µm/px × magnification, by the field's convention."""

PLAUSIBLE_MPP = (0.05, 10.0)
"""Plausible µm/px of a whole-slide image; a TIFF tag of 72 dpi (353 µm/px) is not a resolution."""

REMEDY = "Give --default-mpp, or --mpp-table with a row for it (CSV: slide_id,mpp)."


@dataclass(frozen=True)
class Resolution:
    """µm per level-0 pixel, and its source: mpp, objective, tiff, table or default."""

    mpp: float
    source: str


def resolve(
    slide_id: str, properties: Mapping[str, str], table: Mapping[str, float], default: float | None
) -> Resolution:
    """Find the resolution of a slide: its own tags, then the table, then the default.

    Args:
        slide_id: File stem, the key into `table`.
        properties: OpenSlide's properties of the slide.
        table: µm/px by slide.
        default: µm/px of slides without any other source.

    Raises:
        ResolutionError: No source gives one; the message names the options that do.
    """
    found = {
        "mpp": _mean(_number(properties, "openslide.mpp-x"), _number(properties, "openslide.mpp-y")),
        "objective": _from_power(_number(properties, "openslide.objective-power")),
        "tiff": _from_tiff(properties),
        "table": table.get(slide_id),
        "default": default,
    }
    for source, mpp in found.items():
        if mpp is not None and PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]:
            return Resolution(mpp, source)
    raise ResolutionError(f"slide {slide_id}: its file does not state its resolution (µm/px).", REMEDY)


def finest_scale(slide_id: str, mpp: float, magnification: float, policy: Literal["nominal", "exact"]) -> float:
    """Return the level-0 pixels per pixel of `magnification`, a float ≥ 1.

    `nominal` uses the scanner magnification nearest to `mpp`, as CLAM and TRIDENT do, and warns beyond ±10%; `exact`
    divides the true resolutions.

    Raises:
        ResolutionError: The slide is coarser than `magnification`, or not near any nominal magnification.
    """
    power = UM_PX_AT_1X / mpp
    if policy == "nominal":
        nearest = min(NOMINAL_POWERS, key=lambda p: abs(math.log(power / p)))
        deviation = UM_PX_AT_1X / nearest
        if not 2**-0.5 <= power / nearest <= 2**0.5:
            raise ResolutionError(
                f"slide {slide_id}: {mpp:g} µm/px is not near {', '.join(f'{p:g}x' for p in NOMINAL_POWERS)}.",
                "Use --resolution exact.",
            )
        if abs(mpp / deviation - 1) > 0.1:
            logger.warning("slide %s: %g µm/px is taken as %gx (%g µm/px)", slide_id, mpp, nearest, deviation)
        power = nearest
    scale = power / magnification
    if scale < 1 - (0.1 if policy == "exact" else 0):
        raise ResolutionError(
            f"slide {slide_id}: {mpp:g} µm/px is too coarse for {magnification:g}x.",
            "Leave it out, or choose coarser --magnifications.",
        )
    return scale


def read_mpp_table(path: Path) -> dict[str, float]:
    """Read µm/px by slide from a CSV file with the columns `slide_id, mpp`.

    Raises:
        ResolutionError: The file is unreadable, or a row has no positive number.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ResolutionError(f"{path}: cannot be read ({error}).", "Expected a CSV file: slide_id,mpp.") from error
    if not {"slide_id", "mpp"} <= set(reader.fieldnames or ()):
        raise ResolutionError(f"{path}: has the columns {reader.fieldnames}, expected slide_id and mpp.")
    table = {}
    for number, row in enumerate(rows, start=2):
        try:
            mpp = float(row["mpp"])
        except (TypeError, ValueError):
            mpp = math.nan
        if not PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]:
            raise ResolutionError(
                f"{path}, line {number}: mpp is {row['mpp']!r}, expected µm/px between "
                f"{PLAUSIBLE_MPP[0]:g} and {PLAUSIBLE_MPP[1]:g}."
            )
        table[row["slide_id"]] = mpp
    return table


def _number(properties: Mapping[str, str], key: str) -> float | None:
    try:
        value = float(properties[key])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _mean(x: float | None, y: float | None) -> float | None:
    present = [v for v in (x, y) if v is not None]
    return sum(present) / len(present) if present else None


def _from_power(power: float | None) -> float | None:
    return None if power is None else UM_PX_AT_1X / power


def _from_tiff(properties: Mapping[str, str]) -> float | None:
    um_per_unit = {"centimeter": 10_000.0, "inch": 25_400.0}.get(properties.get("tiff.ResolutionUnit", ""))
    per_unit = _mean(_number(properties, "tiff.XResolution"), _number(properties, "tiff.YResolution"))
    return None if um_per_unit is None or per_unit is None else um_per_unit / per_unit

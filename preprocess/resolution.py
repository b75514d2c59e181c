"""Resolution of slides: µm per level-0 pixel, its source, and level-0 pixels per pixel of a magnification."""

from __future__ import annotations

import csv
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from cfusion.errors import ResolutionError
from preprocess.names import without_suffix

logger = logging.getLogger(__name__)

BUCKETS = ((0.16, 80.0), (0.2, 60.0), (0.3, 40.0), (0.6, 20.0), (1.2, 10.0), (2.4, 5.0))
"""The nominal policy, as TRIDENT: a slide with fewer µm/px than the first number was scanned at the second."""

UM_PX_AT_1X = 10.0
"""µm/px × magnification, by the field's convention."""

PLAUSIBLE_MPP = (0.05, 10.0)
"""Plausible µm/px of a whole-slide image; a TIFF tag of 72 dpi (353 µm/px) is not a resolution."""

SAME = 0.02
"""Largest relative difference of two numbers that state the same resolution."""

REMEDY = "Give --default-mpp, or --mpp-table with a row for it (CSV: slide_id,mpp)."

UM = {
    "pm": 1e-6, "Å": 1e-4, "nm": 1e-3, "µm": 1.0, "μm": 1.0, "mm": 1e3, "cm": 1e4, "dm": 1e5, "m": 1e6, "in": 25_400.0,
}  # fmt: skip
"""µm per unit of OME-XML; its default is µm."""


@dataclass(frozen=True)
class Resolution:
    """µm per level-0 pixel, and its source: table, mpp, ome, objective, tiff or default."""

    mpp: float
    source: str


def resolve(
    slide_id: str, properties: Mapping[str, str], table: Mapping[str, float], default: float | None
) -> Resolution:
    """Find the resolution of a slide: the table, then the file's own tags, then the default.

    Args:
        slide_id: Name of the slide, the key into `table`.
        properties: OpenSlide's properties of the slide.
        table: µm/px by slide, as `read_mpp_table` returns it.
        default: µm/px of slides without any other source.

    Raises:
        ResolutionError: No source gives one, the default is implausible, or the file contradicts itself; the message
            names the options that decide.
    """
    if (row := table.get(slide_id, table.get(without_suffix(slide_id)))) is not None:
        return Resolution(row, "table")
    if default is not None and not PLAUSIBLE_MPP[0] <= default <= PLAUSIBLE_MPP[1]:
        raise ResolutionError(
            f"slide {slide_id}: --default-mpp is {default:g}, expected µm/px between {PLAUSIBLE_MPP[0]:g} and "
            f"{PLAUSIBLE_MPP[1]:g}.",
            "Give it in µm, such as 0.25.",
        )
    power = _number(properties, "openslide.objective-power")
    stated = {
        "mpp": _of_axes(slide_id, "mpp", *(_number(properties, f"openslide.mpp-{axis}") for axis in "xy")),
        "ome": _of_axes(slide_id, "OME-XML PhysicalSize", *_from_ome(properties)),
        "objective": None if power is None else UM_PX_AT_1X / power,
        "tiff": _of_axes(slide_id, "TIFF resolution", *_from_tiff(properties)),
        "default": default,
    }
    found = {s: mpp for s, mpp in stated.items() if mpp is not None and PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]}
    if not found:
        raise ResolutionError(f"slide {slide_id}: its file does not state its resolution (µm/px).", REMEDY)
    source, mpp = next(iter(found.items()))
    if "objective" in found and source != "default" and power_of(mpp) != power_of(found["objective"]):
        raise _contradiction(slide_id, f"{mpp:g} µm/px ({source})", f"an objective of {power:g}x")
    if {"mpp", "ome"} <= found.keys() and abs(found["mpp"] / found["ome"] - 1) > SAME:
        raise _contradiction(slide_id, f"{found['mpp']:g} µm/px", f"{found['ome']:g} µm/px in OME-XML")
    return Resolution(mpp, source)


def _contradiction(slide_id: str, first: str, second: str) -> ResolutionError:
    return ResolutionError(
        f"slide {slide_id}: its file contradicts itself: {first} and {second}.",
        "Give --mpp-table with a row for it (CSV: slide_id,mpp), which decides.",
    )


def power_of(mpp: float) -> float | None:
    """Return the magnification at which a slide of `mpp` µm/px was scanned, by the buckets; None if it has none."""
    return next((power for limit, power in BUCKETS if mpp < limit), None)


@dataclass(frozen=True)
class SlideScale:
    """Level-0 pixels per pixel of the finest magnification, a float ≥ 1, and how the slide's resolution was used.

    Attributes:
        factor: Level-0 px per px.
        taken_as: `exact`, or the nominal magnification of the slide, such as `40x`.
        warning: What the nominal policy changed by more than 10%; empty if nothing.
    """

    factor: float
    taken_as: str
    warning: str = ""


def scale_of(slide_id: str, mpp: float, magnification: float, policy: Literal["nominal", "exact"]) -> SlideScale:
    """Return how many level-0 pixels a pixel of `magnification` has.

    `nominal` uses the scanner's magnification by TRIDENT's buckets, and warns beyond ±10%; `exact` divides the true
    resolutions.

    Raises:
        ResolutionError: The slide is coarser than `magnification`, or than every nominal magnification.
    """
    power, taken_as, warning = UM_PX_AT_1X / mpp, "exact", ""
    if policy == "nominal":
        nominal = power_of(mpp)
        if nominal is None:
            raise ResolutionError(
                f"slide {slide_id}: {mpp:g} µm/px is coarser than {BUCKETS[-1][1]:g}x.", "Use --resolution exact."
            )
        usual = UM_PX_AT_1X / nominal
        taken_as = f"{nominal:g}x"
        if abs(mpp / usual - 1) > 0.1:
            warning = f"{mpp:g} µm/px is taken as {nominal:g}x ({usual:.4g} µm/px)"
            logger.warning("slide %s: %s", slide_id, warning)
        power = nominal
    scale = power / magnification
    if scale < 1 - (0.1 if policy == "exact" else 0):
        raise ResolutionError(
            f"slide {slide_id}: {mpp:g} µm/px is too coarse for {magnification:g}x.",
            "Leave it out, or choose coarser --magnifications.",
        )
    return SlideScale(scale, taken_as, warning)


def read_mpp_table(path: Path) -> dict[str, float]:
    """Read µm/px by slide from a table with the columns `slide_id, mpp`; names lose folders and the suffix of a slide.

    Fields are separated by commas, semicolons or tabs; numbers may have a decimal comma where fields have none.

    Raises:
        ResolutionError: The file is unreadable, a row has no name or no positive number, or two rows of a slide differ.
    """
    table: dict[str, tuple[float, int]] = {}
    for line, slide_id, text in _mpp_rows(path):
        try:
            mpp = float(text.replace(",", "."))
        except ValueError:
            mpp = math.nan
        if not PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]:
            raise ResolutionError(
                f"{path}, line {line}: mpp is {text!r}, expected µm/px between {PLAUSIBLE_MPP[0]:g} and "
                f"{PLAUSIBLE_MPP[1]:g}.",
                "Correct the row.",
            )
        name = without_suffix(re.split(r"[\\/]", slide_id)[-1])
        if not name:
            raise ResolutionError(f"{path}, line {line}: has no slide_id.", "Name the slide.")
        earlier, first = table.setdefault(name, (mpp, line))
        if earlier != mpp:
            raise ResolutionError(
                f"{path}, lines {first} and {line}: slide {name} has {earlier:g} and {mpp:g} µm/px.", "Keep one row."
            )
    return {name: mpp for name, (mpp, _) in table.items()}


def _mpp_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Read line, slide_id and mpp of each row that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        separator = max(",;\t", key=(lines or [""])[0].count)
        rows = [[field.strip() for field in row] for row in csv.reader(lines, delimiter=separator)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ResolutionError(f"{path}: cannot be read ({error}).", "Expected a CSV file: slide_id,mpp.") from error
    header = [name.lower() for name in rows[0]] if rows else []
    if header.count("slide_id") != 1 or header.count("mpp") != 1:
        raise ResolutionError(
            f"{path}: has the columns {', '.join(header) or '(none)'}; expected slide_id and mpp, each once.",
            "Expected a CSV file: slide_id,mpp.",
        )
    for line, row in enumerate(rows[1:], start=2):
        if not any(row):
            continue
        if len(row) != len(header):
            raise ResolutionError(
                f"{path}, line {line}: has {len(row)} fields, but the header {len(header)}.",
                "Write decimal points, or separate the fields by semicolons.",
            )
        yield line, row[header.index("slide_id")], row[header.index("mpp")]


def _number(properties: Mapping[str, str], key: str) -> float | None:
    try:
        value = float(properties[key])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _of_axes(slide_id: str, what: str, x: float | None, y: float | None) -> float | None:
    """Return the mean of both axes, or the only one given.

    Raises:
        ResolutionError: They are plausible and differ.
    """
    present = [v for v in (x, y) if v is not None]
    plausible = all(PLAUSIBLE_MPP[0] <= v <= PLAUSIBLE_MPP[1] for v in present)
    if len(present) == 2 and plausible and max(present) > (1 + SAME) * min(present):
        raise _contradiction(slide_id, f"{x:g} µm/px in x", f"{y:g} µm/px in y ({what})")
    return sum(present) / len(present) if present else None


def _from_tiff(properties: Mapping[str, str]) -> tuple[float | None, float | None]:
    um_per_unit = {"centimeter": 10_000.0, "inch": 25_400.0}.get(properties.get("tiff.ResolutionUnit", ""))
    if um_per_unit is None:
        return None, None
    per_unit = [_number(properties, f"tiff.{axis}Resolution") for axis in "XY"]
    x, y = (None if v is None else um_per_unit / v for v in per_unit)
    return x, y


def _from_ome(properties: Mapping[str, str]) -> tuple[float | None, float | None]:
    """Return PhysicalSizeX and PhysicalSizeY of OME-XML in µm, of the image that has the size of level 0."""
    xml = properties.get("tiff.ImageDescription") or properties.get("openslide.comment") or ""
    if "<OME" not in xml[:1000] and ":OME" not in xml[:1000]:
        return None, None
    try:
        pixels = [e.attrib for e in _parsed(xml).iter() if e.tag.rpartition("}")[2] == "Pixels"]
    except (ElementTree.ParseError, ValueError):
        return None, None
    width = properties.get("openslide.level[0].width")
    attrs = next((a for a in pixels if a.get("SizeX") == width), pixels[0] if pixels else {})
    sizes = []
    for axis in "XY":
        size, um = _number(attrs, f"PhysicalSize{axis}"), UM.get(attrs.get(f"PhysicalSize{axis}Unit", "µm"))
        sizes.append(None if size is None or um is None else size * um)
    return sizes[0], sizes[1]


def _parsed(xml: str) -> ElementTree.Element:
    """Parse OME-XML; entity declarations, which could expand without bound, are refused."""
    if "<!" in xml.replace("<!--", ""):
        raise ValueError("it declares entities")
    return ElementTree.fromstring(xml)  # noqa: S314 - without declarations there is nothing to expand

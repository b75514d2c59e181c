"""Draw overlays of scores on the slide."""

from __future__ import annotations

import io
import textwrap
from typing import Protocol

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from cfusion.explanation.colour import Scale
from cfusion.explanation.result import METHODS, Explanation, TileScores
from cfusion.types import magnification_words

OVERVIEW_PX = 1000
"""Longer side of the slide in an overlay."""

_OPACITY = 0.55
"""Opacity of the scores over the slide."""

_CHARACTERS_PER_INCH = 15
"""Of a title, so that a long name is wrapped."""


class Pictures(Protocol):
    """Access to the pixels of a slide; implemented by the caller, who can open slides."""

    size_px: tuple[int, int]
    """Width and height of level 0."""

    def overview(self, side_px: int) -> UInt8[np.ndarray, "y x 3"]:
        """Return the complete slide, with a longer side of at most `side_px`."""

    def region(self, x_px: int, y_px: int, side_px: int, out_px: int) -> UInt8[np.ndarray, "out out 3"]:
        """Return a square of level 0, resized to `out_px` × `out_px`."""


def paint(
    explanation: Explanation,
    magnification: str,
    method: str,
    backdrop: UInt8[np.ndarray, "y x 3"] | None,
    *,
    noise: bool = False,
) -> UInt8[np.ndarray, "y x 3"]:
    """Draw one method's scores over the slide; tiles that may be noise are pale grey.

    Args:
        explanation: The scores.
        magnification: Magnification of the tiles.
        method: Method of the scores.
        backdrop: Picture of the complete slide; None: a white background.
        noise: Also colour what may be noise.
    """
    level, scores = explanation.levels[magnification], explanation.scores(magnification, method)
    coloured = np.isfinite(scores) if noise else explanation.stands_out(magnification, method)
    colours = Scale.of(explanation, method).colours(scores, coloured)
    return _laid_over(backdrop, level, colours, _extent(explanation, level))


def draw_overlay(
    explanation: Explanation, magnification: str, method: str, painted: UInt8[np.ndarray, "y x 3"]
) -> bytes:
    """Draw the result of `paint` as PNG with a colour bar that states the unit, and a title."""
    scale = Scale.of(explanation, method)
    height, width = painted.shape[:2]
    figure = Figure(figsize=(7 * min(1, width / height) + 1.6, 7 * min(1, height / width) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.imshow(painted)
    axis.set_xticks([])
    axis.set_yticks([])
    of = f"mean of {len(explanation.risks)} models" if len(explanation.risks) > 1 else "one model"
    lines = [f"{explanation.slide_id} · {method} at {magnification_words(magnification)} · {of}"]
    if explanation.tested:
        lines.append("grey: may be noise")
    characters = int(figure.get_figwidth() * _CHARACTERS_PER_INCH)
    figure.suptitle("\n".join(textwrap.fill(line, characters) for line in lines), fontsize=9)
    mapped = ScalarMappable(Normalize(scale.low, scale.high), scale.map_name)
    signed = METHODS[method].signed
    extend = ("both" if signed else "max") if scale.clipped else "neither"
    bar = figure.colorbar(mapped, ax=axis, extend=extend, fraction=0.046)
    meaning = ": red raises the risk, blue lowers it" if signed else ""
    bar.set_label(f"{method} ({METHODS[method].unit}){meaning}")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None}, pil_kwargs={"compress_level": 3})
    return stream.getvalue()


def _extent(explanation: Explanation, level: TileScores) -> tuple[float, float]:
    size = explanation.attrs.get("slide_size_px")
    if size:
        return float(size[0]), float(size[1])
    right, bottom = level.coords.max(axis=0) + level.side_px
    return float(right), float(bottom)


def _laid_over(
    backdrop: UInt8[np.ndarray, "y x 3"] | None, level: TileScores, colours: np.ndarray, size_px: tuple[float, float]
) -> UInt8[np.ndarray, "y x 3"]:
    """Draw tiles as rectangles over a small picture of the slide; memory does not depend on the number of tiles."""
    scale = OVERVIEW_PX / max(size_px)
    shape = (max(1, round(size_px[1] * scale)), max(1, round(size_px[0] * scale)), 3)
    picture = np.full(shape, 255, np.uint8) if backdrop is None else backdrop.copy()
    opacity = 1.0 if backdrop is None else _OPACITY
    zoom = np.array(picture.shape[1::-1]) / size_px
    first = np.floor(level.coords * zoom).astype(int)
    last = np.maximum(first + 1, np.floor((level.coords + level.side_px) * zoom).astype(int))
    for (left, top), (right, bottom), colour in zip(first, last, colours, strict=True):
        weight = opacity * colour[3]
        tile = picture[top:bottom, left:right]
        tile[...] = np.rint(tile * (1 - weight) + 255 * weight * colour[:3])
    return picture


__all__ = ["OVERVIEW_PX", "Pictures", "draw_overlay", "paint"]

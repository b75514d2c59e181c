"""Draw overlays of scores on the slide, and galleries of the tiles that raise and lower the risk most."""

from __future__ import annotations

import io
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8
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

GALLERY_TILES, GALLERY_PX = 6, 224
"""Tiles per row of the gallery, and the side of each."""


class Pictures(Protocol):
    """Access to the pixels of a slide; implemented by the caller, who can open slides."""

    size_px: tuple[int, int]
    """Width and height of level 0."""

    def overview(self, side_px: int) -> UInt8[np.ndarray, "y x 3"]:
        """Return the complete slide, with a longer side of at most `side_px`."""

    def region(self, x_px: int, y_px: int, side_px: int, out_px: int) -> UInt8[np.ndarray, "out out 3"]:
        """Return a square of level 0, resized to `out_px` × `out_px`."""


def draw_overlay(
    explanation: Explanation, magnification: str, method: str, backdrop: UInt8[np.ndarray, "y x 3"] | None
) -> bytes:
    """Draw one method's scores over the slide as PNG, with a colour bar that states the unit.

    Args:
        explanation: The scores.
        magnification: Magnification of the tiles.
        method: Method of the scores.
        backdrop: Picture of the complete slide; None: a white background.
    """
    level = explanation.levels[magnification]
    scores = explanation.scores(magnification, method)
    scale = Scale.of(method, scores)
    width, height = _extent(explanation, level)
    figure = Figure(figsize=(7 * min(1, width / height) + 1.6, 7 * min(1, height / width) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.imshow(_laid_over(backdrop, level, scale.colours(scores), (width, height)))
    axis.set_xticks([])
    axis.set_yticks([])
    of = f"mean of {len(explanation.risks)} models" if len(explanation.risks) > 1 else "one model"
    axis.set_title(f"{explanation.slide_id} · {method} at {magnification_words(magnification)} · {of}")
    mapped = ScalarMappable(Normalize(scale.low, scale.high), scale.map_name)
    signed = METHODS[method].signed
    extend = ("both" if signed else "max") if scale.clipped else "neither"
    bar = figure.colorbar(mapped, ax=axis, extend=extend, fraction=0.046)
    meaning = ": red raises the risk, blue lowers it" if signed else ""
    bar.set_label(f"{method} ({METHODS[method].unit}){meaning}")
    return _png(figure)


def draw_gallery(explanation: Explanation, magnification: str, pictures: Pictures) -> bytes:
    """Draw the tiles that raise and lower the risk most as PNG, each with its score and spread.

    Tiles are ranked by the leading method; only tiles with a score of the matching sign are shown.
    """
    level, method = explanation.levels[magnification], explanation.leading(magnification)
    scores, spread = explanation.scores(magnification, method), level.sd[explanation.methods.index(method)]
    figure = Figure(figsize=(GALLERY_TILES * 1.75, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, GALLERY_TILES)
    sides = (("raises the risk", extreme_tiles(scores)), ("lowers the risk", extreme_tiles(-scores)))
    for row, (words, tiles) in enumerate(sides):
        for column, axis in enumerate(axes[row]):
            axis.set_xticks([])
            axis.set_yticks([])
            if column >= len(tiles):
                axis.set_axis_off()
                continue
            tile = tiles[column]
            x, y = (int(v) for v in level.coords[tile])
            axis.imshow(pictures.region(x, y, round(level.side_px), GALLERY_PX))
            around = f" ± {spread[tile]:.1g}" if np.isfinite(spread[tile]) else ""
            axis.set_title(f"{scores[tile]:+.2g}{around}", fontsize=8)
        if tiles:
            axes[row][0].set_ylabel(words)
        else:
            axes[row][0].text(0, 0.5, f"no tile {words}")
    unit = METHODS[method].unit
    where = f"{explanation.slide_id} at {magnification_words(magnification)}"
    figure.suptitle(f"{where}: {method} ({unit}, ± sd over folds)", fontsize=9)
    return _png(figure)


def extreme_tiles(scores: Float[np.ndarray, " tile"], count: int = GALLERY_TILES) -> list[int]:
    """Return the rows of the highest scores above 0, highest first."""
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[:count]
    return [int(row) for row in order if scores[row] > 0]


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


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None}, pil_kwargs={"compress_level": 3})
    return stream.getvalue()


__all__ = ["Pictures", "draw_gallery", "draw_overlay", "extreme_tiles"]

"""Draw the tiles that raise and lower the risk most, each with its coarser and finer tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from cfusion.explanation.overlays import Pictures
from cfusion.explanation.result import METHODS, Explanation
from cfusion.report.number_words import significant
from cfusion.types import magnification_words

TILES = 6
"""Most tiles that raise the risk, and most that lower it."""

_SIDE_PX, _GAP_PX = 192, 6
_OUTLINE = ((255, 255, 255), 5), ((17, 17, 17), 2)
"""Colour and width of the two lines around a tile, which show on any tissue."""


@dataclass(frozen=True)
class Strip:
    """One tile of the gallery.

    Attributes:
        raises: Whether the tile raises the risk; otherwise it lowers it.
        caption: Score, spread and position.
        picture: The tile's lineage from the coarsest to the finest magnification, from left to right.
        words: What the picture shows.
    """

    raises: bool
    caption: str
    picture: Image.Image
    words: str


def draw_gallery(explanation: Explanation, magnification: str, pictures: Pictures) -> list[Strip]:
    """Draw the tiles that raise the risk most, then those that lower it most.

    Tiles are ranked by the leading method; only tiles that are coloured are shown, no noise.
    """
    method = explanation.leading(magnification)
    scores = np.where(explanation.stands_out(magnification, method), explanation.scores(magnification, method), np.nan)
    return [
        _strip(explanation, magnification, tile, sign > 0, pictures)
        for sign in (1.0, -1.0)
        for tile in extreme_tiles(sign * scores)
    ]


def extreme_tiles(scores: Float[np.ndarray, " tile"], count: int = TILES) -> list[int]:
    """Return the rows of the highest scores above 0, highest first."""
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[:count]
    return [int(row) for row in order if scores[row] > 0]


def tile_lineage(explanation: Explanation, magnification: str, tile: int) -> dict[str, int]:
    """Return the row of a tile, of the coarser tiles around it, and of the finer ones inside, coarsest first.

    Of the finer tiles inside, it is the one whose score is the most extreme on the same side.
    """
    names = list(explanation.levels)
    place = names.index(magnification)
    found = {magnification: tile}
    row = tile
    for fine, coarse in zip(names[place:], names[place + 1 :], strict=False):
        parents = explanation.levels[fine].parent
        if parents is None:
            break
        row = found[coarse] = int(parents[row])
    row, sign = tile, 1.0 if explanation.scores(magnification, explanation.leading(magnification))[tile] > 0 else -1.0
    for fine in reversed(names[:place]):
        parents = explanation.levels[fine].parent
        inside = np.flatnonzero(parents == row) if parents is not None else ()
        if not len(inside):
            break
        scores = sign * explanation.scores(fine, explanation.leading(fine))[inside]
        row = found[fine] = int(inside[np.argmax(scores)])
    return {name: found[name] for name in reversed(names) if name in found}


def _strip(explanation: Explanation, magnification: str, tile: int, raises: bool, pictures: Pictures) -> Strip:
    rows = tile_lineage(explanation, magnification, tile)
    picture = Image.new("RGB", (len(rows) * (_SIDE_PX + _GAP_PX) - _GAP_PX, _SIDE_PX), "white")
    squares = [_square(explanation, name, row) for name, row in rows.items()]
    for number, (x, y, side) in enumerate(squares):
        shown = Image.fromarray(pictures.region(x, y, round(side), _SIDE_PX))
        if number + 1 < len(squares):
            _outline(shown, squares[number + 1], (x, y), _SIDE_PX / side)
        picture.paste(shown, (number * (_SIDE_PX + _GAP_PX), 0))
    level, method = explanation.levels[magnification], explanation.leading(magnification)
    score, spread = (float(table[explanation.methods.index(method), tile]) for table in (level.mean, level.sd))
    around = f" ± {significant(spread, 2)}" if np.isfinite(spread) else ""
    x, y, _ = _square(explanation, magnification, tile)
    score_words = f"{significant(score, 2, '+')}{around} {METHODS[method].unit} ({method})"
    caption = f"{score_words}; {magnification_words(magnification)} tile at {x}, {y} px"
    return Strip(raises, caption, picture, " → ".join(map(magnification_words, rows)))


def _square(explanation: Explanation, magnification: str, tile: int) -> tuple[int, int, float]:
    """Return the corner and the side of a tile in level-0 px."""
    level = explanation.levels[magnification]
    return int(level.coords[tile, 0]), int(level.coords[tile, 1]), level.side_px


def _outline(picture: Image.Image, inner: tuple[int, int, float], origin: tuple[int, int], scale: float) -> None:
    """Outline the next finer tile of the lineage."""
    x, y, side = inner
    left, top = ((at - start) * scale for at, start in zip((x, y), origin, strict=True))
    for colour, width in _OUTLINE:
        box = (left, top, left + side * scale - 1, top + side * scale - 1)
        ImageDraw.Draw(picture).rectangle(box, outline=colour, width=width)


def sides(strips: list[Strip]) -> Iterator[tuple[str, str, list[Strip]]]:
    """Return the name of each side as used in file names and in words, with its strips."""
    yield "raises", "raises the risk", [strip for strip in strips if strip.raises]
    yield "lowers", "lowers the risk", [strip for strip in strips if not strip.raises]


__all__ = ["Strip", "draw_gallery", "extreme_tiles", "sides", "tile_lineage"]

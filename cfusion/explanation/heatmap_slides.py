"""Write heatmaps as pyramidal OME-TIFF files in the pixels of the slide, for QuPath, OMERO, OpenSlide and others.

Level 0 has the slide's size, so a point has the same coordinates in both; further levels are sub-images (SubIFDs), as
the OME model wants them. The pixels are RGB: the colours of `cfusion.explanation.colour` on white. A heatmap is flat
inside a tile of the explanation, so nearly all tiles of the file have one colour and are compressed once per colour:
memory and time do not grow with the slide's pixels.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import numpy as np
import tifffile
from jaxtyping import UInt8

from cfusion.errors import DataError
from cfusion.explanation.colour import Scale
from cfusion.explanation.result import METHODS, Explanation
from cfusion.files import atomic_path

_TILE_PX = 256
_STEP = 4
"""Each level is this many times smaller than the one before."""


def write_heatmap(explanation: Explanation, magnification: str, method: str, target: str | os.PathLike[str]) -> None:
    """Write one method's scores at one magnification as a pyramidal OME-TIFF, atomically.

    Raises:
        DataError: The size of the slide is unknown.
    """
    size = explanation.attrs.get("slide_size_px")
    if not size:
        raise DataError(
            f"slide {explanation.slide_id}: its size is unknown, so no heatmap of its size can be written.",
            "Give the slide itself or --slides.",
        )
    painter = _Painter(explanation, magnification, method)
    steps = [1]
    while max(size) / steps[-1] > 4 * _TILE_PX:
        steps.append(steps[-1] * _STEP)
    mpp = explanation.attrs.get("mpp")
    pixel = {"PhysicalSizeX": mpp, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": mpp, "PhysicalSizeYUnit": "µm"}
    name = f"{explanation.slide_id}: {method} ({METHODS[method].unit}) at {magnification}"
    with atomic_path(target) as temporary, tifffile.TiffWriter(temporary, ome=True, bigtiff=True) as tiff:
        for step in steps:
            width, height = (max(1, -(-side // step)) for side in size)
            tiff.write(
                painter.tiles(width, height, step),
                shape=(height, width, 3), dtype=np.uint8, photometric="rgb", tile=(_TILE_PX, _TILE_PX),
                compression="adobe_deflate",
                **({"subifds": len(steps) - 1, "metadata": {"axes": "YXS", "Name": name, **(pixel if mpp else {})}}
                   if step == 1 else {"subfiletype": 1, "metadata": None}),
            )  # fmt: skip


class _Painter:
    """Paints compressed tiles of a heatmap."""

    def __init__(self, explanation: Explanation, magnification: str, method: str) -> None:
        level = explanation.levels[magnification]
        rgba = Scale.of(explanation, method).colours(
            explanation.scores(magnification, method), explanation.stands_out(magnification, method)
        )
        opaque = 1 + rgba[:, 3:] * (rgba[:, :3] - 1)
        self._colours = (255 * np.where(rgba[:, 3:] > 0, opaque, 1)).round().astype(np.uint8)
        order = np.argsort(level.coords[:, 1], kind="stable")
        self._coords, self._colours, self._side = level.coords[order], self._colours[order], level.side_px
        self._flat: dict[bytes, bytes] = {}

    def tiles(self, width: int, height: int, step: int) -> Iterator[bytes]:
        """Yield the compressed tiles of a level, row by row."""
        span = _TILE_PX * step
        for top in range(0, -(-height // _TILE_PX) * span, span):
            rows = slice(*np.searchsorted(self._coords[:, 1], (top - self._side, top + span)))
            coords, colours = self._coords[rows], self._colours[rows]
            by_column = np.argsort(coords[:, 0], kind="stable")
            coords, colours = coords[by_column], colours[by_column]
            for left in range(0, -(-width // _TILE_PX) * span, span):
                columns = slice(*np.searchsorted(coords[:, 0], (left - self._side, left + span)))
                yield self._tile(coords[columns] - (left, top), colours[columns], step)

    def _tile(self, corners: np.ndarray, colours: np.ndarray, step: int) -> bytes:
        first = np.clip(np.ceil(corners / step - 0.5), 0, _TILE_PX).astype(int)
        last = np.clip(np.ceil((corners + self._side) / step - 0.5), 0, _TILE_PX).astype(int)
        covered = (last > first).all(axis=1)
        first, last, colours = first[covered], last[covered], colours[covered]
        covering = np.flatnonzero((first == 0).all(axis=1) & (last == _TILE_PX).all(axis=1))
        if not len(first) or len(covering):
            return self._one_colour(colours[covering[-1]] if len(covering) else np.full(3, 255, np.uint8))
        pixels = np.full((_TILE_PX, _TILE_PX, 3), 255, np.uint8)
        for (x0, y0), (x1, y1), colour in zip(first, last, colours, strict=True):
            pixels[y0:y1, x0:x1] = colour
        return zlib.compress(pixels.tobytes(), 1)

    def _one_colour(self, colour: UInt8[np.ndarray, " 3"]) -> bytes:
        key = colour.tobytes()
        if key not in self._flat:
            self._flat[key] = zlib.compress(key * _TILE_PX**2, 6)
        return self._flat[key]


__all__ = ["write_heatmap"]

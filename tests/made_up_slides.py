"""Made-up slides for the tests of shards and bags: a three-level grid with parents, coordinates and attributes."""

from __future__ import annotations

import numpy as np

from cfusion.types import SlideFeatures


def make_slide(
    slide_id: str, cells: int = 5, dim: int = 8, seed: int = 0, *, coords: bool = True, dtype: str = "<f2"
) -> SlideFeatures:
    """Make a slide of `cells` complete cells, 3 to a row, with 4 and 16 times as many tiles at 10x and 20x."""
    generator = np.random.default_rng([seed, sum(slide_id.encode()), cells])
    origin = np.stack([np.arange(cells) % 3, np.arange(cells) // 3], axis=1) * 1024 + 2048
    tables, parents, side = {"x5": origin}, {}, 1024
    for name, coarser in (("x10", "x5"), ("x20", "x10")):
        side //= 2
        offsets = np.array([[0, 0], [side, 0], [0, side], [side, side]])
        tables[name] = (tables[coarser][:, None] + offsets).reshape(-1, 2)
        parents[name] = np.repeat(np.arange(len(tables[coarser]), dtype=np.int32), 4)
    names = ("x20", "x10", "x5")
    features = {n: generator.normal(size=(len(tables[n]), dim)).astype(dtype) for n in names}
    attrs = {"encoder": "made-up", "slide": slide_id, "seed": seed}
    if coords:
        attrs["tile_px_level0"] = {"x20": 256, "x10": 512, "x5": 1024}
    return SlideFeatures(
        slide_id,
        features,
        {n: tables[n].astype(np.int32) for n in names} if coords else {},
        parents if coords else {},
        attrs,
    )


class MemoryStore:
    """Slides held in memory, with the interface of a feature store."""

    def __init__(self, slides):
        self.slides = {slide.slide_id: slide for slide in slides}
        self.reads = []

    def slide_ids(self):
        return list(self.slides)

    def attrs(self, slide_id):
        return self.slides[slide_id].attrs

    def read(self, slide_id):
        self.reads.append(slide_id)
        return self.slides[slide_id]

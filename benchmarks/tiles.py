"""Tiles per CPU-second at three magnifications: one reading per cell against one pass per magnification.

Both sides cut the same tiles at 20x, 10x and 5x of the same cells, in one run, medians of three. The JPEG slide is a
30,720² pyramid at 40x made here by mirror-tiling a real slide; the JPEG 2000 slide is a real one. The other side reads
every tile from level 0 by OpenSlide and resizes it with PIL, as CLAM does. A third line decodes the raw tiles by
imagecodecs and does nothing else. Further lines are other readers of slides, those that are installed: each reads its
tiles from the pyramid level that fits (`benchmarks.tile_readers`). The last lines extract the complete JPEG slide in a
separate process, with four threads and an encoder that keeps the pace of a GPU, and report its memory and the encoder's
idle share.

    python -m benchmarks.tiles --slides SHARED/slides [--quick] [--json FILE]
    pip install tiffslide fastslide eozin microtome-wsi     # elsewhere, and named in PYTHONPATH
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import openslide
import tifffile
from PIL import Image

from benchmarks.table import Row, options, present
from benchmarks.tile_readers import open_readers, read_tiles
from preprocess.extraction import preprocess_slides
from preprocess.grid import TileGrid, make_grid
from preprocess.readers import JPEG, choose_reader
from preprocess.resample import area_average
from preprocess.resolution import SlideScale
from preprocess.settings import PreprocessConfig
from preprocess.slide_plan import CellTiles, SlidePlan, rows_by_cell
from preprocess.slides import open_slide
from preprocess.tissue import Tissue

SIDE_PX, TILE_PX, LEVELS, JPEG_QUALITY = 30_720, 256, (1, 4, 16, 32), 80
MAGNIFICATIONS = (20.0, 10.0, 5.0)
REPEATS = 3
PACE_TILES_PER_S = 1000.0
"""Tiles a second of the paced encoder: about a ViT-L in f16 on one data-centre GPU."""


def mirror_tiles(picture: np.ndarray, side_px: int) -> Iterator[np.ndarray]:
    """Tiles of a square of `side_px`, row by row, laid out with mirrored copies of a picture."""
    places = [np.pad(np.arange(n), (0, max(0, side_px + TILE_PX - n)), "symmetric") for n in picture.shape[:2]]
    for top, left in itertools.product(range(0, side_px, TILE_PX), range(0, side_px, TILE_PX)):
        yield picture[np.ix_(places[0][top : top + TILE_PX], places[1][left : left + TILE_PX])]


def make_pyramid(source: Path, target: Path) -> None:
    """Write the JPEG pyramid, a tile at a time."""
    slide = openslide.OpenSlide(source)
    width, height = (side // 32 * 32 for side in slide.dimensions)
    picture = np.asarray(slide.read_region((0, 0), 0, (width, height)).convert("RGB"))
    with tifffile.TiffWriter(target, bigtiff=True) as tiff:
        for factor in LEVELS:
            level = np.ascontiguousarray(area_average(picture, width // factor, height // factor))
            tiff.write(
                mirror_tiles(level, SIDE_PX // factor), shape=(SIDE_PX // factor, SIDE_PX // factor, 3),
                dtype=np.uint8, tile=(TILE_PX, TILE_PX), photometric="rgb", compression="jpeg",
                compressionargs={"level": JPEG_QUALITY}, metadata=None, subfiletype=int(factor > 1), maxworkers=2,
                description="Aperio Image Library, benchmark" + ("|AppMag = 40|MPP = 0.25" if factor == 1 else ""),
            )  # fmt: skip


def plan_all(path: Path, default_mpp: float | None) -> SlidePlan:
    """Plan every tile of the cells that lie completely on the slide, tissue or not."""
    slide = open_slide(path, default_mpp=default_mpp)
    cells = [side // 2048 for side in slide.size_px]
    size = (cells[0] * 2048, cells[1] * 2048)
    every = np.ones(cells[::-1], bool)
    grid = make_grid(every, size, 2.0, MAGNIFICATIONS)
    reader = choose_reader(slide, [(0, 0), (2048, 0)])
    tissue, scale = Tissue(every, ~every, every), SlideScale(2.0, "40x")
    return SlidePlan(slide, grid, reader, "area", tissue, "all", "", scale, rows_by_cell(grid))


def one_pass_per_magnification(path: Path, grid: TileGrid, numbers: list[int]) -> int:
    """The tiles of some cells from level 0, resized; each magnification is a separate run, as in CLAM."""
    count = 0
    for name in grid.names:
        slide = openslide.OpenSlide(path)
        side, factor = round(grid.scale * grid.cell_px / grid.factor(name)), grid.factor(name)
        for (column, row), j, i in itertools.product(grid.cells[numbers].tolist(), range(factor), range(factor)):
            corner = ((column * factor + i) * side, (row * factor + j) * side)
            region = slide.read_region(corner, 0, (side, side)).convert("RGB")
            count += np.asarray(region.resize((TILE_PX, TILE_PX))).shape[0] // TILE_PX
        slide.close()
    return count


def one_reading_per_cell(plan: SlidePlan, numbers: list[int]) -> int:
    """The tiles of some cells as the extraction reads them."""
    cells: Iterator[CellTiles] = map(plan.read_cell, numbers)
    return sum(len(tiles) for cell in cells if cell.tiles is not None for tiles in cell.tiles.values())


def decoding_only(page: Any, stream: BinaryIO, grid: TileGrid, numbers: list[int]) -> int:
    """Read and decode the raw tiles under some cells, each once, and throw the pixels away."""
    across, side = -(-page.imagewidth // page.tilewidth), 2048 // page.tilewidth
    for (column, row), j, i in itertools.product((grid.cells[numbers] * side).tolist(), range(side), range(side)):
        number = (row + j) * across + column + i
        stream.seek(page.dataoffsets[number])
        data = stream.read(page.databytecounts[number])
        if page.compression == JPEG:
            imagecodecs.jpeg8_decode(data, tables=page.jpegtables, colorspace="RGB", outcolorspace="RGB")
        else:
            imagecodecs.jpeg2k_decode(data)
    return 21 * len(numbers)


def tiles_per_cpu_second(sides: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Median over repeats of each side; the sides take turns, so that a busy machine is busy for all."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            start = time.process_time()
            count = run()
            if repeat:  # the first one warms caches and memory
                found[name].append(count / (time.process_time() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def compare(case: str, path: Path, default_mpp: float | None, cells: int, repeats: int) -> list[Row]:
    """The rows of one slide."""
    plan = plan_all(path, default_mpp)
    numbers = np.linspace(0, len(plan.grid.cells) - 1, min(cells, len(plan.grid.cells))).astype(int).tolist()
    others, left_out = open_readers(path)
    for name, why in left_out.items():
        print(f"{case}: {name} is left out: {why}")
    with tifffile.TiffFile(path) as tiff, path.open("rb") as stream:
        page: Any = tiff.pages[0]
        found = tiles_per_cpu_second(
            {
                "ours": lambda: one_reading_per_cell(plan, numbers),
                "decoding": lambda: decoding_only(page, stream, plan.grid, numbers),
                "passes": lambda: one_pass_per_magnification(path, plan.grid, numbers),
                **{name: partial(read_tiles, reader, plan.grid, numbers) for name, reader in others.items()},
            },
            repeats,
        )
    plan.close()
    unit = "tiles / CPU-second"
    return [
        Row(f"{case}, against one pass per magnification", found["ours"], found["passes"], unit),
        Row(f"{case}, against decoding only", found["ours"], found["decoding"], unit),
        *(Row(f"{case}, against {name} on the fitting level", found["ours"], found[name], unit) for name in others),
    ]


class PacedEncoder:
    """Sleeps as long as a GPU would take for a batch."""

    name = "paced"
    dim = 8

    def __init__(self) -> None:
        self.identity: dict[str, Any] = {}

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """Zeros, in time."""
        time.sleep(len(tiles) / PACE_TILES_PER_S)
        return np.zeros((len(tiles), self.dim), np.float32)


def extract_all(path: Path, store: Path) -> None:
    """Extract the whole slide and print peak memory and idle share as JSON."""
    mask = store / "masks" / f"{path.stem}.png"
    mask.parent.mkdir(parents=True)
    Image.new("L", (8, 8), 255).save(mask)
    config = PreprocessConfig(slides=path, store=store, threads=4, masks=mask.parent, batch_size=64)
    summary = preprocess_slides(config, slots=[[PacedEncoder()]], strict=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = {"peak": peak, "idle": summary.encoder_idle, "tiles": summary.tiles / summary.seconds}
    sys.stdout.write(json.dumps(measured) + "\n")


def extraction_rows(path: Path, folder: Path) -> list[Row]:
    """Memory and idle share of an extraction in a separate process."""
    call = [sys.executable, "-m", "benchmarks.tiles", "--extract", str(path), "--store", str(folder / "store")]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    measured = json.loads(done.stdout.splitlines()[-1])
    return [
        Row("peak memory with 4 threads", measured["peak"] / 1e9, 1.5, "GB (theirs: the limit)", "lower"),
        Row("idle share of an encoder of 1000 tiles/s", measured["idle"], None, "share of the time", "lower"),
        Row("complete extraction, this encoder", measured["tiles"], PACE_TILES_PER_S, "tiles / s (theirs: its pace)"),
    ]


def main() -> None:
    """Run both sides and print the table."""
    parser = options(__doc__)
    parser.add_argument("--slides", type=Path, default=Path("../shared/slides"))
    parser.add_argument("--cells", type=int, default=32, help="cells of each slide that are compared")
    parser.add_argument("--extract", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.extract:
        extract_all(chosen.extract, chosen.store)
        return
    cells, repeats = (2, 1) if chosen.quick else (chosen.cells, REPEATS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pyramid = folder / "pyramid.svs"
        make_pyramid(chosen.slides / "cmu_small_region.svs", pyramid)
        rows = compare("JPEG 40x", pyramid, None, cells, repeats)
        rows += compare("JPEG 2000", chosen.slides / "tcga-cr-7395-01a-01-ts1.svs", 0.25, cells, repeats)
        if not chosen.quick:
            rows += extraction_rows(pyramid, folder)
    present(f"Tiles at 20x, 10x and 5x, medians of {repeats}", rows, chosen.json)


if __name__ == "__main__":
    main()

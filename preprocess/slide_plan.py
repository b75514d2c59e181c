"""Plan for one slide: its resolution, its tissue, its grid, its reader."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from cfusion.errors import DISK, DataError, SlideError
from cfusion.files import digest_file
from preprocess.annotation import find_mask, read_mask, write_sheets
from preprocess.artefacts import find_artefacts
from preprocess.grid import TileGrid, make_grid
from preprocess.overview import read_overview
from preprocess.readers import Reader, choose_reader
from preprocess.resample import area_tiles, bicubic_tiles
from preprocess.resolution import SlideScale, scale_of
from preprocess.settings import PreprocessConfig
from preprocess.slides import Slide, open_slide
from preprocess.tissue import METHOD, Tissue, find_tissue, without_artefacts


@dataclass(frozen=True)
class CellTiles:
    """The tiles of one cell.

    Attributes:
        number: The cell's number in the grid.
        rows: Per magnification name, the rows of the tiles in the slide's features.
        tiles: Per magnification name, u8 [N, 256, 256, 3]; None if the cell cannot be read.
        error: Why it cannot be read.
        pixels: Level-0 pixels that were read.
    """

    number: int
    rows: dict[str, np.ndarray]
    tiles: dict[str, np.ndarray] | None
    error: str = ""
    pixels: int = 0


@dataclass(frozen=True)
class SlidePlan:
    """A slide that is ready to be read cell by cell.

    Attributes:
        slide: The open slide.
        grid: Its tiles.
        reader: Reader of its pixels.
        resample: Filter of the coarser magnifications.
        tissue: The tissue, the ink and what is unusual about them.
        tissue_from: Source of the tissue: the name of the method, or of the user's mask.
        mask_digest: SHA-256 of the user's mask; empty if there is none.
        scale: How the slide's resolution was used.
        cell_rows: For each cell, per magnification name, the rows of its tiles.
    """

    slide: Slide
    grid: TileGrid
    reader: Reader
    resample: Literal["area", "bicubic"]
    tissue: Tissue
    tissue_from: str
    mask_digest: str
    scale: SlideScale
    cell_rows: list[dict[str, np.ndarray]] = field(repr=False)

    def cells(self) -> Iterator[int]:
        """Numbers of the cells."""
        return iter(range(len(self.grid.cells)))

    def read_cell(self, number: int) -> CellTiles:
        """Read one cell and cut it into tiles; an unreadable cell returns its error instead of raising."""
        rows = self.cell_rows[number]
        coarsest = self.grid.names[-1]
        column, row = self.grid.cells[number]
        x0, x1 = (int(v) for v in self.grid.edge_px_level0(np.array([column, column + 1]), coarsest))
        y0, y1 = (int(v) for v in self.grid.edge_px_level0(np.array([row, row + 1]), coarsest))
        wanted = {n: self.grid.tiles[n][r] - self.grid.cells[number] * self.grid.factor(n) for n, r in rows.items()}
        shrink = round(self.grid.scale)
        complete = self.grid.scale == shrink and self.resample == "area"
        cut = area_tiles if self.resample == "area" else bicubic_tiles
        try:
            region = self.reader.region(
                x0, y0, x1 - x0, y1 - y0, shrink if complete else 1, _scratch(self.grid.cell_px)
            )
            tiles = cut(region, self.grid, wanted)
            self._refuse_lost(tiles[self.grid.names[0]], rows[self.grid.names[0]])
        except DataError as error:
            return CellTiles(number, rows, None, str(error))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a library's error is one cell's, not the run's
            return CellTiles(number, rows, None, f"{self.slide.path}: the cell at {x0}, {y0}: {error!r}")
        return CellTiles(number, rows, tiles, pixels=(x1 - x0) * (y1 - y0))

    def _refuse_lost(self, tiles: np.ndarray, rows: np.ndarray) -> None:
        """Reject finest tiles of tissue, u8 [n, 256, 256, 3], that have no pixel at all in level 0.

        A tile that was never written is as transparent as glass that was not scanned. The overview comes from a
        coarser level, so it can tell the two apart.
        """
        name = self.grid.names[0]
        blank = (tiles[:, ::64, ::64] == self.slide.background).all(axis=(1, 2, 3))
        for place in self.grid.tiles[name][rows[blank]]:
            (x0, y0), (x1, y1) = (self.grid.edge_px_level0(p, name).tolist() for p in (place, place + 1))
            if not self.slide.read_rgba(x0, y0, x1 - x0, y1 - y0)[..., 3].any():
                raise SlideError(f"{self.slide.path}: level 0 has no pixels at {x0}, {y0}, where there is tissue.")

    def close(self) -> None:
        """Close the slide's files."""
        self.reader.close()
        self.slide.close()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Settings of glibc's mallopt(3)."""

_SCRATCH = threading.local()


@functools.cache
def _keep_freed_memory() -> None:
    """Make the allocator keep freed tile memory for the next tiles.

    By default glibc returns blocks of this size at once, and the next cell pays for fresh pages: a quarter of the
    decoding time where pages are expensive. Other allocators are left unchanged.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 256 << 20)


def _scratch(side_px: int) -> np.ndarray:
    """Return the buffer of the thread's last cell for reuse: fresh memory costs a tenth of the decoding."""
    if getattr(_SCRATCH, "side_px", None) != side_px:
        _keep_freed_memory()
        _SCRATCH.side_px, _SCRATCH.cell = side_px, np.empty((side_px, side_px, 3), np.uint8)
    return _SCRATCH.cell


def plan_slide(path: Path, config: PreprocessConfig, mpp_table: Mapping[str, float]) -> SlidePlan:
    """Open a slide and plan what to read of it.

    Raises:
        DataError: The slide is unreadable, has no resolution, is too coarse, or contains no tissue.
    """
    slide = open_slide(path, mpp_table, config.default_mpp)
    try:
        scale = scale_of(slide.slide_id, slide.resolution.mpp, config.magnifications[0], config.resolution)
        overview = read_overview(slide)
        own = find_mask(config.masks, slide.slide_id)
        if own is None:
            tissue = find_tissue(overview, overview.px_level0[0] * slide.resolution.mpp, config.min_piece_um2)
        else:
            mask = read_mask(own, overview.rgb.shape[:2], overview.px_level0) & overview.scanned
            tissue = Tissue(mask, np.zeros_like(mask), overview.scanned)
        artefacts = None
        if config.artefacts:
            artefacts = find_artefacts(overview.rgb, tissue.mask, overview.px_level0[0] * slide.resolution.mpp)
            tissue = without_artefacts(tissue, artefacts)
        grid = make_grid(tissue.mask, slide.size_px, scale.factor, config.magnifications, config.min_tissue)
        if not len(grid.cells):
            raise DataError(
                f"{path}: no tissue was found.", "Look at the slide; --masks accepts your own mask.", topic="tissue"
            )
        if config.sheets:
            write_sheets(config.store / "sheets", slide.slide_id, overview, tissue.mask, grid, artefacts)
        reader = choose_reader(slide, [(int(x), int(y)) for x, y in grid.coords(grid.names[0])])
    except OSError as error:
        slide.close()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or config.store
            raise DataError(f"{where}: cannot be written ({error.strerror}).", DISK[error.errno]) from error
        raise DataError(f"{path}: {error.strerror or error} ({error.filename}).") from error
    except BaseException:
        slide.close()
        raise
    source, digest = (METHOD, "") if own is None else (own.name, digest_file(own))
    return SlidePlan(slide, grid, reader, config.resample, tissue, source, digest, scale, rows_by_cell(grid))


def rows_by_cell(grid: TileGrid) -> list[dict[str, np.ndarray]]:
    """Return, for each cell and magnification name, the rows of its tiles."""
    by_name = {}
    for name in grid.names:
        cell_of = grid.cell_of(name)
        order = np.argsort(cell_of, kind="stable")
        by_name[name] = np.split(order, np.searchsorted(cell_of[order], np.arange(1, len(grid.cells))))
    return [{name: rows[number] for name, rows in by_name.items()} for number in range(len(grid.cells))]

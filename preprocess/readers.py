"""Readers of level-0 pixels: OpenSlide, or the file's raw tiles if these give the same pixels faster."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import imagecodecs
import numpy as np
import simplejpeg
import tifffile

from cfusion.errors import DataError, SlideError
from preprocess.resample import area_average
from preprocess.slides import Slide

logger = logging.getLogger(__name__)

CHECK_PX = 512
"""Side of the regions on which the raw reader is compared with OpenSlide."""

ENOUGH_PROBES, MOST_PROBES = 3, 12
"""Number of regions that must compare equal, and the number of attempts if some are broken."""

CACHE_BYTES = 48 << 20
"""Memory for decoded tiles that cross a cell's edge, so that the neighbour need not decode them again."""

JPEG, APERIO_JPEG2000_RGB = 7, 33005
"""TIFF compressions whose tiles are decoded here."""

SOI = b"\xff\xd8"
"""Start of a JPEG stream."""

EOC = b"\xff\xd9"
"""End of a JPEG 2000 stream."""


class Reader(Protocol):
    """Reads level-0 pixels of one slide; thread-safe."""

    name: str

    def region(
        self, x_px: int, y_px: int, width_px: int, height_px: int, shrink: int = 1, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return a region of level 0, averaged over squares of `shrink` px; `out` is memory that may hold the result.

        Returns:
            RGB u8 [height / shrink, width / shrink, 3], on the slide's background colour.

        Raises:
            DataError: The region cannot be decoded.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class OpenSlideReader:
    """Reads through OpenSlide: every format, and the reference for the other reader."""

    name = "openslide"

    def __init__(self, slide: Slide) -> None:
        self._slide = slide

    def region(
        self, x_px: int, y_px: int, width_px: int, height_px: int, shrink: int = 1, out: np.ndarray | None = None
    ) -> np.ndarray:
        """See `Reader.region`."""
        rgb = self._slide.composite(self._slide.read_rgba(x_px, y_px, width_px, height_px))
        return area_average(rgb, width_px // shrink, height_px // shrink)

    def close(self) -> None:
        """See `Reader.close`; the owner of the slide closes it."""


class RawTileReader:
    """Decodes the tiles of a TIFF file by their offsets.

    Tiles that are missing, do not decode or have an unknown format are left to OpenSlide. A truncated JPEG 2000 tile
    is an error: OpenJPEG, and therefore OpenSlide, would fill the missing part with invented pixels.

    Raises:
        DataError: The file's layout is not supported here.
    """

    name = "raw-tiles"

    def __init__(self, slide: Slide) -> None:
        self._slide = slide
        self._reference = OpenSlideReader(slide)
        try:
            self._read_layout(slide)
        except (DataError, MemoryError):
            raise
        except Exception as error:
            raise DataError(f"{slide.path}: its TIFF tags cannot be used ({error}).") from error
        self._file = os.open(slide.path, os.O_RDONLY)
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._scratch = threading.local()
        self._has_fallen_back = False

    def _read_layout(self, slide: Slide) -> None:
        with tifffile.TiffFile(slide.path) as tiff:
            page = tiff.pages[0]
            if not isinstance(page, tifffile.TiffPage) or not page.is_tiled or page.samplesperpixel != 3:
                raise DataError(f"{slide.path}: level 0 is not in RGB tiles.")
            if (page.imagewidth, page.imagelength) != slide.size_px:
                raise DataError(f"{slide.path}: its first image is not level 0.")
            if page.compression not in (JPEG, APERIO_JPEG2000_RGB) or page.bitspersample != 8:
                raise DataError(f"{slide.path}: tiles of compression {page.compression} are not read raw.")
            rgb = page.photometric == tifffile.PHOTOMETRIC.RGB
            self._jpeg_head = _jpeg_head(page.jpegtables, rgb) if page.compression == JPEG else b""
            self._tile = (page.tilewidth, page.tilelength)
            self._across = -(-page.imagewidth // page.tilewidth)
            self._offsets, self._counts = page.dataoffsets, page.databytecounts
            number = self._across * -(-page.imagelength // page.tilelength)
            if min(len(self._offsets), len(self._counts)) < number:
                raise DataError(f"{slide.path}: has {len(self._offsets)} tiles, expected {number}.")

    def close(self) -> None:
        """See `Reader.close`."""
        os.close(self._file)

    def region(
        self, x_px: int, y_px: int, width_px: int, height_px: int, shrink: int = 1, out: np.ndarray | None = None
    ) -> np.ndarray:
        """See `Reader.region`."""
        try:
            return self.raw_region(x_px, y_px, width_px, height_px, shrink, out)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - decoders raise errors of many kinds
            # One line per slide: a damaged one can have thousands of such tiles.
            level = logging.DEBUG if self._has_fallen_back else logging.INFO
            self._has_fallen_back = True
            where = f"OpenSlide reads the region at {x_px}, {y_px}"
            logger.log(level, "%s: %s, because its raw tiles do not decode (%s).", self._slide.path, where, error)
            return self._reference.region(x_px, y_px, width_px, height_px, shrink)

    def raw_region(
        self, x_px: int, y_px: int, width_px: int, height_px: int, shrink: int = 1, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read as `Reader.region` does, without OpenSlide."""
        right, bottom = min(x_px + width_px, self._slide.size_px[0]), min(y_px + height_px, self._slide.size_px[1])
        inside = right == x_px + width_px and bottom == y_px + height_px
        at_once = shrink if inside and not any(v % shrink for v in (x_px, y_px, *self._tile)) else 1
        shape = (height_px // at_once, width_px // at_once, 3)
        picture = np.empty(shape, np.uint8) if out is None or out.shape != shape else out
        if not inside:
            picture[:] = self._slide.background
        for row in range(y_px // self._tile[1], -(-bottom // self._tile[1])):
            for column in range(x_px // self._tile[0], -(-right // self._tile[0])):
                left, top = column * self._tile[0], row * self._tile[1]
                x0, x1 = max(left, x_px), min(left + self._tile[0], right)
                y0, y1 = max(top, y_px), min(top + self._tile[1], bottom)
                complete = (x1 - x0, y1 - y0) == self._tile
                tile = self.decoded(row * self._across + column, keep=not complete)
                target = picture[
                    (y0 - y_px) // at_once : (y1 - y_px) // at_once, (x0 - x_px) // at_once : (x1 - x_px) // at_once
                ]
                area_average(
                    tile[y0 - top : y1 - top, x0 - left : x1 - left], target.shape[1], target.shape[0], out=target
                )
        return area_average(picture, width_px // shrink, height_px // shrink)

    def decoded(self, number: int, keep: bool) -> np.ndarray:
        """Decode one tile of the file, u8 [h, w, 3].

        `keep`: a neighbouring cell will need it too. A tile that is not kept lies in memory that the thread's next
        tile
        overwrites: without fresh pages, decoding takes nine tenths of the time.
        """
        with self._lock:
            tile = self._cache.pop(number, None)
            if tile is not None:
                self._cache[number] = tile
                return tile
        count = self._counts[number]
        if count > self._slide.file_bytes:
            raise _UndecodedError(f"tile {number} has {count} bytes, more than the file")
        data = os.pread(self._file, count, self._offsets[number]) if count else b""
        tile = self._decode(data, None if keep else self._buffer())
        if tile.shape != (self._tile[1], self._tile[0], 3) or tile.dtype != np.uint8:
            raise _UndecodedError(f"tile {number} is {tile.dtype} {tile.shape}")
        if keep:
            with self._lock:
                self._cache[number] = tile
                while len(self._cache) * tile.nbytes > CACHE_BYTES:
                    self._cache.popitem(last=False)
        return tile

    def _buffer(self) -> np.ndarray:
        if not hasattr(self._scratch, "tile"):
            self._scratch.tile = np.empty((self._tile[1], self._tile[0], 3), np.uint8)
        return self._scratch.tile

    def _decode(self, data: bytes, buffer: np.ndarray | None) -> np.ndarray:
        if not data:
            raise _UndecodedError("the tile is missing")
        if not self._jpeg_head:
            if not data.rstrip(b"\0").endswith(EOC):
                raise SlideError(f"{self._slide.path}: a JPEG 2000 tile is truncated.", "Download the file again.")
            return imagecodecs.jpeg2k_decode(data)
        if data[:2] != SOI:
            raise _UndecodedError("the tile is not a JPEG stream")
        return simplejpeg.decode_jpeg(self._jpeg_head + data[2:], colorspace="RGB", buffer=buffer)


def _jpeg_head(tables: bytes | None, rgb: bool) -> bytes:
    """Build the prefix of a tile's data: the tables, and an Adobe marker that states the colours, as TIFF does."""
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x00" if rgb else b"\x01")
    return SOI + adobe + (tables[2:-2] if tables else b"")


class _UndecodedError(Exception):
    """A tile that OpenSlide must read."""


def choose_reader(slide: Slide, corners_px: Sequence[tuple[int, int]]) -> Reader:
    """Return the raw-tile reader if the file allows it and it gives OpenSlide's pixels, else OpenSlide.

    Args:
        slide: The slide.
        corners_px: Level-0 corners of tiles of tissue; pixels are compared at some of them, spread over all.
    """
    reference = OpenSlideReader(slide)
    try:
        raw = RawTileReader(slide)
    except DataError as error:
        logger.debug("%s OpenSlide reads it instead.", error)
        return reference
    compared = 0
    for i in np.unique(np.linspace(0, len(corners_px) - 1, MOST_PROBES).astype(int)):
        same = _same_pixels(raw, reference, *corners_px[i])
        if same is False:
            logger.info("%s: raw tiles differ from OpenSlide's pixels; OpenSlide reads it instead.", slide.path)
            raw.close()
            return reference
        compared += bool(same)
        if compared == ENOUGH_PROBES:
            break
    if compared:
        return raw
    logger.info("%s: no raw tile could be compared; OpenSlide reads it instead.", slide.path)
    raw.close()
    return reference


def _same_pixels(raw: RawTileReader, reference: OpenSlideReader, x_px: int, y_px: int) -> bool | None:
    """Compare the pixels of both readers; None: OpenSlide fails, or the raw tiles do not decode."""
    place = (x_px, y_px, CHECK_PX, CHECK_PX)
    try:
        return np.array_equal(raw.raw_region(*place), reference.region(*place))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - decoders raise errors of many kinds
        return None

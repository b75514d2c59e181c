"""Whole-slide images. The only module that calls OpenSlide."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from cfusion.errors import DataError, ResolutionError, SlideError
from preprocess.names import SLIDE_SUFFIXES, files_below, plain_name
from preprocess.resolution import Resolution, resolve
from preprocess.slide_headers import first_of_series, is_dicom, slide_series, tiff_is_cut_short

logger = logging.getLogger(__name__)

MAX_BLOCK_PX = 2048
"""Side of the blocks in which an overview is read; bounds memory on a slide with one level."""

MIN_BLOCK_PX = 256
"""Minimum size of a block that is split because it cannot be read."""

FILL_SIDE = 32
"""Side, in px of the overview, of the squares that are read from a finer level."""

FILL_PROBES = 8
"""Pixels of level 0 that are looked at before such a square is read."""

MAX_SPLITS = 400
"""Maximum number of blocks split per overview; a slide with more broken blocks is not worth the reads."""


class Slide:
    """An open slide. Reading is thread-safe.

    Attributes:
        path: The file.
        file_bytes: Its size.
        modified_ns: When it was last changed.
        header_digest: Digest of its properties and of both ends of the file.
        slide_id: The slide's name everywhere else, see `slide_id_of`.
        size_px: Width and height of level 0.
        level_sizes_px: Width and height of each level.
        downsamples: Level-0 pixels per pixel of each level, as floats.
        background: RGB of areas that were not scanned.
        resolution: µm per level-0 pixel and its source.
        quickhash: OpenSlide's digest of the slide's tile data or metadata; empty if it has none.
    """

    def __init__(self, path: Path, mpp_table: Mapping[str, float], default_mpp: float | None) -> None:
        self.path = path
        self.slide_id = slide_id_of(path)
        self._lock = threading.Lock()
        self._handle = _open(path)
        self.file_bytes, self.modified_ns = path.stat().st_size, path.stat().st_mtime_ns
        properties = dict(self._handle.properties)
        self.size_px: tuple[int, int] = self._handle.dimensions
        self.level_sizes_px: tuple[tuple[int, int], ...] = self._handle.level_dimensions
        self.downsamples: tuple[float, ...] = self._handle.level_downsamples
        self.background = _background(properties)
        self.quickhash = properties.get("openslide.quickhash-1", "")
        self.vendor = properties.get("openslide.vendor", "")
        self.header_digest = _header_digest(path, properties)
        try:
            _check_tiles(path, properties)
            self.resolution: Resolution = resolve(self.slide_id, properties, mpp_table, default_mpp)
        except DataError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._handle.close()

    def read_rgba(self, x_px: int, y_px: int, width_px: int, height_px: int, level: int = 0) -> np.ndarray:
        """Read a region as u8 [height, width, 4]; alpha is 0 where the slide has no pixels.

        Args:
            x_px: Left edge in level-0 px.
            y_px: Upper edge in level-0 px.
            width_px: Width in px of `level`.
            height_px: Height in px of `level`.
            level: Pyramid level.

        Raises:
            SlideError: The region cannot be decoded. The slide stays usable.
        """
        place = (x_px, y_px), level, (width_px, height_px)
        handle = self._handle
        try:
            return np.asarray(handle.read_region(*place))
        except openslide.OpenSlideError:
            self._replace(handle)
        # After one error a handle fails every request, including those of other threads; a fresh handle shows which
        # region is at fault.
        with _open(self.path) as own:
            try:
                return np.asarray(own.read_region(*place))
            except openslide.OpenSlideError as error:
                raise SlideError(f"{self.path}: the region at {x_px}, {y_px} cannot be read ({error}).") from error

    def _replace(self, spoilt: openslide.OpenSlide) -> None:
        with self._lock:
            if self._handle is spoilt:
                self._handle = _open(self.path)

    def composite(self, rgba: np.ndarray) -> np.ndarray:
        """Read a region as RGB, u8 [h, w, 3], on the slide's background colour."""
        alpha = rgba[..., 3]
        if alpha.min() == 255:
            return np.ascontiguousarray(rgba[..., :3])
        weight = alpha[..., None].astype(np.uint16)
        mixed = rgba[..., :3] * weight + np.asarray(self.background, np.uint16) * (255 - weight)
        return ((mixed + 127) // 255).astype(np.uint8)

    def overview(self, um_px: float = 8.0) -> Overview:
        """Read the entire slide at about `um_px` µm per pixel, from the coarsest level that is fine enough."""
        step = max(1.0, um_px / self.resolution.mpp)
        fine_enough = [i for i, d in enumerate(self.downsamples) if d <= step * 1.001]
        level = max(fine_enough, key=lambda i: self.downsamples[i], default=0)
        width, height = (max(1, math.ceil(side / step)) for side in self.size_px)
        overview = _read_overview(self, level, width, height)
        _fill_from_finer(self, level, overview)
        return overview


class Overview:
    """A small picture of an entire slide.

    Attributes:
        rgb: u8 [h, w, 3], on the background colour.
        scanned: bool [h, w], true where the slide has pixels.
        unread: bool [h, w], true where the chosen level cannot be decoded.
        filled: bool [h, w], true where a finer level was read instead.
        px_level0: Level-0 px per pixel of the overview, in x and y.
    """

    def __init__(
        self,
        rgb: np.ndarray,
        scanned: np.ndarray,
        unread: np.ndarray,
        px_level0: tuple[float, float],
    ) -> None:
        self.rgb, self.scanned, self.unread, self.px_level0 = rgb, scanned, unread, px_level0
        self.filled = np.zeros_like(unread)

    @property
    def lost(self) -> np.ndarray:
        """Where no level can be decoded, bool [h, w]."""
        return self.unread & ~self.filled


def open_slide(path: Path, mpp_table: Mapping[str, float] | None = None, default_mpp: float | None = None) -> Slide:
    """Open a slide and find its resolution.

    Raises:
        SlideError: OpenSlide cannot read the file, or no source gives its resolution.
    """
    return Slide(path, mpp_table or {}, default_mpp)


def find_slides(root: Path) -> list[Path]:
    """List the slides in a folder and its subfolders, sorted; the path of a slide gives that slide.

    Listed is every file that looks like a slide, dangling links and unreadable folders too, so that nothing is lost
    without a word. Links to folders are followed, and no folder is searched twice. The DICOM files of one series are
    the levels of one slide, so only the first is listed.

    Raises:
        SlideError: The path does not exist, or no file looks like a slide.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise SlideError(f"{root}: no such file or folder.", "Give a slide, or a folder of slides.")
    found = sorted(p for p in files_below(root) if p.is_dir() or p.suffix.lower() in SLIDE_SUFFIXES or is_dicom(p))
    found = [p for p in found if p.is_dir() or not is_dicom(p) or p == first_of_series(p)]
    if not found:
        raise SlideError(f"{root}: contains no slides.", f"Looked for {' '.join(SLIDE_SUFFIXES)}.")
    return found


def slide_id_of(path: Path) -> str:
    """Return a slide's name: its file's stem.

    A slide in DICOM is a folder of files, and has the folder's name; several in one folder have the names of their
    first files.
    """
    if not is_dicom(path):
        return plain_name(path.stem)
    folder = Path(os.path.abspath(path)).parent  # noqa: PTH100 - resolve() would follow links
    series = slide_series(folder)
    if path.name in series and len(set(series.values())) == 1:
        return plain_name(folder.name)
    first = first_of_series(path)
    return plain_name(first.stem if first.suffix.lower() == ".dcm" else first.name)


def same_name(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Find the slide ids that more than one file has, with those files."""
    by_id: dict[str, list[Path]] = {}
    for path in paths:
        by_id.setdefault(slide_id_of(path), []).append(path)
    return {slide_id: files for slide_id, files in by_id.items() if len(files) > 1}


@dataclass(frozen=True)
class SlideGeometry:
    """What features need to know of a slide.

    Attributes:
        path: The file.
        size_px: Width and height of level 0.
        quickhash: See `Slide`.
        resolution: See `Slide`; None if it is not known.
        unknown: Why it is not known.
    """

    path: Path
    size_px: tuple[int, int]
    quickhash: str
    resolution: Resolution | None
    unknown: ResolutionError | None = None

    @classmethod
    def of(cls, path: Path, mpp_table: Mapping[str, float], default_mpp: float | None) -> SlideGeometry:
        """Read it from a slide.

        Raises:
            SlideError: OpenSlide cannot read the file.
        """
        with _open(path) as handle:
            properties, size = dict(handle.properties), handle.dimensions
        quickhash = properties.get("openslide.quickhash-1", "")
        try:
            return cls(path, size, quickhash, resolve(slide_id_of(path), properties, mpp_table, default_mpp))
        except ResolutionError as error:
            return cls(path, size, quickhash, None, error)

    def known_resolution(self) -> Resolution:
        """Return the resolution.

        Raises:
            ResolutionError: It is not known.
        """
        if self.resolution is None:
            raise self.unknown or ResolutionError(f"{self.path}: its resolution is unknown.")
        return self.resolution


MAX_TILE_PIXELS = 1 << 26
"""Pixels of the largest tile that is read; usual tiles have 2¹⁶ to 2²⁰."""

HEADER_BYTES = 64 << 10
"""Bytes at either end of a file that its header digest covers."""


def _header_digest(path: Path, properties: Mapping[str, str]) -> str:
    """Compute the SHA-256 of a slide's properties and of both ends of its file, where TIFF keeps its directories."""
    digest = hashlib.sha256(json.dumps(properties, sort_keys=True).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(HEADER_BYTES))
        stream.seek(max(0, path.stat().st_size - HEADER_BYTES))
        digest.update(stream.read(HEADER_BYTES))
    return digest.hexdigest()


def _check_file(path: Path) -> None:
    """Refuse what is no file with content.

    Raises:
        SlideError: It is missing, empty, or cannot be opened.
    """
    if path.is_symlink() and not path.exists():
        raise SlideError(f"{path}: links to {path.readlink()}, which does not exist.", "Mend the link.")
    if path.is_dir():
        raise SlideError(f"{path}: this folder cannot be read.", "Check its permissions.")
    if not path.is_file():
        raise SlideError(f"{path}: no such slide.")
    try:
        with path.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise SlideError(f"{path}: cannot be opened ({error.strerror}).", "Check its permissions.") from None
    if empty:
        raise SlideError(f"{path}: the slide is damaged or truncated (the file is empty).", "Download the file again.")


def _open(path: Path) -> openslide.OpenSlide:
    """Open a file with OpenSlide, and tell its refusals apart."""
    _check_file(path)
    again = "Download the file again."
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        if tiff_is_cut_short(path):
            raise SlideError(
                f"{path}: the slide is cut short: a directory, or its content, is past the end of the file.",
                again,
            ) from error
        raise SlideError(f"{path}: OpenSlide does not know this format.", "Convert it to a pyramidal TIFF.") from error
    except openslide.OpenSlideError as error:
        if "nsupported" in str(error):
            raise SlideError(
                f"{path}: OpenSlide does not read this kind of the format ({error}); the file is not damaged.",
                "Convert it to a pyramidal TIFF with JPEG tiles.",
            ) from error
        raise SlideError(f"{path}: the slide is damaged or truncated ({error}).", again) from error
    except Exception as error:  # names that the library does not take, for example
        raise SlideError(f"{path}: cannot be opened ({error}).", "Check the file and its name.") from error


def _check_tiles(path: Path, properties: Mapping[str, str]) -> None:
    """Refuse tiles of an impossible size: OpenSlide ends the process if it cannot get the memory for one.

    Raises:
        SlideError: A level has such tiles.
    """
    for level in range(int(properties.get("openslide.level-count", 0))):
        sides = [properties.get(f"openslide.level[{level}].tile-{side}", "1") for side in ("width", "height")]
        if int(sides[0]) * int(sides[1]) > MAX_TILE_PIXELS:
            raise SlideError(
                f"{path}: the slide is damaged: level {level} has tiles of {' × '.join(sides)} px.",
                "Download the file again.",
            )


def _background(properties: Mapping[str, str]) -> tuple[int, int, int]:
    text = properties.get("openslide.background-color", "FFFFFF")
    try:
        return int(text[0:2], 16), int(text[2:4], 16), int(text[4:6], 16)
    except ValueError:
        return 255, 255, 255


def _read_overview(slide: Slide, level: int, width: int, height: int) -> Overview:
    level_width, level_height = slide.level_sizes_px[level]
    overview = Overview(
        np.empty((height, width, 3), np.uint8),
        np.zeros((height, width), bool),
        np.zeros((height, width), bool),
        (slide.size_px[0] / width, slide.size_px[1] / height),
    )
    fx, fy = level_width / width, level_height / height
    side = max(1, int(MAX_BLOCK_PX / max(fx, fy)))
    blocks = [
        (left, top, min(left + side, width), min(top + side, height))
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    splits = MAX_SPLITS
    while blocks:
        left, top, right, bottom = block = blocks.pop()
        try:
            _read_block(slide, level, (fx, fy), block, overview)
        except DataError as error:
            # A block with a broken tile is read in quarters, so that only the tile is lost.
            if splits and max((right - left) * fx, (bottom - top) * fy) > MIN_BLOCK_PX:
                splits -= 1
                x, y = (left + right + 1) // 2, (top + bottom + 1) // 2
                quarters = [(a, c, b, d) for a, b in ((left, x), (x, right)) for c, d in ((top, y), (y, bottom))]
                blocks += [q for q in quarters if q[0] < q[2] and q[1] < q[3]]
                continue
            logger.warning("%s", error)
            overview.rgb[top:bottom, left:right] = slide.background
            overview.unread[top:bottom, left:right] = True
    return overview


def _fill_from_finer(slide: Slide, level: int, overview: Overview) -> None:
    """Read from finer levels what an overview's level lacks: level 0 decides what is on a slide.

    A coarse level can have holes where level 0 has pixels, and tiles that cannot be decoded. Squares with such pixels
    are read from the next finer level; holes only where a probe of level 0 finds a pixel.
    """
    height, width = overview.scanned.shape
    down = slide.downsamples
    finer = sorted((i for i in range(len(down)) if down[i] < down[level]), key=lambda i: -down[i])
    for top in range(0, height, FILL_SIDE):
        for left in range(0, width, FILL_SIDE):
            square = (left, top, min(left + FILL_SIDE, width), min(top + FILL_SIDE, height))
            rows, columns = slice(top, square[3]), slice(left, square[2])
            lost, scanned = overview.lost[rows, columns], overview.scanned[rows, columns]
            lacks = lost | ~scanned
            if not lacks.any() or not (lost.any() or _has_pixels(slide, overview, left, top, lacks)):
                continue
            for other in finer:
                _fill_square(slide, other, square, overview)
                if not (overview.lost[rows, columns] | ~overview.scanned[rows, columns]).any():
                    break


def _has_pixels(slide: Slide, overview: Overview, left: int, top: int, lacks: np.ndarray) -> bool:
    """Return whether level 0 has pixels at some of the places, relative to (left, top), that an overview lacks."""
    places = np.argwhere(lacks)[:: max(1, lacks.sum() // FILL_PROBES)]
    for row, column in places.tolist():
        x, y = ((at + 0.5) * px for at, px in zip((left + column, top + row), overview.px_level0, strict=True))
        try:
            if slide.read_rgba(int(x), int(y), 1, 1)[..., 3].any():
                return True
        except DataError:
            return True
    return False


def _fill_square(slide: Slide, level: int, square: tuple[int, int, int, int], overview: Overview) -> None:
    """Read a square (left, top, right, bottom) of an overview from `level`, and take what the overview lacks."""
    left, top, right, bottom = square
    height, width = overview.scanned.shape
    shape = (bottom - top, right - left)
    piece = Overview(np.empty((*shape, 3), np.uint8), np.zeros(shape, bool), np.zeros(shape, bool), overview.px_level0)
    factor = (slide.level_sizes_px[level][0] / width, slide.level_sizes_px[level][1] / height)
    try:
        _read_block(slide, level, factor, square, piece, (left, top))
    except DataError:
        return
    rows, columns = slice(top, bottom), slice(left, right)
    take = piece.scanned & (overview.lost[rows, columns] | ~overview.scanned[rows, columns])
    overview.rgb[rows, columns][take] = piece.rgb[take]
    overview.scanned[rows, columns][take] = True
    # What this level can decode, also as not scanned, is not lost.
    overview.filled[rows, columns] = True


def _read_block(
    slide: Slide,
    level: int,
    factor: tuple[float, float],
    block: tuple[int, int, int, int],
    overview: Overview,
    origin: tuple[int, int] = (0, 0),
) -> None:
    """Read the pixels `block` (left, top, right, bottom) of an overview that begins at `origin`.

    `factor` px of `level` make one.
    """
    (left, top, right, bottom), (fx, fy) = block, factor
    x0, y0 = math.floor(left * fx), math.floor(top * fy)
    x1, y1 = math.ceil(right * fx), math.ceil(bottom * fy)
    down = slide.downsamples[level]
    rgba = slide.read_rgba(round(x0 * down), round(y0 * down), x1 - x0, y1 - y0, level)
    box = (left * fx - x0, top * fy - y0, min(right * fx, x1) - x0, min(bottom * fy, y1) - y0)
    size = (right - left, bottom - top)
    picture = Image.fromarray(slide.composite(rgba)).resize(size, Image.Resampling.BOX, box)
    alpha = Image.fromarray(np.ascontiguousarray(rgba[..., 3])).resize(size, Image.Resampling.BOX, box)
    rows, columns = slice(top - origin[1], bottom - origin[1]), slice(left - origin[0], right - origin[0])
    overview.rgb[rows, columns] = np.asarray(picture)
    overview.scanned[rows, columns] = np.asarray(alpha) > 127

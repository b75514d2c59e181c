"""Whole-slide images. The only module that calls OpenSlide."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide

from cfusion.errors import DataError, MissingExtraError, ResolutionError, SlideError
from preprocess.dicom_slides import DicomSlide
from preprocess.resolution import Resolution, resolve
from preprocess.slide_files import slide_id_of
from preprocess.slide_headers import impossible_tile, is_dicom, tiff_is_cut_short


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

    def _replace(self, spoilt: openslide.AbstractSlide) -> None:
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


def _open(path: Path) -> openslide.AbstractSlide:
    """Open a file with OpenSlide, or, if that does not read a DICOM file, with wsidicom; tell refusals apart."""
    _check_file(path)
    again = "Download the file again."
    # OpenSlide ends the process if it cannot get the memory for a tile.
    if wrong := impossible_tile(path):
        raise SlideError(f"{path}: the slide is damaged: {wrong}.", again)
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
        if is_dicom(path):
            return _open_dicom(path, error)
        if "nsupported" in str(error):
            raise SlideError(
                f"{path}: OpenSlide does not read this kind of the format ({error}); the file is not damaged.",
                "Convert it to a pyramidal TIFF with JPEG tiles.",
            ) from error
        raise SlideError(f"{path}: the slide is damaged or truncated ({error}).", again) from error
    except Exception as error:  # names that the library does not take, for example
        raise SlideError(f"{path}: cannot be opened ({error}).", "Check the file and its name.") from error


def _open_dicom(path: Path, refusal: openslide.OpenSlideError) -> openslide.AbstractSlide:
    """Open a DICOM slide that OpenSlide refuses.

    Raises:
        SlideError: It is damaged, or wsidicom, which might read it, is not installed.
    """
    try:
        return DicomSlide(path)
    except MissingExtraError as error:
        raise SlideError(f"{path}: OpenSlide does not read this DICOM file ({refusal}).", error.remedy) from error
    except openslide.OpenSlideError as error:
        raise SlideError(
            f"{path}: the slide is damaged or truncated ({refusal}; {error}).", "Download the file again."
        ) from error


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

"""Find the slides in a folder, record the damaged ones, and keep recently used ones open."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cfusion.errors import DataError
from preprocess.deepzoom import DeepZoom
from preprocess.slide_files import find_slides, slide_id_of
from preprocess.slides import open_slide

logger = logging.getLogger(__name__)

MAX_OPEN = 8
"""Maximum number of idle slides kept open; each has OpenSlide's cache of decoded tiles, 32 MiB."""

ANY_MPP = 0.25
"""µm/px used to open a slide of unknown resolution; never shown as the resolution of the slide."""


class UnknownSlideError(DataError):
    """The requested slide, tile or score is not served."""


class SlideGoneError(DataError):
    """A slide was deleted after the viewer started."""


@dataclass(frozen=True)
class ServedSlide:
    """A slide of the served folder.

    Attributes:
        key: Identifies it in addresses; a digest, so that no address contains a path.
        slide_id: Its name in stores, explanations and runs.
        name: Path relative to the folder.
        path: Path of the file.
    """

    key: str
    slide_id: str
    name: str
    path: Path


class SlideFolder:
    """The slides at a path.

    Args:
        root: A slide, or a folder of slides.
        default_mpp: µm/px of slides whose files do not state it.

    Raises:
        DataError: `root` does not exist, contains no slide, or is a slide that cannot be opened.
    """

    def __init__(self, root: Path, default_mpp: float | None = None) -> None:
        self.root = root.parent if root.is_file() else root
        # `root` itself may be a link; links in the folder must not lead out of it.
        self._within = root.resolve().parent if root.is_file() else root.resolve()
        self.default_mpp = default_mpp
        names = ((path, path.relative_to(self.root).as_posix()) for path in find_slides(root))
        slides = [ServedSlide(_key(name), slide_id_of(path), name, path) for path, name in names]
        self.slides = {slide.key: slide for slide in slides}
        self._damage: dict[str, str] = {}
        self._unprobed = set(self.slides)
        self._preparing: set[str] = set()
        self._lock = threading.Lock()
        self._open = OpenSlides(self._opened, MAX_OPEN)
        if root.is_file():  # a folder can still show its other slides; a single damaged slide leaves nothing to show
            self._opened(root).close()

    @property
    def probing(self) -> bool:
        """Whether some slides have not been checked yet."""
        return bool(self._unprobed)

    def start_probe(self) -> None:
        """Check in a background thread whether every slide can be opened; thousands of slides take minutes."""
        threading.Thread(target=self._probe, name="probe", daemon=True).start()

    def _probe(self) -> None:
        for slide in self.slides.values():
            with contextlib.suppress(DataError, OSError):
                self._opened(slide.path).close()
            self._unprobed.discard(slide.key)

    def get(self, key: str) -> ServedSlide:
        """Return the slide with this key.

        Raises:
            UnknownSlideError: There is no such slide.
        """
        if key not in self.slides:
            raise UnknownSlideError("No slide has this address.", "Choose one from the list.")
        return self.slides[key]

    def trouble(self, slide: ServedSlide) -> str | None:
        """Return why a slide cannot be shown; None if no problem is known."""
        return self._damage.get(slide.key) if slide.path.exists() else "the file no longer exists"

    @contextlib.contextmanager
    def lease(self, slide: ServedSlide) -> Iterator[DeepZoom]:
        """Open a slide and keep it open while the block runs.

        Raises:
            SlideGoneError: The file no longer exists.
            DataError: The slide is damaged, or is outside the served folder.
        """
        try:
            with self._open.lease(slide.path) as zoom:
                yield zoom
        except DataError as error:
            if isinstance(error, UnknownSlideError) or slide.path.exists():
                raise
            raise gone(slide.path) from error

    def prepare(self, slide: ServedSlide, zoom: DeepZoom) -> bool:
        """Return whether all pictures of a slide can be drawn; if not, start the preparation in a thread."""
        if zoom.is_ready:
            return True
        with self._lock:
            if slide.key not in self._preparing:
                self._preparing.add(slide.key)
                threading.Thread(target=self._prepare, args=(slide,), name="prepare", daemon=True).start()
        return False

    def _prepare(self, slide: ServedSlide) -> None:
        try:
            with self.lease(slide) as zoom:
                zoom.prepare()
        except DataError as error:
            self._damage[slide.key] = str(error)
        finally:
            self._preparing.discard(slide.key)

    def mpp(self, zoom: DeepZoom) -> float | None:
        """Return the µm per level-0 px given by the slide or the user; None if it is unknown."""
        resolution = zoom.slide.resolution
        return resolution.mpp if resolution.source != "default" or self.default_mpp is not None else None

    def close(self) -> None:
        """Close all slides."""
        self._open.close()

    def _opened(self, path: Path) -> DeepZoom:
        key = _key(path.relative_to(self.root).as_posix())
        try:
            if not path.resolve().is_relative_to(self._within):  # checked at every opening: links can change
                raise DataError(
                    f"{path.name}: is a link that leads out of the served folder.", "Open the target folder instead."
                )
            zoom = DeepZoom(open_slide(path, default_mpp=self.default_mpp or ANY_MPP))
        except DataError as error:
            message = error.message.replace(f"{self.root}/", "")
            self._damage[key] = f"{message} {error.remedy}".strip()
            raise DataError(message, error.remedy, topic=error.topic) from error
        self._damage.pop(key, None)
        return zoom


@dataclass
class _CachedSlide:
    stamp: tuple[int, ...]
    users: int = 0
    retired: bool = False
    zoom: DeepZoom | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class OpenSlides:
    """Keeps recently used slides open; a slide in use is never closed.

    Args:
        opener: Opens the slide at a path.
        limit: Maximum number of open slides that are not in use.
    """

    def __init__(self, opener: Callable[[Path], DeepZoom], limit: int) -> None:
        self._opener = opener
        self._limit = limit
        self._entries: OrderedDict[Path, _CachedSlide] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @contextlib.contextmanager
    def lease(self, path: Path) -> Iterator[DeepZoom]:
        """Open the slide at `path` while the block runs; open it again if its file has changed.

        Raises:
            SlideGoneError: The file does not exist.
            DataError: The slide cannot be opened.
        """
        entry = self._enter(path)
        try:
            with entry.lock:
                if entry.zoom is None:
                    entry.zoom = self._opener(path)
            yield entry.zoom
        finally:
            self._leave(entry)

    def close(self) -> None:
        """Close all slides; those in use are closed by their last reader."""
        with self._lock:
            for path in list(self._entries):
                self._retire(path)

    def _enter(self, path: Path) -> _CachedSlide:
        stamp = stamp_of(path)
        with self._lock:
            if path in self._entries and (stamp is None or self._entries[path].stamp != stamp):
                self._retire(path)
            if stamp is None:
                raise gone(path)
            entry = self._entries.setdefault(path, _CachedSlide(stamp))
            self._entries.move_to_end(path)
            entry.users += 1
            for other in [p for p, e in self._entries.items() if not e.users][: max(0, len(self) - self._limit)]:
                self._retire(other)
            return entry

    def _leave(self, entry: _CachedSlide) -> None:
        with self._lock:
            entry.users -= 1
            if entry.retired and not entry.users and entry.zoom is not None:
                entry.zoom.close()

    def _retire(self, path: Path) -> None:
        entry = self._entries.pop(path)
        entry.retired = True
        if not entry.users and entry.zoom is not None:
            entry.zoom.close()


def gone(path: Path) -> SlideGoneError:
    """Return the error for a slide whose file no longer exists."""
    return SlideGoneError(
        f"{path.name}: the file no longer exists.", "Restore it, or choose another slide.", topic="slide"
    )


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """Return a value that changes when the file is replaced; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]

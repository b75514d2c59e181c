"""The slides that are served: which there are, which are damaged, and which are open."""

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
from preprocess.slides import find_slides, open_slide, slide_id_of

logger = logging.getLogger(__name__)

MAX_OPEN = 8
"""Slides held open; each holds OpenSlide's cache of decoded tiles, 32 MiB."""

ANY_MPP = 0.25
"""µm/px with which a slide opens that tells none; it is never shown as the slide's own."""


class UnknownSlideError(DataError):
    """A slide, tile or score that is not among those served."""


class SlideGoneError(DataError):
    """A slide that was there when the viewer started, and is no longer."""


@dataclass(frozen=True)
class ServedSlide:
    """A slide of the served folder.

    Attributes:
        key: Names it in addresses; a digest, so that no address holds a path.
        slide_id: Its name in stores, explanations and runs.
        name: Its path within the folder.
        path: Its file.
    """

    key: str
    slide_id: str
    name: str
    path: Path


class SlideFolder:
    """The slides under one file or folder.

    Args:
        root: A slide, or a folder of slides.
        default_mpp: µm/px of slides whose files tell none.

    Raises:
        DataError: Nothing is at `root`, or it holds no slide, or the one that was named cannot be opened.
    """

    def __init__(self, root: Path, default_mpp: float | None = None) -> None:
        self.root = root.parent if root.is_file() else root
        # A link that the user names is followed; one that lies in the folder may not lead out of it.
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
        if root.is_file():  # of a folder the others can be shown; of one slide nothing is left
            self._opened(root).close()

    @property
    def probing(self) -> bool:
        """Whether some slides have not been tried yet."""
        return bool(self._unprobed)

    def start_probe(self) -> None:
        """Try to open every slide, in a thread of its own: a folder of thousands takes minutes."""
        threading.Thread(target=self._probe, name="probe", daemon=True).start()

    def _probe(self) -> None:
        for slide in self.slides.values():
            with contextlib.suppress(DataError, OSError):
                self._opened(slide.path).close()
            self._unprobed.discard(slide.key)

    def get(self, key: str) -> ServedSlide:
        """The slide of this key.

        Raises:
            UnknownSlideError: None has it.
        """
        if key not in self.slides:
            raise UnknownSlideError("No slide has this address.", "Choose one from the list.")
        return self.slides[key]

    def trouble(self, slide: ServedSlide) -> str | None:
        """Why a slide cannot be shown; None where nothing is known against it."""
        return self._damage.get(slide.key) if slide.path.exists() else "it is no longer there"

    @contextlib.contextmanager
    def lease(self, slide: ServedSlide) -> Iterator[DeepZoom]:
        """The open slide; it stays open while the block runs.

        Raises:
            SlideGoneError: Its file is no longer there.
            DataError: It is damaged, or lies outside the served folder.
        """
        try:
            with self._open.lease(slide.path) as zoom:
                yield zoom
        except DataError as error:
            if isinstance(error, UnknownSlideError) or slide.path.exists():
                raise
            raise gone(slide.path) from error

    def prepare(self, slide: ServedSlide, zoom: DeepZoom) -> bool:
        """Whether all pictures of a slide can be drawn; what that needs is otherwise started in a thread."""
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
        """µm per level-0 px, where the slide or the user tells it."""
        resolution = zoom.slide.resolution
        return resolution.mpp if resolution.source != "default" or self.default_mpp is not None else None

    def close(self) -> None:
        """Close all slides."""
        self._open.close()

    def _opened(self, path: Path) -> DeepZoom:
        key = _key(path.relative_to(self.root).as_posix())
        try:
            if not path.resolve().is_relative_to(self._within):  # each time: a link may be changed after the start
                raise DataError(
                    f"{path.name}: is a link that leads out of the served folder.", "View the folder it leads to."
                )
            zoom = DeepZoom(open_slide(path, default_mpp=self.default_mpp or ANY_MPP))
        except DataError as error:
            told = error.message.replace(f"{self.root}/", "")
            self._damage[key] = f"{told} {error.remedy}".strip()
            raise DataError(told, error.remedy, topic=error.topic) from error
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
    """Slides held open, at most so many; one in use is never closed under its reader.

    Args:
        opener: Opens the slide at a path.
        limit: Slides that stay open while nobody reads them.
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
        """The slide at `path`, opened again where its file has changed.

        Raises:
            SlideGoneError: There is no such file.
            DataError: It cannot be opened.
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
    """The error of a slide whose file is no longer there."""
    return SlideGoneError(
        f"{path.name}: the slide is no longer there.", "Put it back, or choose another.", topic="slide"
    )


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]

"""Cache pictures of slides as JPEG, up to a memory limit."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable

from PIL import Image

JPEG_QUALITY = 85


class PictureCache:
    """The most recently used pictures, up to a number of bytes. Thread-safe.

    Args:
        limit_bytes: Maximum size of all pictures together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._pictures: OrderedDict[tuple[object, ...], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def jpeg(self, key: tuple[object, ...], make: Callable[[], Image.Image]) -> bytes:
        """Return the picture of a key, and draw it with `make` if it is not cached; two threads may draw the same."""
        with self._lock:
            held = self._pictures.get(key)
            if held is not None:
                self._pictures.move_to_end(key)
                return held
        buffer = io.BytesIO()
        make().save(buffer, "JPEG", quality=JPEG_QUALITY)
        picture = buffer.getvalue()
        with self._lock:
            self.held_bytes += len(picture) - len(self._pictures.pop(key, b""))
            self._pictures[key] = picture
            while self.held_bytes > self.limit_bytes:
                self.held_bytes -= len(self._pictures.popitem(last=False)[1])
        return picture

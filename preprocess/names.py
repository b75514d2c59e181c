"""Files of slides and features, and their names: one spelling for tables, masks, features and slides."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from cfusion.types import SLIDE_SUFFIXES


def plain_name(name: str) -> str:
    """Return a name in Unicode's composed form: macOS writes `é` as two characters, tables as one."""
    return unicodedata.normalize("NFC", name)


def without_suffix(name: str, suffixes: Iterable[str] = SLIDE_SUFFIXES) -> str:
    """Return a name as a user writes it, composed and without the suffix of a slide."""
    name = plain_name(name.strip())
    return next((name[: -len(s)] for s in suffixes if name.lower().endswith(s) and len(name) > len(s)), name)


def files_below(root: Path) -> Iterator[Path]:
    """List the files of a folder and its subfolders, except hidden ones; and the folders that cannot be read."""
    searched: set[str] = set()
    unreadable: list[Path] = []
    walk = os.walk(root, followlinks=True, onerror=lambda error: unreadable.append(Path(error.filename)))
    for folder, subfolders, names in walk:
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if (real := os.path.realpath(folder)) in searched:
            subfolders.clear()
            continue
        searched.add(real)
        yield from (Path(folder, name) for name in names if not name.startswith("."))
    yield from unreadable

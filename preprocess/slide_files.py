"""Which files are slides, and the name of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cfusion.errors import SlideError
from cfusion.types import SLIDE_SUFFIXES
from preprocess.names import files_below, plain_name
from preprocess.slide_headers import first_of_series, is_dicom, slide_series


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

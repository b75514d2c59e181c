"""Embeddings of tiles in plain files, one file per slide, without coordinates."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from cfusion.errors import DataError, LayoutError
from cfusion.types import magnification_name
from preprocess.feature_files import opened
from preprocess.layouts import FeatureFile, Found, SourceFolder, read_plain, slide_name, stated_magnification
from preprocess.slide_embeddings import CHIEF_FOLDER, FOLDER

WITHOUT_PATCHES = "features of CLAM without its folder patches/, which states the size of a tile"
"""Why coordinates in `h5_files` cannot be used."""


def find_plain(source: SourceFolder) -> Found:
    """`{slide}.pt`, `.npy` or `.npz`: an array [N, d]; or `{slide}.h5` with `features` and no `coords`.

    The files lie in any folder. A folder whose name has a magnification as a word (`x20`, `uni_20x`) gives it to its
    files; otherwise the user does.

    Raises:
        LayoutError: All files are CLAM's `h5_files`, without its `patches`.
    """
    found, of_clam = Found(), None
    for path in source.files(".pt", ".npy", ".npz", ".h5"):
        folder = path.absolute().parent
        if folder.name.startswith(FOLDER) or CHIEF_FOLDER in (folder.name, folder.parent.name):
            continue
        try:
            if path.suffix.lower() == ".h5" and not _has_only_features(path):
                of_clam = path.parent if folder.name == "h5_files" else of_clam
                continue
        except DataError as error:
            found.refused.append((slide_name(path), path, error.message))
            continue
        name = _magnification(source, folder)
        found.files.append(FeatureFile(slide_name(path), name, None, partial(read_plain, path), (path,)))
    if of_clam and not found.files:
        raise LayoutError(f"{of_clam}: {WITHOUT_PATCHES}.", "Link the folder patches/ of the same run next to it.")
    return found if found.files else Found()


def _has_only_features(path: Path) -> bool:
    with opened(path) as file:
        return "features" in file and "coords" not in file


def _magnification(source: SourceFolder, folder: Path) -> str:
    """Return the magnification that the folder's name states, or the one above `pt_files`, or the user's."""
    named = folder if folder.name not in ("pt_files", "npy_files", "npz_files") else folder.parent
    stated = stated_magnification(named.name) or source.magnification
    return "" if stated is None else magnification_name(stated)

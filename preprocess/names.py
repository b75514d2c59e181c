"""Names of slides: one spelling for tables, masks, features and files."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

SLIDE_SUFFIXES = (
    ".bif", ".czi", ".dcm", ".i2syntax", ".isyntax", ".kfb", ".mrxs", ".ndpi", ".qptiff", ".scn", ".sdpc", ".svs",
    ".svslide", ".tif", ".tiff", ".tmap", ".vms", ".vmu", ".vsi",
)  # fmt: skip
"""Suffixes of files that look like slides. Those that OpenSlide cannot read are listed as failed."""


def plain_name(name: str) -> str:
    """Return a name in Unicode's composed form: macOS writes `é` as two characters, tables as one."""
    return unicodedata.normalize("NFC", name)


def without_suffix(name: str, suffixes: Iterable[str] = SLIDE_SUFFIXES) -> str:
    """Return a name as a user writes it, composed and without the suffix of a slide."""
    name = plain_name(name.strip())
    return next((name[: -len(s)] for s in suffixes if name.lower().endswith(s) and len(name) > len(s)), name)

"""Read names of patients and slides: TCGA barcodes, file names, and names that two tables write differently.

Two tables often write one name in two ways: in another case, with the `.0` of a number that a spreadsheet made a
float, or with the slide where the patient is meant. `Names` finds the one that is meant, if only one can be.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Literal

from cfusion.types import FEATURE_SUFFIXES, SLIDE_SUFFIXES

Tissue = Literal["diagnostic", "frozen", "normal"]
"""Kind of tissue on a TCGA slide."""

_BARCODE = re.compile(r"TCGA[-._]([A-Z0-9]{2})[-._]([A-Z0-9]{4})(?![A-Z0-9])", re.IGNORECASE)
_SAMPLE = re.compile(r"[-._](\d{2})[A-Z]?(?![A-Z0-9])", re.IGNORECASE)
_SLIDE_CODE = re.compile(r"[-._](DX|TS|MS|BS)[A-Z0-9]{0,2}(?![A-Z0-9])", re.IGNORECASE)
_EMBEDDED = (*FEATURE_SUFFIXES, ".zarr")
_FLOAT = re.compile(r"(\d+)\.0+")
_FROZEN = {"TS": "top", "MS": "middle", "BS": "bottom"}
"""TCGA codes of frozen sections, by their place in the sample; DX is a diagnostic slide."""


def patient_of(name: str) -> str:
    """Return the patient of a slide, sample or case name.

    A TCGA barcode gives its first 12 characters, in upper case and with hyphens. A whole number written as a float
    (`12.0`) gives the number. Any other name is returned as it is.
    """
    if barcode := _BARCODE.match(name):
        return f"TCGA-{barcode[1]}-{barcode[2]}".upper()
    number = _FLOAT.fullmatch(name)
    return number[1] if number else name


def has_barcode(name: str) -> bool:
    """Return whether a slide, sample or case name starts with a TCGA barcode, which identifies the patient."""
    return _BARCODE.match(name) is not None


def site_of(name: str) -> str | None:
    """Return the tissue source site in a TCGA barcode, such as `A6`; None for any other name."""
    barcode = _BARCODE.match(name)
    return barcode[1].upper() if barcode else None


def slide_stem(name: str) -> str:
    """Return the slide_id of a file name, without folder and suffix; other dots (TCGA's UUIDs) are kept.

    Features may keep the suffix of the slide: `a.svs.h5` is slide `a`. Accents are composed, as in the names of slides:
    macOS writes them as separate characters.
    """
    stem = re.split(r"[\\/]", name)[-1]
    for suffixes in (_EMBEDDED, SLIDE_SUFFIXES):
        stem = stem[: -len(_ending(stem, suffixes)) or None]
    return unicodedata.normalize("NFC", stem)


def is_slide_file(name: str) -> bool:
    """Return whether a file name ends as a slide or its embeddings do."""
    return bool(_ending(name, (*_EMBEDDED, *SLIDE_SUFFIXES)))


def _ending(name: str, suffixes: tuple[str, ...]) -> str:
    """Return the suffix that a name has, in any case; empty if it has none."""
    return next((suffix for suffix in suffixes if name.lower().endswith(suffix)), "")


def tissue_of(slide: str) -> tuple[Tissue, str]:
    """Return the kind of tissue of a slide and the words that say why, from the codes of its TCGA barcode.

    Sample types 10 to 19 are normal tissue and 20 to 29 controls; slides TS, MS and BS are frozen sections. A name
    without these codes is taken as a diagnostic slide of the tumour.
    """
    barcode = _BARCODE.match(slide)
    sample = _SAMPLE.match(slide, barcode.end()) if barcode else None
    if sample is None:
        return "diagnostic", ""
    kind = int(sample[1])
    if 10 <= kind < 30:
        return "normal", f"is of normal tissue or a control (TCGA sample type {kind})"
    code = _SLIDE_CODE.search(slide, sample.end())
    if code and code[1].upper() in _FROZEN:
        return "frozen", f"is a frozen section (TCGA slide {code[1].upper()}, {_FROZEN[code[1].upper()]} of the sample)"
    return "diagnostic", ""


class Names:
    """The names of one table, and what a name in another table means among them.

    Args:
        names: Name of each patient or slide, and what it stands for; a list of names stands for itself.
    """

    def __init__(self, names: Mapping[str, str] | Iterable[str]) -> None:
        self._exact = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
        self._folded: dict[str, set[str]] = {}
        for name, meant in self._exact.items():
            self._folded.setdefault(_folded(name), set()).add(meant)

    def find(self, name: str) -> str | None:
        """Return what a name means: written alike, or else in another case or as a float; None if that is not one."""
        if name in self._exact:
            return self._exact[name]
        found = self._folded.get(_folded(name), set())
        return next(iter(found)) if len(found) == 1 else None

    def nearest(self, name: str) -> str:
        """Return the name that is written most like another one, as words for a message; empty if none is close."""
        close = difflib.get_close_matches(_folded(name), self._folded, n=1, cutoff=0.6)
        if not close:
            return ""
        return f"; the nearest name is {min(known for known in self._exact if _folded(known) == close[0])}"


def alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return groups of different names that are written alike but for case, spaces or a decimal point."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(_folded(name), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _folded(name: str) -> str:
    stripped = unicodedata.normalize("NFC", name.strip())
    number = _FLOAT.fullmatch(stripped)
    return (number[1] if number else stripped).casefold()

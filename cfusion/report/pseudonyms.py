"""Names of patients and slides are replaced in a report that leaves the hospital."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from cfusion.files import write_text

BARCODE = re.compile(r"TCGA[-._][A-Z0-9]{2}[-._][A-Z0-9]{4}[-.\w]*", re.IGNORECASE)
"""A barcode of TCGA and what follows it in the name of a sample or slide."""

_TEXTS = (".html", ".md", ".csv", ".json")
_OTHER_NAMES = re.compile(r" \(to .*\)|, such as .*|; the nearest name is .*|; the features have .*")
"""Parts of findings that quote names of other tables."""


class Pseudonyms:
    """Replaces the names of patients and slides by numbers whose order says nothing about the names.

    Args:
        names: The names of patients and slides.
    """

    def __init__(self, names: Iterable[str]) -> None:
        ordered = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        self._by_name = {name: f"anonymous-{number:04d}" for number, name in enumerate(ordered, 1)}
        # A bare number is a name in a column of names, and a value anywhere else.
        words = sorted((name for name in self._by_name if not _is_number(name)), key=len, reverse=True)
        self._words = re.compile("|".join(map(re.escape, words))) if words else None

    def of_finding(self, finding: Mapping[str, Any], kept: Collection[str]) -> dict[str, Any]:
        """Return a finding of an audit without names; `kept` are the names of cohorts."""
        subject = str(finding["subject"])
        if subject not in kept and not subject.startswith("fold "):
            subject = self._by_name.get(subject, self.hide(subject))
        return {**finding, "subject": subject, "message": self.hide(_OTHER_NAMES.sub("", str(finding["message"])))}

    def hide(self, text: str) -> str:
        """Return a text without names and without barcodes."""
        if self._words is not None:
            text = self._words.sub(lambda match: self._by_name[match[0]], text)
        return BARCODE.sub("anonymous", text)

    def hide_in_folder(self, folder: Path) -> None:
        """Write the texts of a report again without names."""
        for path in sorted(folder.iterdir()):
            if path.suffix in _TEXTS:
                text = path.read_text(encoding="utf-8")
                hidden = self.hide(text)
                if hidden != text:
                    write_text(path, hidden)


def _is_number(name: str) -> bool:
    return re.fullmatch(r"[\d.]+|.{1,3}", name) is not None

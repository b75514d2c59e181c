"""Find the patient of a slide: one rule for training, predictions, explanations, the viewer and a served model.

1. The patient that a table names for the slide.
2. The patient of its TCGA barcode.
3. The known patient with the longest name that the slide's name starts with, up to a sign that is neither letter nor
   digit: `p-7` for `p-7-a` and `p-7_2`, not for `p-70-a`.
4. Otherwise the slide counts as a patient.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from cfusion.cohort.identifiers import Names, has_barcode, patient_of, slide_stem
from cfusion.cohort.parsing import read_table
from cfusion.errors import CohortError

FindPatient = Callable[[str], str | None]
"""Returns the known patient that a name means; None if there is none."""

_COLUMNS = {"slide_id": ("slide_id", "slide"), "case_id": ("case_id", "patient")}
"""Columns of a table of owners, and their names in a plain clinical table."""


def known_owner(slide: str, find: FindPatient) -> str | None:
    """Return the known patient of a slide that no table names (rules 2 and 3); None if there is none."""
    starts = [slide[: sign.start()] for sign in re.finditer(r"[\W_]", slide)]
    names = (patient_of(slide), slide, *reversed(starts))
    return next((found for name in names if name and (found := find(name)) is not None), None)


class SlideOwners:
    """The patient of each slide.

    Args:
        find: Finds a known patient.
        named: Patient of each slide that a table names.
    """

    def __init__(self, find: FindPatient, named: Mapping[str, str] | None = None) -> None:
        self._find = find
        self._named = Names(named or {})

    def patient(self, slide: str) -> str:
        """Return the patient of a slide."""
        return self._owner(slide) or patient_of(slide)

    def group(self, slides: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return the slides of each patient, sorted by name as in training (`Cohort.slides_of`)."""
        grouped: dict[str, list[str]] = {}
        for slide in dict.fromkeys(slides):
            grouped.setdefault(self.patient(slide), []).append(slide)
        return {patient: tuple(sorted(of_patient)) for patient, of_patient in grouped.items()}

    def unowned(self, slides: Iterable[str]) -> list[str]:
        """Return the slides that count as patients: no table, barcode or known patient says whose they are."""
        return [slide for slide in slides if not has_barcode(slide) and self._owner(slide) is None]

    def _owner(self, slide: str) -> str | None:
        return self._named.find(slide) or known_owner(slide, self._find)


def read_owners(table: Path) -> dict[str, str]:
    """Read the patient of each slide from a table `slide_id, case_id`, or a clinical table `slide, patient`.

    Raises:
        CohortError: The table lacks a column, or names two patients of a slide.
    """
    cells = read_table(table)
    found = {name: next((c for c in columns if c in cells.columns), None) for name, columns in _COLUMNS.items()}
    if lacking := [name for name, column in found.items() if column is None]:
        raise CohortError(
            f"{table}: lacks the columns {', '.join(lacking)}.", "Expected slide_id and case_id, or slide and patient."
        )
    owners: dict[str, str] = {}
    for case, cell in zip(cells[found["case_id"]], cells[found["slide_id"]], strict=True):
        slide = slide_stem(str(cell))
        if owners.setdefault(slide, str(case)) != str(case):
            raise CohortError(
                f"{table}: slide {slide} belongs to {owners[slide]} and to {case}.", "Keep one of its rows."
            )
    return owners


def wanted_slides(table: Path, owners: Mapping[str, str], there: Iterable[str]) -> list[str]:
    """Return the slides of a table of owners, of which every one must be there.

    A patient without some of the slides would get another risk.

    Raises:
        CohortError: The table names slides that are not there.
    """
    absent = sorted(set(owners) - set(there))
    if absent:
        raise CohortError(
            f"{table}: {len(absent)} of its slides are not there: {', '.join(absent[:5])}.",
            "Leave them out, or extract them.",
        )
    return list(owners)

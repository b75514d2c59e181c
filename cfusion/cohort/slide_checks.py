"""Check the slides of a cohort: which are known, of tumour tissue, and have features; each one dropped is named."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pandas as pd

from cfusion.cohort.findings import Finding, dropped
from cfusion.cohort.identifiers import Names, Tissue, tissue_of
from cfusion.cohort.slide_owners import known_owner
from cfusion.types import Cohort

_NEAREST = 5
"""Number of unknown names of one kind that are compared with all known ones."""


def checked_slides(
    cohort: Cohort,
    available: Mapping[str, set[str]] | None,
    magnifications: Sequence[str],
    keep_tissue: Collection[Tissue],
    findings: list[Finding],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the slides of known patients, and those of them that can be used; see `audit` for the arguments."""
    known = _known_slides(cohort, named_slides(cohort, available), findings)
    return known, _usable_slides(_wanted_tissue(known, keep_tissue, findings), available, magnifications, findings)


def named_slides(cohort: Cohort, available: Mapping[str, set[str]] | None) -> pd.DataFrame:
    """Return the slides named by the tables; if there are none, those with features that name a known patient."""
    if not cohort.slides.empty or not available:
        return cohort.slides
    patients = Names(cohort.cases.index)
    owners = pd.DataFrame({"case_id": [known_owner(s, patients.find) for s in available]}, index=list(available))
    return owners[owners["case_id"].notna()].rename_axis("slide_id")


def _known_slides(cohort: Cohort, slides: pd.DataFrame, findings: list[Finding]) -> pd.DataFrame:
    """Drop repeated slides and slides of unknown patients."""
    twice = slides.index.duplicated()
    findings += [dropped("duplicate_slide", str(s), "is listed twice; one row is kept") for s in slides.index[twice]]
    slides = slides[~twice]
    patients = Names(cohort.cases.index)
    meant = slides["case_id"].map(patients.find)
    differ = meant.notna() & (meant != slides["case_id"])
    pairs = zip(slides["case_id"][differ], meant[differ], strict=True)
    findings += spelling(cohort.name, "patients of slides", dict(pairs))
    unknown = slides.index[meant.isna()]
    for number, slide in enumerate(unknown):
        owner = slides.loc[slide, "case_id"]
        hint = patients.nearest(owner) if number < _NEAREST else ""
        findings.append(dropped("no_outcome", str(slide), f"belongs to no patient of the table (to {owner}{hint})"))
    return slides.assign(case_id=meant)[meant.notna().to_numpy()]


def _wanted_tissue(slides: pd.DataFrame, keep: Collection[Tissue], findings: list[Finding]) -> pd.DataFrame:
    """Drop slides of normal tissue and frozen sections, unless they are to be kept."""
    kept = []
    for slide in slides.index:
        tissue, words = tissue_of(str(slide))
        if tissue == "diagnostic" or tissue in keep:
            kept.append(slide)
        else:
            kind = {"frozen": "frozen_section", "normal": "normal_tissue"}[tissue]
            findings.append(dropped(kind, str(slide), f"{words}; cohort.keep_tissue=[{tissue}] keeps it"))
    return slides.loc[kept]


def _usable_slides(
    slides: pd.DataFrame,
    available: Mapping[str, set[str]] | None,
    magnifications: Sequence[str],
    findings: list[Finding],
) -> pd.DataFrame:
    """Drop slides without features; the others are named as their features are."""
    if available is None:
        return slides
    wanted, stored = set(magnifications), Names(list(available))
    of_no_row = Names(available.keys() - {stored.find(slide) for slide in slides.index})
    keep: dict[str, str] = {}
    differ: dict[str, str] = {}
    taken, missing = set(), 0
    for slide in slides.index:
        found = stored.find(slide)
        if found is None or found in taken:
            missing += 1
            hint = of_no_row.nearest(slide) if missing <= _NEAREST else ""
            findings.append(dropped("missing_features", slide, f"has no features{hint}"))
        elif wanted - available[found]:
            lacking = ", ".join(sorted(wanted - available[found]))
            findings.append(dropped("missing_magnification", slide, f"has no features at {lacking}"))
        else:
            keep[slide] = found
            taken.add(found)
            differ |= {slide: found} if slide != found else {}
    findings += spelling("cohort", "slides", differ)
    return slides.loc[list(keep)].rename(index=keep)


def spelling(subject: str, what: str, pairs: Mapping[str, str]) -> list[Finding]:
    """Return the doubt that names were matched although two tables write them differently; none without pairs.

    Args:
        subject: The cohort, fold or store that the names belong to.
        what: What they name, in the plural.
        pairs: Names that differ, as written in one table and in the other.
    """
    if not pairs:
        return []
    one, other = next(iter(pairs.items()))
    message = f"has {len(pairs)} {what} in two spellings, such as {one} and {other}; they are taken as the same"
    return [Finding("spelling", subject, "doubted", message)]

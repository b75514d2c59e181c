"""Check cohort data before training: what is dropped, what is suspicious, and why.

Nothing is dropped silently: every finding names its slide, patient or fold. Under `evaluation.strict` any finding stops
the run.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from cfusion.cohort.findings import Finding, has_comparable_pair, outcome_doubts
from cfusion.cohort.read import patient_of
from cfusion.errors import DataError
from cfusion.types import Cohort, Split

LOST = {
    "with a usable outcome": (
        "missing_time", "negative_time", "zero_time", "unknown_event", "no_outcome", "duplicate_slide",
    ),
    "with slides": ("no_slides",),
    "with features": ("missing_features", "missing_magnification", "no_slides"),
}  # fmt: skip
"""For each step of the flow, the kinds of findings that removed patients or slides before it."""


@dataclass(frozen=True)
class Audit:
    """The outcome of an audit.

    Attributes:
        cohort: The patients and slides that are kept.
        splits: The folds, restricted to the kept patients.
        findings: Everything dropped or doubted.
        flow: Counts from the tables to the run, for the flow diagram: (step, patients, slides).
    """

    cohort: Cohort
    splits: list[Split]
    findings: list[Finding]
    flow: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)

    def raise_if_strict(self) -> None:
        """Raise an error if anything was dropped or doubted.

        Raises:
            DataError: There are findings; the message counts them by kind and names the first.
        """
        if not self.findings:
            return
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts().items())
        raise DataError(
            f"cohort {self.cohort.name}: the audit has {len(self.findings)} findings ({counts}); first: "
            f"{self.findings[0].subject} {self.findings[0].message}.",
            "Correct the tables, or set evaluation.strict=false to continue without the dropped patients and slides.",
            topic="audit",
        )

    def counts(self) -> dict[str, int]:
        """Count the findings of each kind, most frequent first."""
        return dict(Counter(finding.kind for finding in self.findings).most_common())

    def lines(self, most: int) -> list[str]:
        """Format the findings as lines, at most `most` of each kind, with a count of the rest."""
        lines = []
        for kind, count in self.counts().items():
            lines += [str(finding) for finding in self.findings if finding.kind == kind][:most]
            if count > most:
                lines.append(f"… and {count - most} more [{kind}]")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a run's artifacts and report."""
        return {
            "cohort": self.cohort.name,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "flow": [{"step": step, "patients": patients, "slides": slides} for step, patients, slides in self.flow],
        }


def audit(
    cohort: Cohort,
    splits: Sequence[Split],
    *,
    available: Mapping[str, set[str]] | None = None,
    magnifications: Sequence[str] = (),
    n_bins: int = 4,
    keep_zero_times: bool = False,
) -> Audit:
    """Drop unusable patients and slides, flag suspicious ones, and report both.

    Args:
        cohort: The cohort as read.
        splits: The folds as read or drawn. Dropped patients are removed from every side.
        available: Magnification names of each slide that has features; None to skip the check of features. If the
            cohort names no slides, these slides are used and matched to patients by their TCGA barcodes.
        magnifications: Names (`x20`) of the magnifications that every slide in `available` must have.
        n_bins: Number of time bins that the training side of every fold must be able to fill.
        keep_zero_times: Whether to keep patients with a follow-up of 0; otherwise they are dropped.

    Raises:
        DataError: No patient is left, a patient is scored by two folds, or a fold cannot be trained or scored: a side
            has no patients, no event or no comparable pair, or training has fewer distinct event times than bins.
    """
    findings: list[Finding] = []
    listed = _named_slides(cohort, available)
    flow = [("in the tables", len(cohort.cases), len(listed))]
    known = _known_slides(cohort, listed, findings)
    slides = _usable_slides(known, available, magnifications, findings)
    bad = _bad_outcomes(cohort, keep_zero_times, findings)
    flow.append(("with a usable outcome", len(cohort.cases) - len(bad), int((~known["case_id"].isin(bad)).sum())))
    if available is not None or len(cohort.slides):
        without = set(cohort.cases.index) - set(slides["case_id"]) - bad
        findings += [_dropped("no_slides", case, "has no usable slide") for case in sorted(without)]
        bad |= without
    kept = [case for case in cohort.cases.index if case not in bad]
    if not kept:
        raise DataError(
            f"cohort {cohort.name}: the audit leaves no patient ({_first_messages(findings)}).",
            "Check that the slide names of the clinical table and of the features are the same.",
            topic="audit",
        )
    cases = cohort.cases.loc[kept].astype({"event": bool})
    clean = dataclasses.replace(cohort, cases=cases, slides=slides[slides["case_id"].isin(kept)])
    flow.append(("with slides" if available is None else "with features", len(clean.cases), len(clean.slides)))
    findings += outcome_doubts(clean.name, clean.cases["time_months"], clean.cases["event"])
    named = dict.fromkeys(case for split in splits for case in (*split.train, *split.validation, *split.test))
    strangers = [case for case in named if case not in cohort.cases.index]
    findings += [_dropped("not_in_cohort", c, "is in the splits but not in the clinical table") for c in strangers]
    folds = [_clean_split(clean, split, findings) for split in splits]
    for split in folds:
        _check_fold(clean, split, n_bins)
    _check_scored_once(clean, folds)
    scored = {case for split in folds for case in (*split.train, *split.validation, *split.test)}
    if folds:
        flow.append(("in the splits", len(scored), int(clean.slides["case_id"].isin(scored).sum())))
    return Audit(clean, folds, findings, flow)


def _dropped(kind: str, subject: str, message: str) -> Finding:
    return Finding(kind, subject, "dropped", message)


def _first_messages(findings: Sequence[Finding]) -> str:
    examples = {finding.kind: f"{finding.subject} {finding.message}" for finding in reversed(findings)}
    return "; ".join(examples.values())


def _named_slides(cohort: Cohort, available: Mapping[str, set[str]] | None) -> pd.DataFrame:
    """Return the slides named by the tables; if there are none, those with features and a known patient's barcode."""
    if not cohort.slides.empty or not available:
        return cohort.slides
    owners = pd.DataFrame({"case_id": [patient_of(slide) for slide in available]}, index=list(available))
    return owners[owners["case_id"].isin(cohort.cases.index)].rename_axis("slide_id")


def _known_slides(cohort: Cohort, slides: pd.DataFrame, findings: list[Finding]) -> pd.DataFrame:
    """Drop repeated slides and slides of unknown patients."""
    twice = slides.index.duplicated()
    findings += [_dropped("duplicate_slide", str(s), "is listed twice; one row is kept") for s in slides.index[twice]]
    slides = slides[~twice]
    unknown = ~slides["case_id"].isin(cohort.cases.index)
    findings += [_dropped("no_outcome", str(s), "belongs to no patient of the table") for s in slides.index[unknown]]
    return slides[~unknown]


def _usable_slides(
    slides: pd.DataFrame,
    available: Mapping[str, set[str]] | None,
    magnifications: Sequence[str],
    findings: list[Finding],
) -> pd.DataFrame:
    if available is None:
        return slides
    wanted = set(magnifications)
    keep = []
    for slide in slides.index:
        if slide not in available:
            findings.append(_dropped("missing_features", slide, "has no features"))
        elif wanted - available[slide]:
            lacking = ", ".join(sorted(wanted - available[slide]))
            findings.append(_dropped("missing_magnification", slide, f"has no features at {lacking}"))
        else:
            keep.append(slide)
    return slides.loc[keep]


def _bad_outcomes(cohort: Cohort, keep_zero: bool, findings: list[Finding]) -> set[str]:
    bad = set()
    for case, time, event in zip(cohort.cases.index, cohort.cases["time_months"], cohort.cases["event"], strict=True):
        if pd.isna(time):
            finding = _dropped("missing_time", case, "has no follow-up time")
        elif time < 0:
            finding = _dropped("negative_time", case, f"has a follow-up of {time:g} months")
        elif time == 0 and not keep_zero:
            finding = _dropped("zero_time", case, "has a follow-up of 0 (cohort.keep_zero_times=true keeps it)")
        elif pd.isna(event):
            finding = _dropped("unknown_event", case, "does not say whether the event happened")
        else:
            continue
        findings.append(finding)
        bad.add(case)
    return bad


def _clean_split(clean: Cohort, split: Split, findings: list[Finding]) -> Split:
    """Remove dropped patients from every side, and tested patients from the training side."""
    test = set(split.test)
    known = set(clean.cases.index)
    optimistic = set(split.validation) == test
    where = f"fold {split.fold}" + (f" of repeat {split.repeat}" if split.repeat else "")
    held_out = test | set(split.validation)
    both = [case for case in dict.fromkeys(split.train) if case in held_out]
    if not optimistic:
        both += [c for c in split.validation if c in test and c not in both]
    findings += [
        _dropped("both_sides", case, f"is on both sides of {where}; removed from the training side")
        for case in both
    ]  # fmt: skip
    return dataclasses.replace(
        split,
        train=tuple(c for c in split.train if c in known and c not in both),
        validation=tuple(c for c in split.validation if c in known and (optimistic or c not in test)),
        test=tuple(c for c in split.test if c in known),
    )


def _check_scored_once(cohort: Cohort, splits: Sequence[Split]) -> None:
    scored: dict[tuple[int, str], int] = {}
    for split in splits:
        for case in split.test:
            other = scored.setdefault((split.repeat, case), split.fold)
            if other != split.fold:
                raise DataError(
                    f"cohort {cohort.name}: {case} is scored in fold {other} and in fold {split.fold}.",
                    "A cross-validation scores each patient in only one fold; correct the split files.",
                    topic="splits",
                )


def _check_fold(cohort: Cohort, split: Split, n_bins: int) -> None:
    where = f"cohort {cohort.name}, fold {split.fold}"
    for side in ("train", "validation", "test") if split.validation else ("train", "test"):
        cases = cohort.cases.loc[list(getattr(split, side))]
        time, event = cases["time_months"].to_numpy(float), cases["event"].to_numpy(bool)
        if not event.any():
            raise DataError(
                f"{where}: the {side} side has {len(cases)} patients and no event.", "Draw other folds.", topic="splits"
            )
        if not has_comparable_pair(time, event):
            raise DataError(
                f"{where}: the {side} side has {len(cases)} patients, {int(event.sum())} with the event, and no "
                "comparable pair.",
                "Draw other folds.",
                topic="splits",
            )
    train = cohort.cases.loc[list(split.train)]
    distinct = train.loc[train["event"], "time_months"].nunique()
    if distinct < n_bins:
        raise DataError(
            f"{where}: {distinct} distinct event times in training cannot fill {n_bins} time bins.",
            f"Set evaluation.n_bins={max(distinct, 2)} or fewer, or draw fewer folds.",
            topic="splits",
        )

"""Check cohort data before training: what is dropped, what is suspicious, and why.

Nothing is dropped silently: every finding names its slide, patient or fold. Under `evaluation.strict` any finding stops
the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import fisher_exact

from cfusion.cohort.findings import Finding, dropped, finding_lines, other_causes, outcome_doubts
from cfusion.cohort.fold_checks import checked_folds
from cfusion.cohort.identifiers import Tissue, alike
from cfusion.cohort.slide_checks import checked_slides, named_slides
from cfusion.errors import CfusionError, DataError
from cfusion.types import Cohort, Split

logger = logging.getLogger(__name__)

LOST = {
    "with a usable outcome": (
        "missing_time", "negative_time", "zero_time", "unknown_event", "redacted", "no_outcome", "duplicate_slide",
    ),
    "with slides": ("frozen_section", "normal_tissue", "no_slides"),
    "with features": (
        "frozen_section", "normal_tissue", "missing_features", "missing_magnification", "no_slides",
    ),
}  # fmt: skip
"""For each step of the flow, the kinds of findings that removed patients or slides before it."""

_SHOWN_WITH_AN_ERROR = 3
_LOSS_LEVEL = 0.001
"""P-value below which a loss is said to depend on the outcome."""
_GROUP_MINIMUM = 5
"""Patients with and without the event from which on the loss of one of the two groups is an error."""


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
        """Format the findings as lines, see `finding_lines`."""
        return finding_lines(self.findings, most)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a run's artifacts and report."""
        return {
            "cohort": self.cohort.name,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "flow": [{"step": step, "patients": patients, "slides": slides} for step, patients, slides in self.flow],
        }


def audit(
    cohort: Cohort,
    splits: Sequence[Split] | Callable[[], Sequence[Split]],
    *,
    available: Mapping[str, set[str]] | None = None,
    magnifications: Sequence[str] = (),
    n_bins: int = 4,
    keep_zero_times: bool = False,
    keep_tissue: Collection[Tissue] = (),
) -> Audit:
    """Drop unusable patients and slides, flag suspicious ones, and report both.

    Args:
        cohort: The cohort as read.
        splits: The folds as read or drawn, or a function that reads or draws them once the patients are audited, so
            that an error of the folds does not hide what was found before. Dropped patients are removed from every
            side.
        available: Magnification names of each slide that has features; None to skip the check of features. If the
            cohort names no slides, these slides are used and matched to patients by their TCGA barcodes.
        magnifications: Names (`x20`) of the magnifications that every slide in `available` must have.
        n_bins: Number of time bins that the training side of every fold must be able to fill.
        keep_zero_times: Whether to keep patients with a follow-up of 0; otherwise they are dropped.
        keep_tissue: Kinds of TCGA slides to keep in addition to diagnostic slides of the tumour.

    Raises:
        DataError: No patient is left, or all patients with (or all without) the event are dropped; a patient is scored
            by two folds, or a fold cannot be trained or scored: a side has no patients, no event or no comparable pair,
            or the event times of the training side cannot fill the bins.
    """
    findings: list[Finding] = []
    with _findings_first(findings):
        flow = [("in the tables", len(cohort.cases), len(named_slides(cohort, available)))]
        known, slides = checked_slides(cohort, available, magnifications, keep_tissue, findings)
        bad = _bad_outcomes(cohort, keep_zero_times, findings)
        flow.append(("with a usable outcome", len(cohort.cases) - len(bad), int((~known["case_id"].isin(bad)).sum())))
        if available is not None or len(cohort.slides):
            without = set(cohort.cases.index) - set(slides["case_id"]) - bad
            findings += [dropped("no_slides", case, "has no usable slide") for case in sorted(without)]
            bad |= without
        kept = [case for case in cohort.cases.index if case not in bad]
        if not kept:
            raise DataError(
                f"cohort {cohort.name}: the audit leaves no patient ({_first_messages(findings)}).",
                "Check that the slide names of the clinical table and of the features are the same.",
                topic="audit",
            )
        findings[:0] = _loss_by_outcome(cohort, bad)
        cases = cohort.cases.loc[kept].astype({"event": bool})
        clean = dataclasses.replace(cohort, cases=cases, slides=slides[slides["case_id"].isin(kept)])
        findings += _unused_covariates(cohort)
        flow.append(("with slides" if available is None else "with features", len(clean.cases), len(clean.slides)))
        findings += _alike_patients(clean)
        findings += outcome_doubts(clean.name, clean.cases["time_months"], clean.cases["event"])
        findings += other_causes(clean.name, clean.endpoint, clean.cases)
        folds = checked_folds(cohort, clean, splits() if callable(splits) else splits, n_bins, findings)
    return Audit(clean, folds, findings, [*flow, *_in_the_splits(clean, folds)])


def joint_audit(
    cohort: Cohort, parts: Sequence[Audit], splits: Sequence[Split] | Callable[[], Sequence[Split]], n_bins: int
) -> Audit:
    """Join the audits of several cohorts that are trained as one, and check their common folds.

    Args:
        cohort: The cohorts as read, as one with strata.
        parts: The audit of each cohort, without folds.
        splits: The folds as read or drawn, or a function that reads or draws them.
        n_bins: Number of time bins that each cohort must be able to fill in every fold that trains on it.

    Raises:
        DataError: As for `audit`; a cohort's side of a fold counts as a side.
    """
    findings = [*(finding for part in parts for finding in part.findings), *_unused_covariates(cohort)]
    with _findings_first(findings):
        clean = dataclasses.replace(
            cohort,
            cases=cohort.cases.loc[[c for part in parts for c in part.cohort.cases.index]].astype({"event": bool}),
            slides=pd.concat([part.cohort.slides for part in parts]).rename_axis("slide_id"),
        )
        folds = checked_folds(cohort, clean, splits() if callable(splits) else splits, n_bins, findings)
    steps = [
        (steps[0][0], sum(patients for _, patients, _ in steps), sum(slides for _, _, slides in steps))
        for steps in zip(*(part.flow for part in parts), strict=True)
    ]
    return Audit(clean, folds, findings, [*steps, *_in_the_splits(clean, folds)])


def _unused_covariates(cohort: Cohort) -> list[Finding]:
    return [
        dropped("covariate", f"covariate {name}", f"is not used: {why} cohort.covariates states how to read it.")
        for name, why in cohort.unused_covariates.items()
    ]


def _in_the_splits(clean: Cohort, folds: Sequence[Split]) -> list[tuple[str, int, int]]:
    """Return the last step of the flow: who is in the folds; none without folds."""
    scored = {case for split in folds for case in (*split.train, *split.validation, *split.test)}
    return [("in the splits", len(scored), int(clean.slides["case_id"].isin(scored).sum()))] if folds else []


@contextlib.contextmanager
def _findings_first(findings: list[Finding]) -> Iterator[None]:
    """Log what was found before an error leaves, because a cause such as names that do not match is among it."""
    try:
        yield
    except CfusionError:
        for line in finding_lines(findings, _SHOWN_WITH_AN_ERROR):
            logger.warning("audit: %s", line)
        raise


def _loss_by_outcome(cohort: Cohort, lost: set[str]) -> list[Finding]:
    """Doubt a loss of patients that depends on their outcome: the rest is no random sample of the cohort.

    Raises:
        DataError: All patients without the event are lost, or all with it, and not all others.
    """
    event = cohort.cases["event"].dropna().astype(bool)
    gone = event.index.isin(lost)
    counts = np.array([[(gone & (event == value)).sum(), (~gone & (event == value)).sum()] for value in (True, False)])
    lost_counts, sizes = counts[:, 0], counts.sum(axis=1)
    words = (
        f"{lost_counts[0]} of {sizes[0]} patients with the event and {lost_counts[1]} of {sizes[1]} without it are "
        "dropped"
    )
    if (lost_counts == sizes).any() and (sizes >= _GROUP_MINIMUM).all():
        raise DataError(
            f"cohort {cohort.name}: {words}; no survival can be learnt or scored from one of the groups.",
            "Complete the times, outcomes or slides of the group that is lost.",
            topic="audit",
        )
    p = float(fisher_exact(counts)[1])
    if p >= _LOSS_LEVEL:
        return []
    message = f"{words} (Fisher's exact test, p {p:.2g}): the loss depends on the outcome and biases every score"
    return [Finding("loss_by_outcome", cohort.name, "doubted", message)]


def _alike_patients(cohort: Cohort) -> list[Finding]:
    """Doubt patients whose names differ only in case: a fold may train on a patient whom it scores by another name."""
    groups = alike(map(str, cohort.cases.index))
    if not groups:
        return []
    message = (
        f"has {len(groups)} groups of patients with names written alike, such as {' and '.join(groups[0])}; if they "
        "are one patient, folds may train on and score the same patient"
    )
    return [Finding("spelling", cohort.name, "doubted", message)]


def _first_messages(findings: Sequence[Finding]) -> str:
    examples = {finding.kind: f"{finding.subject} {finding.message}" for finding in reversed(findings)}
    return "; ".join(examples.values())


def _bad_outcomes(cohort: Cohort, keep_zero: bool, findings: list[Finding]) -> set[str]:
    bad = set()
    redacted = _redacted(cohort)
    for case, time, event in zip(cohort.cases.index, cohort.cases["time_months"], cohort.cases["event"], strict=True):
        if pd.isna(time):
            finding = dropped("missing_time", case, "has no follow-up time")
        elif time < 0:
            finding = dropped("negative_time", case, f"has a follow-up of {time:g} months")
        elif time == 0 and not keep_zero:
            finding = dropped("zero_time", case, "has a follow-up of 0 (cohort.keep_zero_times=true keeps it)")
        elif pd.isna(event):
            finding = dropped("unknown_event", case, "does not say whether the event happened")
        elif case in redacted:
            finding = dropped("redacted", case, "is redacted: the source withdrew the patient")
        else:
            continue
        findings.append(finding)
        bad.add(case)
    return bad


def _redacted(cohort: Cohort) -> set[str]:
    """Return the patients that the source withdrew, such as those with a wrong tumour type (`Redaction` in the CDR)."""
    if "redaction" not in cohort.cases.columns:
        return set()
    words = cohort.cases["redaction"].astype("string").str.strip().str.lower()
    return set(cohort.cases.index[(words.notna() & ~words.isin(("", "no", "false", "0", "nan"))).to_numpy(bool)])

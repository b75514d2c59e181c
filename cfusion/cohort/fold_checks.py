"""Check folds against the cohort: names, sides that overlap, and sides too small to train, choose or score a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pandas as pd

from cfusion.cohort.findings import Finding, dropped, has_comparable_pair
from cfusion.cohort.identifiers import Names
from cfusion.errors import DataError
from cfusion.survival.bins import TimeBins
from cfusion.types import Cohort, Split

_NEAREST = 5
_FEW_EVENTS = 10
_SHARE = 0.75
"""A side with few events is doubted if it has less than this part of the events that its share of patients gives."""
_LARGE = 1.5
"""A fold is doubted if it scores this many times the patients of the mean fold."""


class FoldSideError(DataError):
    """A side of a fold has too few events to train, choose or score a model."""


def checked_folds(
    cohort: Cohort, clean: Cohort, splits: Sequence[Split], n_bins: int, findings: list[Finding]
) -> list[Split]:
    """Return the folds restricted to the kept patients.

    Args:
        cohort: The cohort as read.
        clean: The patients that are kept.
        splits: The folds as read or drawn.
        n_bins: Number of time bins that the training side of every fold must be able to fill.
        findings: Findings are added to it.

    Raises:
        DataError: A patient is scored by two folds, or a fold cannot be trained or scored.
    """
    findings += _strangers(cohort, splits)
    folds = [_clean_split(clean, split, findings) for split in splits]
    parts = clean.parts()
    for split in folds:
        _check_fold(clean, parts, split, n_bins)
    _check_scored_once(clean, folds)
    for split in folds:
        findings += _uneven_sides(clean, split)
    if len(parts) == 1 or not all(_leaves_a_cohort_out(parts, split) for split in folds):
        findings += _large_folds(clean, folds)
    return folds


def _leaves_a_cohort_out(parts: Sequence[Cohort], split: Split) -> bool:
    """Return whether a fold trains on no patient of a cohort; it then scores as many patients as that has."""
    return any(part.cases.index.intersection(list(split.train)).empty for part in parts)


def _strangers(cohort: Cohort, splits: Sequence[Split]) -> list[Finding]:
    named = dict.fromkeys(case for split in splits for case in (*split.train, *split.validation, *split.test))
    strangers = [case for case in named if case not in cohort.cases.index]
    known = Names(cohort.cases.index)
    hints = [known.nearest(case) for case in strangers[:_NEAREST]] + [""] * len(strangers[_NEAREST:])
    return [
        dropped("not_in_cohort", case, f"is in the splits but not in the clinical table{hint}")
        for case, hint in zip(strangers, hints, strict=True)
    ]


def _where(split: Split) -> str:
    return f"fold {split.fold}" + (f" of repeat {split.repeat}" if split.repeat else "")


def _clean_split(clean: Cohort, split: Split, findings: list[Finding]) -> Split:
    """Remove dropped patients from every side, and tested patients from the training side."""
    test = set(split.test)
    known = set(clean.cases.index)
    optimistic = set(split.validation) == test
    held_out = test | set(split.validation)
    both = [case for case in dict.fromkeys(split.train) if case in held_out]
    if not optimistic:
        both += [c for c in split.validation if c in test and c not in both]
    findings += [
        dropped("both_sides", case, f"is on both sides of {_where(split)}; removed from the training side")
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


def _check_fold(cohort: Cohort, parts: Sequence[Cohort], split: Split, n_bins: int) -> None:
    """Check every side of a fold, in each cohort that has patients on it."""
    sides: dict[str, dict[str, pd.DataFrame]] = {}
    for side in ("train", "validation", "test") if split.validation else ("train", "test"):
        patients = set(getattr(split, side))
        of_parts = {part.name: part.cases[part.cases.index.isin(patients)] for part in parts}
        sides[side] = {name: cases for name, cases in of_parts.items() if len(cases)} or {cohort.name: cohort.cases[:0]}
    for side, there in sides.items():
        for name, cases in there.items():
            _check_side(f"cohort {name}, {_where(split)}", side, cases)
    for name, cases in sides["train"].items():
        _check_bins(f"cohort {name}, {_where(split)}", cases, n_bins)


def _check_side(where: str, side: str, cases: pd.DataFrame) -> None:
    time, event = cases["time_months"].to_numpy(float), cases["event"].to_numpy(bool)
    if not event.any():
        raise FoldSideError(
            f"{where}: the {side} side has {len(cases)} patients and no event.", "Draw other folds.", topic="splits"
        )
    if not has_comparable_pair(time, event):
        raise FoldSideError(
            f"{where}: the {side} side has {len(cases)} patients, {int(event.sum())} with the event, and no comparable "
            "pair.",
            "Draw other folds.",
            topic="splits",
        )


def _check_bins(where: str, train: pd.DataFrame, n_bins: int) -> None:
    distinct = train.loc[train["event"], "time_months"].nunique()
    if distinct < n_bins:
        raise FoldSideError(
            f"{where}: {distinct} distinct event times in training cannot fill {n_bins} time bins.",
            f"Set evaluation.n_bins={max(distinct, 2)} or fewer, or draw fewer folds.",
            topic="splits",
        )
    try:
        TimeBins.fit(train["time_months"], train["event"], n_bins)
    except DataError as error:  # tied times: the quantiles of the events coincide
        raise FoldSideError(f"{where}: {error.message}", error.remedy, topic="splits") from error


def _uneven_sides(cohort: Cohort, split: Split) -> list[Finding]:
    """Doubt a side with few events for its size, and a side that chooses with more patients than train."""
    event = cohort.cases["event"]
    findings = []
    sides = {"scores": (split.test, (*split.train, *split.validation, *split.test))}
    if split.protocol == "strict":
        sides["chooses"] = (split.validation, (*split.train, *split.validation))
        if len(split.validation) > len(split.train):
            message = f"trains with {len(split.train)} patients and chooses the model with {len(split.validation)}"
            findings.append(Finding("uneven_folds", _where(split), "doubted", message))
    for verb, (side, group) in sides.items():
        events, all_events = int(event[list(side)].sum()), int(event[list(dict.fromkeys(group))].sum())
        fair = all_events * len(side) / max(len(set(group)), 1)
        if events <= _FEW_EVENTS and events < _SHARE * fair:
            message = (
                f"{verb} with {events} events among {len(side)} patients, where {fair:.0f} would be their share; "
                "its C-index is mostly noise"
            )
            findings.append(Finding("few_events", _where(split), "doubted", message))
    return findings


def _large_folds(cohort: Cohort, splits: Sequence[Split]) -> list[Finding]:
    """Doubt folds that score far more patients than the others, such as those with one large site."""
    findings = []
    for split in splits:
        sizes = [len(other.test) for other in splits if other.repeat == split.repeat]
        mean = sum(sizes) / len(sizes)
        if len(split.test) <= _LARGE * mean:
            continue
        message = f"scores {len(split.test)} patients, where the mean fold scores {mean:.0f}"
        sites = cohort.cases.get("site", pd.Series(dtype=str)).reindex(list(split.test)).value_counts()
        if len(sites) and sites.iloc[0] > mean:
            message += f"; {sites.iloc[0]} of them are of one site, {sites.index[0]}"
        findings.append(Finding("uneven_folds", _where(split), "doubted", message))
    return findings

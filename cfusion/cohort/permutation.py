"""Permute outcomes among patients, so that nothing can be learnt: the null of a complete training.

Outcomes are permuted before folds are drawn and audited. Drawn folds are then stratified by the permuted outcomes, so
each side has its share of events, whatever the permutation. Published folds are fixed; there, permuting within each
scored fold keeps its events.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from cfusion.cohort.fold_checks import FoldSideError
from cfusion.cohort.splits import inner_folds, outer_folds
from cfusion.config import EvaluationConfig, SplitsConfig
from cfusion.errors import ConfigError
from cfusion.types import Cohort, Split


def permuted(cohort: Cohort, seed: int, within: Sequence[Split] = ()) -> Cohort:
    """Return the cohort with its outcomes (time and event together) permuted among patients.

    Patients without a time or without an event keep what they have, for the audit to drop. Outcomes stay in their
    cohort where several are trained as one.

    Args:
        cohort: The cohort.
        seed: Seed of the permutation.
        within: Folds of one repeat; outcomes are then permuted only among the patients that a fold scores, and among
            those that none does; empty: among all patients.
    """
    known = (cohort.cases["time_months"].notna() & cohort.cases["event"].notna()).to_numpy()
    scored = {case: split.fold for split in within for case in split.test}
    patients = list(cohort.cases.index)
    places = pd.DataFrame({"stratum": cohort.strata_of(patients), "fold": [scored.get(case, -1) for case in patients]})
    group = places.groupby(["stratum", "fold"]).ngroup().to_numpy()
    generator = np.random.default_rng(seed)
    order = np.arange(len(cohort.cases))
    for value in np.unique(group):
        rows = np.flatnonzero(known & (group == value))
        order[rows] = generator.permutation(rows)
    cases = cohort.cases.copy()
    for column in ("time_months", "event"):
        cases[column] = cohort.cases[column].array.take(order)
    return dataclasses.replace(cohort, cases=cases)


def permuted_folds(cohort: Cohort, splits: SplitsConfig, evaluation: EvaluationConfig) -> tuple[Cohort, list[Split]]:
    """Return the cohort with permuted outcomes and its folds, as `evaluation` says.

    Raises:
        ConfigError: Outcomes are to be permuted within the folds of several repeats.
        ConfigError, DataError: See `make_splits`.
    """
    seed = evaluation.permute_outcomes
    assert seed is not None
    if evaluation.permute_within == "cohort":
        shuffled = permuted(cohort, seed)
        return shuffled, inner_folds(shuffled, outer_folds(shuffled, splits), splits, evaluation.protocol)
    outer = outer_folds(cohort, splits)
    if len({split.repeat for split in outer}) > 1:
        raise ConfigError(
            "evaluation.permute_within=folds: repeats have other folds, so outcomes cannot stay within all of them.",
            "Set splits.repeats=1, or evaluation.permute_within=cohort.",
        )
    shuffled = permuted(cohort, seed, outer)
    return shuffled, inner_folds(shuffled, outer, splits, evaluation.protocol)


@contextlib.contextmanager
def naming_the_permutation(evaluation: EvaluationConfig) -> Iterator[None]:
    """Say of a fold without enough events, within the block, that the permutation of the outcomes made it.

    Raises:
        FoldSideError: With the remedy, if outcomes are permuted over the cohort; otherwise as it was.
    """
    try:
        yield
    except FoldSideError as error:
        if evaluation.permute_outcomes is None or evaluation.permute_within == "folds":
            raise
        raise FoldSideError(
            f"outcomes permuted with evaluation.permute_outcomes={evaluation.permute_outcomes}: {error.message}",
            "Set evaluation.permute_within=folds, which keeps the events of every scored fold.",
            topic=error.topic,
        ) from error

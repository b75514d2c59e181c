"""From a configuration to audited patients and folds, for everything that starts from one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from cfusion.cohort.audit import Audit, audit, joint_audit
from cfusion.cohort.permutation import naming_the_permutation, permuted_folds
from cfusion.cohort.splits import make_splits
from cfusion.config import CohortConfig, Config
from cfusion.types import Cohort, Split


def audited(
    config: Config,
    cohort: Cohort,
    available: Mapping[str, set[str]] | None = None,
    magnifications: Sequence[str] = (),
) -> Audit:
    """Audit a cohort and the folds of a configuration, with outcomes permuted if it says so.

    Args:
        config: The configuration.
        cohort: The cohort as read.
        available: Magnification names of each slide that has features; None to skip the check of features.
        magnifications: Names (`x20`) of the magnifications that every slide in `available` must have.

    Raises:
        ConfigError, DataError: The folds cannot be read or drawn, or see `audit`.
    """
    evaluation = config.evaluation
    folds: Callable[[], list[Split]] | list[Split]
    if evaluation.permute_outcomes is None:
        folds = functools.partial(make_splits, cohort, config.splits, evaluation.protocol)
    else:
        cohort, folds = permuted_folds(cohort, config.splits, evaluation)

    def of_part(part: Cohort, settings: CohortConfig, splits: Callable[[], list[Split]] | list[Split]) -> Audit:
        return audit(
            part, splits, available=available, magnifications=magnifications, n_bins=evaluation.n_bins,
            keep_zero_times=settings.keep_zero_times, keep_tissue=settings.keep_tissue,
        )  # fmt: skip

    with naming_the_permutation(evaluation):
        if cohort.strata is None:
            return of_part(cohort, config.cohort, folds)
        parts = [of_part(part, config.cohorts[part.name], []) for part in cohort.parts()]
        return joint_audit(cohort, parts, folds, evaluation.n_bins)

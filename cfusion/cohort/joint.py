"""Reads the cohorts of a configuration: one, or several that one model is trained on.

Each cohort is a stratum: its time bins come from its own training patients, and losses and scores compare its patients
only with each other, because cancers differ in their baseline hazard and in how long their patients were followed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cfusion.cohort.read import read_cohort
from cfusion.config import Config
from cfusion.errors import CohortError
from cfusion.types import Cohort


def read_cohorts(config: Config) -> Cohort:
    """Read the cohort of a configuration, or its `cohorts` as one with `strata`.

    Raises:
        ConfigError, CohortError: A table cannot be used, see `cfusion.cohort.read.read_cohort`; or a patient or a slide
            is in two cohorts.
    """
    if not config.cohorts:
        return read_cohort(config.cohort)
    return join_cohorts(config.cohort.name, [read_cohort(one) for one in config.cohorts.values()])


def join_cohorts(name: str, parts: Sequence[Cohort]) -> Cohort:
    """Join cohorts to one with `strata`, in their order.

    Args:
        name: Name of all together.
        parts: The cohorts, of one end point.

    Raises:
        CohortError: A patient is in two of them, or a slide belongs to patients of two.
    """
    _refuse_shared_patients(parts)
    slides = _joined_slides(parts)
    strata = {case: part.name for part in parts for case in part.cases.index}
    for part in parts:  # owners of slides whom no table has, for the audit to name
        strata |= {case: part.name for case in part.slides["case_id"] if case not in strata}
    cases = pd.concat([part.cases for part in parts])
    if not cases["event"].isna().any():
        cases["event"] = cases["event"].astype(bool)
    if "other_cause" in cases.columns:
        cases["other_cause"] = cases["other_cause"].eq(True)
    covariates = [part.covariates for part in parts if part.covariates is not None]
    return Cohort(
        name,
        cases.rename_axis("case_id"),
        slides,
        parts[0].endpoint,
        pd.concat(covariates).reindex(cases.index) if covariates else None,
        pd.Series(strata, dtype=object),
        {f"{name} of {part.name}": why for part in parts for name, why in part.unused_covariates.items()},
    )


def _refuse_shared_patients(parts: Sequence[Cohort]) -> None:
    """Refuse a patient whom two cohorts have, in upper or lower case."""
    places: dict[str, str] = {}
    for part in parts:
        cases = {str(case): str(case).strip().upper() for case in part.cases.index}
        both = [case for case, key in cases.items() if key in places]
        if both:
            raise CohortError(
                f"{len(both)} patients of {part.name} are in another cohort too, such as {both[0]}, who is also in "
                f"{places[cases[both[0]]]}.",
                "A patient belongs to one cohort, or one fold would train and score the same person; remove the rows "
                "from one of the tables.",
            )
        places |= dict.fromkeys(cases.values(), part.name)


def _joined_slides(parts: Sequence[Cohort]) -> pd.DataFrame:
    """Return the slides of all cohorts; those of a list that several of them share stand in it once."""
    kept: list[pd.DataFrame] = []
    owners: dict[str, str] = {}
    for part in parts:
        known = np.array([owners.get(slide) for slide in part.slides.index], dtype=object)
        listed = np.array([slide in owners for slide in part.slides.index], dtype=bool)
        differ = listed & (known != part.slides["case_id"].to_numpy(object))
        if differ.any():
            slide, owner = next(part.slides.loc[differ, ["case_id"]].itertuples(name=None))
            raise CohortError(
                f"slide {slide} belongs to {owners[slide]} in one cohort and to {owner} in {part.name}.",
                "Correct its rows.",
            )
        kept.append(part.slides[~listed])
        owners |= dict(zip(part.slides.index, part.slides["case_id"], strict=True))
    return pd.concat(kept).rename_axis("slide_id")

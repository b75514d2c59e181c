"""Train a finished run again from what it left, and compare."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cfusion.errors import DataError
from cfusion.extensions import check_trusted, file_code, names_file
from cfusion.run_folder import PREDICTIONS, is_done, read_run
from cfusion.runs.crossval import cross_validate
from cfusion.runs.run import Run
from cfusion.survival.predictions import read_predictions
from cfusion.yaml_files import differing_values

logger = logging.getLogger(__name__)

KEY = ["repeat", "fold", "case_id"]


@dataclass(frozen=True)
class Reproduction:
    """How a second training compares with the first.

    Attributes:
        cases: Predictions compared.
        largest: Largest absolute difference of a predicted value (risk, cut-off, survival, time bin); infinite where
            the predicted patients differ.
        differences: What differs in the provenance of the two, a line each.
    """

    cases: int
    largest: float
    differences: tuple[str, ...]


def reproduce_run(folder: Path, out: Path, *, trust_code: str | None = None) -> Reproduction:
    """Train the run in `folder` again into `out`, untracked, and compare the predictions.

    What differs in data, program and packages is said before the training starts. A model in
    a user's file is read where the run's configuration says; as the configuration came with the run, the file runs only
    where `trust_code` names its digest (see `FittedModel.load`).

    Raises:
        DataError: `folder` holds no finished run, or `out` is taken.
        UntrustedCodeError: The model is in a user's file, and `trust_code` does not name it.
    """
    run = read_run(folder)
    if names_file(run.config.model.name):
        code = file_code(run.config.model.name)
        check_trusted(code.path, code.digest, trust_code)
    if is_done(out):
        raise DataError(f"{out}: holds a finished run.", "Give another --out.")
    tracking = run.config.tracking.model_copy(update={"enabled": False, "register_as": None})
    config = run.config.model_copy(update={"output": out, "tracking": tracking})
    changed = differing_values(run.provenance, Run.prepare(config).provenance)
    differences = tuple(f"{name} was {before} and is {after}" for name, (before, after) in changed.items())
    for line in differences:
        logger.warning("%s: %s", folder, line)
    cross_validate(config)
    first, second = (read_predictions(path / PREDICTIONS).set_index(KEY).sort_index() for path in (folder, out))
    return Reproduction(len(first), _largest(first, second), differences)


def _largest(first: pd.DataFrame, second: pd.DataFrame) -> float:
    if not first.index.equals(second.index):
        return float("inf")
    values = first.select_dtypes(float).columns.drop("survival_months")
    return float((first[values] - second[values]).abs().to_numpy().max())

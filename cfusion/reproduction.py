"""Train a finished run again from what it left, and compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cfusion.crossval import cross_validate, is_done, prepare
from cfusion.errors import DataError
from cfusion.report.runs import read_run
from cfusion.survival.predictions import read_predictions

KEY = ["repeat", "fold", "case_id"]


@dataclass(frozen=True)
class Reproduction:
    """How a second training compares with the first.

    Attributes:
        cases: Predictions compared.
        largest: Largest absolute difference of a risk; infinite where the predicted patients differ.
        differences: What differs in the provenance of the two, a line each.
    """

    cases: int
    largest: float
    differences: tuple[str, ...]


def reproduce_run(folder: Path, out: Path) -> Reproduction:
    """Train the run in `folder` again into `out`, untracked, and compare the predictions.

    Raises:
        DataError: `folder` holds no finished run, or `out` is taken.
    """
    run = read_run(folder)
    if is_done(out):
        raise DataError(f"{out}: holds a finished run.", "Give another --out.")
    tracking = run.config.tracking.model_copy(update={"enabled": False, "register_as": None})
    config = run.config.model_copy(update={"output": out, "tracking": tracking})
    now = {**prepare(config).provenance}
    differences = tuple(
        f"{name}: {run.provenance.get(name)} then, {value} now"
        for name, value in now.items()
        if run.provenance.get(name) != value
    )
    cross_validate(config)
    first, second = (read_predictions(path / "predictions.csv").set_index(KEY).sort_index() for path in (folder, out))
    if not first.index.equals(second.index):
        return Reproduction(len(first), float("inf"), (*differences, "the predicted patients differ"))
    return Reproduction(len(first), float(np.abs(first["risk"] - second["risk"]).max()), differences)

"""A sweep whose runs are done without training: risks are drawn, folds and outcomes are those of a made-up cohort."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from factories import CohortFiles

from cfusion.cohort.read import read_cohort, write_outcomes
from cfusion.cohort.splits import make_splits, write_splits
from cfusion.files import digest_json, write_json
from cfusion.run_folder import DONE, OUTCOMES, PREDICTIONS, SEARCH, SPLITS, TRIALS, write_marker
from cfusion.runs.search import Trial
from cfusion.types import Cohort, Split
from launch.sweep.markers import add_attempt
from launch.sweep.plan import PlannedRun, SweepConfig, load_sweep, plan

AXES: dict[str, Any] = {
    "model": {"amil": {"model.name": "amil"}, "mean": {"model.name": "mean_mil"}},
    "seed": [1, 2],
}


def sweep_file(files: CohortFiles, folder: Path, **more: Any) -> Path:
    """The file of a sweep of two models and two seeds."""
    base = files.config(folder).model_dump(mode="json", exclude={"output"})
    values = {"name": "toy", "output": str(folder / "sweep"), "base": base, "axes": AXES, **more}
    path = folder / "sweep.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def finished(path: Path, *, left: int = 0) -> tuple[SweepConfig, list[PlannedRun]]:
    """The sweep of a file with all of its runs done but the last `left`."""
    sweep = load_sweep(path)
    runs = plan(sweep)
    for run in runs[: len(runs) - left]:
        finish(run)
    return sweep, runs


def truth_of(run: PlannedRun) -> tuple[Cohort, list[Split]]:
    """Patients and folds of a run."""
    cohort = read_cohort(run.config.cohort)
    return cohort, make_splits(cohort, run.config.splits, run.config.evaluation.protocol)


def drawn(cohort: Cohort, split: Split, run: PlannedRun, number: int = 0) -> pd.DataFrame:
    """Made-up predictions of a fold, better for amil than for others."""
    rng = np.random.default_rng(int(digest_json([run.name.rpartition("-")[0], split.fold, number])[:8], 16))
    cases = cohort.cases.loc[list(split.test)]
    strength = 2.0 if run.config.model.name == "amil" else 0.5
    risk = -strength * np.log(cases["time_months"].to_numpy()) + rng.normal(size=len(cases))
    return pd.DataFrame({
        "model": run.config.model.name, "cohort": cohort.name, "protocol": run.config.evaluation.protocol,
        "seed": run.config.seed, "repeat": split.repeat, "fold": split.fold, "case_id": cases.index, "risk": risk,
        "survival_months": cases["time_months"].to_numpy(), "event": cases["event"].to_numpy(),
    })  # fmt: skip


def finish(run: PlannedRun) -> None:
    """Write what a finished run leaves that its scores, its cost and the choices of its search come from."""
    folder = run.config.output
    cohort, splits = truth_of(run)
    folder.mkdir(parents=True)
    frame = pd.concat([drawn(cohort, split, run) for split in splits])
    frame.to_csv(folder / PREDICTIONS, index=False)
    write_outcomes(cohort, folder / OUTCOMES)
    write_splits(splits, folder / SPLITS)
    for split in splits:
        epochs = range(run.config.train.epochs)
        (folder / f"fold_{split.fold}").mkdir()
        pd.DataFrame({"fold": split.fold, "epoch": epochs}).to_csv(folder / f"fold_{split.fold}/history.csv")
    for split in splits if run.config.search else ():
        _write_trials(folder / SEARCH / f"fold_{split.fold}", cohort, split, run)
    provenance = {"code": run.code, "program": "test", "table_sha256": "0" * 64, "platform": "this machine"}
    write_marker(folder, run.name, {**provenance, "config": {"data": {"shards": "/somewhere"}}})
    cost = {"wall_s": 60.0, "cpu_s": 90.0, "gpu_s": 0.0, "energy_j": None, "together": 1, "host": "this-machine"}
    add_attempt(folder, {"outcome": "done", **cost})
    write_json(folder / DONE, {"identity": run.name, "registered_version": None})


def _write_trials(folder: Path, cohort: Cohort, split: Split, run: PlannedRun) -> None:
    """Three trials: one done, one failed, one done with the best inner score."""
    folder.mkdir(parents=True)
    values = [{"train.lr": lr, "model.embed_dim": 16} for lr in (0.001, 0.01, 0.0025)]
    trials = [
        Trial(0, values[0], "done", (0.6,), 0.6), Trial(1, values[1], "failed", cause="the loss is not finite"),
        Trial(2, values[2], "done", (0.7,), 0.7),
    ]  # fmt: skip
    write_json(folder / TRIALS, [asdict(trial) for trial in trials])
    for trial in trials:
        if trial.state == "done":
            scored = drawn(cohort, split, run, trial.number)
            scored.to_csv(folder / f"trial_{trial.number}.csv", index=False)

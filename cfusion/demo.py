"""The main job on phantom cohorts: slides, tiles, embeddings, shards, training, evidence, report."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cfusion.data.store import FeatureStore
from cfusion.report.runs import report_runs
from cfusion.survival.metrics import concordance
from launch.sweep.execute import Execution, run_all
from launch.sweep.plan import PlannedRun, SweepConfig, plan
from preprocess.encoders.weights import file_name
from preprocess.extraction import preprocess_slides
from preprocess.packing import pack_store
from preprocess.phantom.draw import PHANTOMS, PhantomCohort, PhantomSpec, draw_cohort
from preprocess.settings import PreprocessConfig

logger = logging.getLogger(__name__)

SETTINGS: dict[str, Any] = {
    "model": {"embed_dim": 32, "num_heads": 4},
    "data": {"cache": "ram"},
    "train": {
        "epochs": 30,
        "patience": 10,
        "monitor": "loss",
        "ema": 0.9,
        "lr": 2e-3,
        "warmup_fraction": 0.1,
        "weight_decay": 0.05,
        "micro_batch": 32,
    },
    "parallel": {"global_batch": 32},
}
"""A small network, trained briefly: 150 bags per fold support no more."""

MODELS: dict[str, dict[str, Any]] = {
    "crossfusion": {"model.name": "crossfusion", "model.options": {"dropout": 0.1}},
    "amil": {"model.name": "amil", "train.lr": 1e-3},
}
"""The model and the baseline, each with its own settings."""


@dataclass(frozen=True)
class DemoCost:
    """What a new demo takes, estimated from measurements.

    Attributes:
        minutes: Time, if the cores do nothing else.
        gigabytes: Disk.
    """

    minutes: float
    gigabytes: float

    @classmethod
    def of(cls, cases: int, slots: int) -> DemoCost:
        """Estimate from two demos: 40 patients took 310 s of processor time and 222 MB, 240 took 330 s on two cores."""
        return cls((120 + 0.88 * cases) / 60 * 2 / min(2, max(1, slots)), (35 + 4.7 * cases) / 1000)

    def describe(self, out: Path) -> str:
        """Return the cost and the free disk as words."""
        existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(existing).free / 1e9
        return (
            f"about {self.minutes:.0f} minutes if the cores do nothing else, {self.gigabytes:.1f} GB of disk "
            f"({free:.1f} GB free); finished steps are skipped"
        )


@dataclass(frozen=True)
class DemoResult:
    """The report of the demo and its scores.

    Attributes:
        page: The report.
        summary: Its table.
        slides: Slides of the first cohort.
        run: CrossFusion's run on them.
    """

    page: Path
    summary: pd.DataFrame
    slides: Path
    run: Path


def run_demo(out: Path, *, cases: int, slots: int, encoder: str) -> DemoResult:
    """Run the demo in `out`; safe to re-run after an interruption: finished steps are skipped.

    Args:
        out: Folder for all output of the demo.
        cases: Patients per cohort.
        slots: Trainings at the same time.
        encoder: Encoder of the tiles.
    """
    oracle: dict[str, float] = {}
    for spec in PHANTOMS:
        cohort = _prepare(dataclasses.replace(spec, patients=cases), out / spec.name, slots, encoder)
        oracle[spec.name] = _oracle(cohort)
        logger.info("%s: the planted risk itself has C %.3f (the oracle)", spec.name, oracle[spec.name])
    runs = plan_demo(out, encoder)
    run_all(runs, Execution(slots=slots), out)
    page = report_runs(
        [run.config.output for run in runs], out / "report", title="CrossFusion demo on phantom cohorts", oracle=oracle
    )
    return DemoResult(
        page, pd.read_json(out / "report" / "summary.json"), out / PHANTOMS[0].name / "slides", runs[0].config.output
    )


def plan_demo(out: Path, encoder: str) -> list[PlannedRun]:
    """Plan two cohorts × two models × real and permuted outcomes; the models of real outcomes are registered."""
    sweep = SweepConfig(
        name="demo",
        output=out,
        base={
            **SETTINGS,
            "data": {**SETTINGS["data"], "encoder": file_name(encoder)},
            "tracking": {"uri": f"sqlite:///{(out / 'mlflow.db').resolve()}"},
        },
        axes={
            "cohort": {
                spec.name: {
                    "cohort.name": spec.name,
                    "cohort.table": str(out / spec.name / "cohort.csv"),
                    "data.shards": str(out / spec.name / "shards"),
                }
                for spec in PHANTOMS
            },
            "model": MODELS,
            "outcomes": {"real": {}, "permuted": {"evaluation.permute_outcomes": 1}},
        },
    )
    return [_registered(run) for run in plan(sweep)]


def _registered(run: PlannedRun) -> PlannedRun:
    if run.config.evaluation.permute_outcomes is not None:
        return run
    name = f"{run.config.cohort.name}-{run.config.model.name}"
    tracking = run.config.tracking.model_copy(update={"register_as": name})
    return dataclasses.replace(run, config=run.config.model_copy(update={"tracking": tracking}))


def _prepare(spec: PhantomSpec, folder: Path, threads: int, encoder: str) -> PhantomCohort:
    """Make the slides, features and shards of one cohort; finished ones are kept."""
    cohort = draw_cohort(spec, folder, workers=threads)
    config = PreprocessConfig(slides=cohort.slides, store=folder / "features", encoders=(encoder,), threads=threads)
    preprocess_slides(config, strict=True)
    pack_store(FeatureStore.open(config.store, file_name(encoder)), folder / "shards")
    return cohort


def _oracle(cohort: PhantomCohort) -> float:
    """Return Harrell's C of the planted log-hazard, which a perfect model would reach."""
    outcomes = pd.read_csv(cohort.table).drop_duplicates("patient").set_index("patient")
    truth = pd.read_csv(cohort.truth).set_index("case_id").loc[outcomes.index]
    return concordance(outcomes["time"], outcomes["event"].astype(bool), truth["log_hazard"]).cindex

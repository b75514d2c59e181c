"""One report from the folders of finished runs, each as `cfusion train` leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cfusion.config import Config, load_config
from cfusion.errors import DataError
from cfusion.files import read_json
from cfusion.report.context import ReportContext
from cfusion.report.write import write_report
from cfusion.run import OUTCOMES
from cfusion.splits import read_splits
from cfusion.survival.predictions import read_predictions
from cfusion.survival.score import Key, Scores, score
from cfusion.types import Cohort


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: Where it lies.
        config: Its configuration.
        audit: What the audit found, `Audit.to_json()`.
        provenance: Digests, versions and seeds.
    """

    folder: Path
    config: Config
    audit: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def key(self) -> Key:
        """Cohort, model and protocol."""
        return self.config.cohort.name, self.config.model.name, self.config.evaluation.protocol

    def scores(self, bootstrap: int) -> Scores:
        """Score its predictions."""
        return score(
            read_predictions(self.folder / "predictions.csv"),
            self.cohort(),
            splits=read_splits(self.folder / "splits"),
            bootstrap=bootstrap,
            horizons=self.config.evaluation.horizons_months,
        )

    def cohort(self) -> Cohort | None:
        """Its patients with the outcomes that it was trained with, without slides; None where an older program ran.

        Raises:
            DataError: Their table cannot be read.
        """
        path = self.folder / OUTCOMES
        if not path.exists():
            return None
        try:
            outcomes = pd.read_csv(path, dtype={"case_id": str}, keep_default_na=False, float_precision="round_trip")
            cases = outcomes.set_index("case_id").astype({"time_months": float, "event": bool})
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{path}: is not the table of a run's outcomes ({error}).") from error
        slides = pd.DataFrame({"case_id": []}, index=pd.Index([], name="slide_id"))
        return Cohort(self.config.cohort.name, cases, slides, self.config.cohort.endpoint)

    def curves(self) -> pd.DataFrame:
        """Learning curves of its folds, with the run's cohort, model and protocol."""
        frames = [pd.read_csv(path) for path in sorted(self.folder.glob("*fold_*/history.csv"))]
        cohort, model, protocol = self.key
        table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"fold": [], "epoch": []})
        return table.assign(cohort=cohort, model=model, protocol=protocol)


def read_run(folder: Path) -> Run:
    """Read what a run left.

    Raises:
        DataError: The folder holds no finished run.
    """
    if not (folder / "done.json").is_file():
        raise DataError(f"{folder}: holds no finished run.", "Give the output folder of cfusion train.")
    return Run(
        folder,
        load_config(folder / "config.yaml"),
        read_json(folder / "audit.json"),
        read_json(folder / "run.json")["provenance"],
    )


def report_runs(folders: Sequence[Path], out: Path, *, title: str, oracle: dict[str, float] | None = None) -> Path:
    """Score finished runs and write one report; runs on permuted outcomes become the null beside the others.

    Args:
        folders: Output folders of runs; seeds of one cohort, model and protocol are scored together.
        out: Folder of the report.
        title: Heading.
        oracle: Per cohort, the C-index of the planted risk, where the cohort is made up.

    Returns:
        The page.

    Raises:
        DataError: A folder holds no finished run, or none has real outcomes.
    """
    runs = [read_run(folder) for folder in folders]
    real = [run for run in runs if run.config.evaluation.permute_outcomes is None]
    permuted = [run for run in runs if run.config.evaluation.permute_outcomes is not None]
    if not real:
        raise DataError("report: none of the runs has real outcomes.", "Add a run without evaluation.permute_outcomes.")
    grouped: dict[Key, list[Run]] = {}
    for run in real:
        grouped.setdefault(run.key, []).append(run)
    null: dict[Key, list[float]] = {}
    for run in permuted:
        null.setdefault(run.key, []).append(float(run.scores(bootstrap=0).summary["cindex_pooled"].iloc[0]))
    context = ReportContext(
        title=title,
        audits={run.config.cohort.name: run.audit for run in real},
        provenance={str(run.folder.name): run.provenance for run in real},
        curves=pd.concat([run.curves() for run in real], ignore_index=True),
        oracle={key: oracle[key[0]] for key in grouped if oracle and key[0] in oracle},
        permuted={key: sum(values) / len(values) for key, values in null.items()},
    )
    return write_report([_together(runs) for runs in grouped.values()], out, context=context)


def _together(runs: Sequence[Run]) -> Scores:
    """Runs that differ in seed alone are one result."""
    first = runs[0]
    bootstrap = first.config.evaluation.bootstrap
    if len(runs) == 1:
        return first.scores(bootstrap)
    tables = [read_predictions(run.folder / "predictions.csv") for run in runs]
    return score(
        pd.concat(tables, ignore_index=True),
        first.cohort(),
        splits=read_splits(first.folder / "splits"),
        bootstrap=bootstrap,
        horizons=first.config.evaluation.horizons_months,
    )

"""A run and its folder: what it will do, what it has done, and the scores of all its folds."""

from __future__ import annotations

import dataclasses
import logging
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

import cfusion
from cfusion.cohort.audit import Audit, audit
from cfusion.cohort.read import OUTCOMES, read_cohort, write_outcomes
from cfusion.cohort.splits import make_splits, splits_digest, write_splits
from cfusion.config import Config
from cfusion.data.shards import ShardDataset
from cfusion.errors import ConfigError
from cfusion.files import atomic_path, digest_file, digest_json, read_json, write_json, write_text
from cfusion.program import code_digest
from cfusion.report import figures
from cfusion.report.standalone import run_figures, write_figures
from cfusion.survival.predictions import read_predictions
from cfusion.survival.score import Scores, score
from cfusion.tracking import TrackedRun
from cfusion.tracking.facts import run_inputs, run_name, run_params, run_tags, version_tags
from cfusion.tracking.machine import write_environment
from cfusion.tracking.model_registry import check_registration
from cfusion.training.folds import FoldRun, open_run_shards
from cfusion.training.model_check import check_own_model
from cfusion.training.runtime import Runtime
from cfusion.types import Cohort, Split, magnification_name
from cfusion.yaml_files import differences

MARKER = "run.json"
"""File of a run's folder that says which run it is of."""

logger = logging.getLogger(__name__)

_FINDINGS_SHOWN = 10
"""Of a kind, when a run starts; `audit.json` has them all."""


@dataclass(frozen=True)
class PreparedRun:
    """What a run will do, before anything is trained.

    Attributes:
        config: Its configuration.
        audit: The patients and folds that are left, and every finding.
        dataset: The shards.
        provenance: Digests, versions and seeds that say what the numbers came from.
    """

    config: Config
    audit: Audit
    dataset: ShardDataset
    provenance: dict[str, Any]

    @property
    def cohort(self) -> Cohort:
        """The patients that are left after the audit."""
        return self.audit.cohort

    @property
    def splits(self) -> list[Split]:
        """The folds that are left after the audit."""
        return list(self.audit.splits)

    @property
    def identity(self) -> str:
        """Digest of all that decides the numbers."""
        return digest_json(_deciding(self.provenance))


def prepare(config: Config) -> PreparedRun:
    """Read cohort, shards and splits of a run and audit them.

    Raises:
        ConfigError, DataError: Something cannot be read, a model of the user's own does not work, or
            `evaluation.strict` is set and the audit found something.
    """
    cohort = read_cohort(config.cohort)
    dataset = open_run_shards(config)
    code = check_own_model(config, dataset.index.dim)
    names = [magnification_name(m) for m in config.data.magnifications]
    found = audit(
        cohort,
        make_splits(cohort, config.splits, config.evaluation.protocol),
        available={slide: {n for n, count in dataset.tiles(slide).items() if count} for slide in dataset.slide_ids},
        magnifications=names,
        n_bins=config.evaluation.n_bins,
        keep_zero_times=config.cohort.keep_zero_times,
    )
    if config.evaluation.strict:
        found.raise_if_strict()
    if config.evaluation.permute_outcomes is not None:
        found = dataclasses.replace(found, cohort=permuted(found.cohort, config.evaluation.permute_outcomes))
    provenance = {
        "program": cfusion.__version__,
        "code": code_digest(),
        "config": config.model_dump(mode="json", exclude={"output", "tracking"}),
        **({} if code is None else {"model_code": code.identity}),
        "table_sha256": digest_file(config.cohort.table),
        "shards_digest": dataset.index.digest,
        "splits_digest": splits_digest(found.splits),
        "packages": {"python": platform.python_version(), "torch": torch.__version__},
        "platform": platform.platform(),
    }
    return PreparedRun(config, found, dataset, provenance)


def _deciding(provenance: dict[str, Any]) -> dict[str, Any]:
    """What of it decides the numbers."""
    return {key: value for key, value in provenance.items() if key not in {"platform", "packages"}}


def describe(run: PreparedRun) -> str:
    """What a run will do, as text for the terminal."""
    lines = [
        f"{run.cohort.name}: {len(run.cohort.cases)} patients, {int(run.cohort.cases['event'].sum())} events, "
        f"{len(run.cohort.slides)} slides, embeddings of {run.dataset.index.encoder} ({run.dataset.index.dim} wide)"
    ]
    lines += [f"audit: {finding}" for finding in run.audit.findings]
    lines += [
        f"fold {split.fold}: {len(split.train)} train, {len(split.validation)} choose, {len(split.test)} are scored"
        for split in run.splits
    ]
    return "\n".join(lines)


def permuted(cohort: Cohort, seed: int) -> Cohort:
    """The cohort with each outcome (time and event together) dealt to a patient at random: nothing can be learnt."""
    order = np.random.default_rng(seed).permutation(len(cohort.cases))
    outcomes = cohort.cases[["time_months", "event"]].to_numpy()[order]
    cases = cohort.cases.assign(time_months=outcomes[:, 0].astype(float), event=outcomes[:, 1].astype(bool))
    return dataclasses.replace(cohort, cases=cases)


def open_run(runtime: Runtime, config: Config) -> PreparedRun:
    """Read a run's data, and take its folder.

    Raises:
        ConfigError: Ranks disagree on the run, the folder holds another, or some rank does not see it.
    """
    run = prepare(config)
    runtime.agree("configuration, data or program version", run.identity)
    if runtime.is_main:
        for line in run.audit.lines(_FINDINGS_SHOWN):
            logger.info("audit: %s", line)
        check_registration(config, run.dataset.index)
        _claim(run)
    runtime.barrier()
    blind = [rank for rank, sees in enumerate(runtime.gather([(config.output / MARKER).is_file()])) if not sees]
    if blind:
        raise ConfigError(
            f"{config.output}: rank 0 has made this folder, and ranks {blind} do not see it.",
            "Give an output on a disk that all nodes share.",
            topic="world",
        )
    return run


def scored_run(runtime: Runtime, run: PreparedRun, parent: TrackedRun) -> Scores:
    """Score the folds of a run on rank 0, and write what stands beside them; every rank gets the scores."""
    scores = [_scored(run, parent)] if runtime.is_main else []
    return runtime.from_main(scores)[0]


def _scored(run: PreparedRun, parent: TrackedRun) -> Scores:
    frames = [read_predictions(fold_folder(run, split) / "predictions.csv") for split in run.splits]
    scores = score(
        pd.concat(frames, ignore_index=True), run.cohort, run.splits,
        bootstrap=run.config.evaluation.bootstrap, horizons=run.config.evaluation.horizons_months,
    )  # fmt: skip
    _finish(run, scores, parent)
    return scores


def mark_done(runtime: Runtime, run: PreparedRun, parent: TrackedRun) -> None:
    """Write the marker of a finished run, last of all."""
    if runtime.is_main:
        name = run.config.tracking.register_as
        version = parent.registered(name) if name else None
        write_json(run.config.output / "done.json", {"identity": run.identity, "registered_version": version})
    runtime.barrier()


def is_done(folder: Path) -> bool:
    """Whether a finished run lies in `folder`; its marker is written last."""
    return (folder / "done.json").is_file()


def _claim(run: PreparedRun) -> None:
    """Take the output folder for this run, or refuse the folder of another."""
    folder = run.config.output
    marker = folder / MARKER
    if marker.exists():
        other = read_json(marker)
        if other["identity"] != run.identity:
            changed = differences(_deciding(other["provenance"]), _deciding(run.provenance))
            raise ConfigError(
                f"{folder}: holds a run that differs in {', '.join(changed[:5])}.",
                "Give another output=..., or delete the folder.",
                topic="checkpoint",
            )
        return
    write_text(folder / "config.yaml", yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False))
    write_json(folder / "audit.json", run.audit.to_json())
    write_splits(run.splits, folder / "splits")
    write_outcomes(run.cohort, folder / OUTCOMES)
    write_json(marker, {"identity": run.identity, "provenance": run.provenance})


def tracked_run(runtime: Runtime, run: PreparedRun) -> TrackedRun:
    """The run in MLflow, begun or gone on with, on rank 0 alone."""
    config, encoder = run.config, run.dataset.index.encoder
    tracking = config.tracking if runtime.is_main else config.tracking.model_copy(update={"enabled": False})
    tracked = TrackedRun.begin(
        tracking,
        config.output,
        run_name(config, encoder),
        run_params(config, run.provenance),
        run_tags(config, encoder),
    )
    tracked.inputs(run_inputs(config, run.cohort, run.dataset.index, run.provenance))
    return tracked


def fold_folder(run: PreparedRun, split: Split) -> Path:
    """Where a fold's model, predictions and history lie, once they are there."""
    name = f"fold_{split.fold}" if run.config.splits.repeats == 1 else f"repeat_{split.repeat}_fold_{split.fold}"
    return run.config.output / name


def write_fold(folder: Path, result: FoldRun) -> None:
    """Write what a fold gave, whole or not at all."""
    with atomic_path(folder) as temporary:
        result.model.save(temporary / "model")
        result.predictions.to_csv(temporary / "predictions.csv", index=False)
        result.history.to_csv(temporary / "history.csv", index=False)
        curves = figures.learning_curves(result.history, f"fold {result.split.fold}")
        write_figures(temporary, {"learning_curves": curves})
        write_json(temporary / "fold.json", {"best_epoch": result.best_epoch, "fold": result.split.fold})


def _finish(run: PreparedRun, scores: Scores, parent: TrackedRun) -> None:
    folder = run.config.output
    write_text(folder / "predictions.csv", scores.predictions.to_csv(index=False))
    write_text(folder / "scores.csv", scores.folds.to_csv(index=False))
    write_text(folder / "summary.csv", scores.summary.to_csv(index=False))
    histories = [pd.read_csv(path) for path in sorted(folder.glob("*fold_*/history.csv"))]
    write_figures(folder / "figures", run_figures(scores, pd.concat(histories, ignore_index=True)))
    write_environment(folder / "environment")
    row = scores.summary.iloc[0]
    parent.log({k: float(row[k]) for k in ("cindex_pooled", "cindex_mean", "cindex_std", "cindex_low", "cindex_high")})
    tables = (OUTCOMES, "predictions.csv", "scores.csv", "summary.csv")
    for name in ("config.yaml", "audit.json", MARKER, *tables):
        parent.artifacts(folder / name)
    for name in ("figures", "environment", "splits"):
        parent.artifacts(folder / name, under=name)
    if run.config.tracking.register_as:
        parent.register(run.config.tracking.register_as, version_tags(run.config, row))

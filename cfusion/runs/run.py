"""A run as an object: open its folder, train fold by fold, score, and mark it done."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import cfusion
from cfusion import run_folder
from cfusion.cohort.audit import Audit
from cfusion.cohort.audited import audited
from cfusion.cohort.joint import read_cohorts
from cfusion.cohort.read import write_covariates, write_outcomes
from cfusion.cohort.splits import splits_digest, write_splits
from cfusion.config import CohortConfig, Config, ParallelConfig, validate
from cfusion.data.shards import ShardDataset
from cfusion.errors import ConfigError
from cfusion.extensions import OwnCode
from cfusion.files import atomic_path, digest_file, digest_json, write_json, write_text
from cfusion.models.registry import model_code
from cfusion.program import code_digest
from cfusion.report import figures
from cfusion.report.standalone import run_figures, write_figures
from cfusion.runs.arrangement import Arrangement, arrange, blank_network
from cfusion.runs.run_starts import run_starts
from cfusion.survival.predictions import read_predictions
from cfusion.survival.score import Scores, score
from cfusion.tracking import TrackedRun
from cfusion.tracking.facts import run_inputs, run_name, run_params, run_tags, version_tags
from cfusion.tracking.machine import write_environment
from cfusion.training.folds import FoldRun, open_run_shards, with_held_magnifications
from cfusion.training.model_check import check_own_model
from cfusion.training.runtime import Runtime
from cfusion.training.schedule import steps_in_epoch
from cfusion.training.start import StartModel, check_starts
from cfusion.training.world import check_precision
from cfusion.types import Cohort, Split, magnification_name
from cfusion.yaml_files import differences

logger = logging.getLogger(__name__)

_FINDINGS_SHOWN = 10
"""Findings of one kind that are logged when a run starts; `audit.json` has all of them."""


@dataclass(frozen=True)
class Run:
    """A run: its data after the audit, and its folder.

    `prepare` reads and audits the data and writes nothing; `open` also takes the folder.

    Attributes:
        config: Its configuration.
        audit: The patients and folds that are left, and every finding.
        dataset: The shards.
        provenance: Digests, versions and seeds that say what the numbers came from.
        code: The model's code, read once for all folds; None for a model of the program.
        starts: The models that the folds start from, read once; empty for drawn weights.
    """

    config: Config
    audit: Audit
    dataset: ShardDataset
    provenance: dict[str, Any]
    code: OwnCode | None = None
    starts: tuple[StartModel, ...] = ()

    @classmethod
    def prepare(cls, config: Config) -> Run:
        """Read cohort, shards and splits and audit them.

        Raises:
            ConfigError, DataError: Something cannot be read, a model of the user's own does not work, a fold cannot
                start from `train.start_from`, or `evaluation.strict` is set and the audit found something.
        """
        cohort = read_cohorts(config)
        dataset = open_run_shards(config)
        config = with_held_magnifications(config, dataset)
        code = check_own_model(config, dataset.index.dim)
        available = {slide: {n for n, count in dataset.tiles(slide).items() if count} for slide in dataset.slide_ids}
        found = audited(config, cohort, available, [magnification_name(m) for m in config.data.magnifications])
        if config.evaluation.strict:
            found.raise_if_strict()
        starts = () if config.train.start_from is None else run_starts(config)
        if starts:
            check_starts(config, starts, found.splits, dataset.index, blank_network(config, dataset, code))
        return cls(config, found, dataset, _provenance(config, code, dataset, found, starts), code, starts)

    @classmethod
    def open(cls, runtime: Runtime, config: Config, same_code: str | None = None) -> Run:
        """Read a run's data, and take its folder.

        Args:
            runtime: The processes.
            config: The run.
            same_code: Digest of other code whose numbers are known to be the same; a run that it began is continued.

        Raises:
            ConfigError: Ranks disagree on the run, the folder holds another, or some rank does not see it.
        """
        run = cls.prepare(config.with_precision(runtime.parallel.precision))
        runtime.agree("configuration, data or program version", run.identity)
        if runtime.is_main:
            for line in run.audit.lines(_FINDINGS_SHOWN):
                logger.info("audit: %s", line)
            for note in config.notes:
                logger.warning("%s: %s", config.output, note)
            if config.tracking.enabled and (name := config.tracking.register_as):
                from cfusion.tracking.model_registry import check_registration  # its imports take most of a second

                check_registration(config, name, run.dataset.index)
            run._claim(same_code)
        runtime.barrier()
        blind = [rank for rank, sees in enumerate(runtime.gather([run_folder.is_run(run.folder)])) if not sees]
        if blind:
            raise ConfigError(
                f"{run.folder}: rank 0 has made this folder, and ranks {blind} do not see it.",
                "Give an output on a disk that all nodes share.",
                topic="world",
            )
        return run

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.config.output

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

    def arrangement(self, runtime: Runtime | None = None) -> Arrangement:
        """Return how the folds are trained; None: by one process on this machine."""
        one_cpu_process = not torch.cuda.is_available() if runtime is None else runtime.is_one_cpu_process
        return arrange(
            self.config, self.dataset, len(self.splits),
            threads=torch.get_num_threads(), one_cpu_process=one_cpu_process, code=self.code,
        )  # fmt: skip

    def describe(self) -> str:
        """Return what the run will do, as text for the terminal."""
        cohort, index = self.cohort, self.dataset.index
        lines = [
            f"{cohort.name}: {len(cohort.cases)} patients, {int(cohort.cases['event'].sum())} events, "
            f"{len(cohort.slides)} slides, embeddings of {index.encoder} ({index.dim} wide)"
        ]
        lines += [
            f"  {part.name}: {len(part.cases)} patients, {int(part.cases['event'].sum())} events"
            for part in cohort.parts() if cohort.strata is not None
        ]  # fmt: skip
        lines += [f"note: {note}" for note in self.config.notes]
        lines += [f"audit: {finding}" for finding in self.audit.findings]
        return "\n".join([*lines, *_fold_lines(self.splits), self._amount(), self.arrangement().describe()])

    def _amount(self) -> str:
        """Say how many models are trained, and for how long: epochs and steps."""
        train, search, splits = self.config.train, self.config.search, self.splits
        slides = self.cohort.slides_of(list(self.cohort.cases.index)) if self.config.data.unit == "slide" else {}
        steps = sum(
            train.epochs * steps_in_epoch(self.config, sum(len(slides.get(case, [case])) for case in split.train))
            for split in splits
        )
        repeats = len({split.repeat for split in splits})
        of = f"{repeats} repeats × {len(splits) // repeats} folds" if repeats > 1 else f"{len(splits)} folds"
        trials = 1
        if search is not None:
            trials, of = search.trials, f"{of} × {search.trials} trials"
        most = "" if search is None and self.config.evaluation.protocol == "fixed-epoch" else "at most "
        return (
            f"models: {len(splits) * trials} ({of}), {most}{train.epochs} epochs each: {most}{steps * trials:,} steps "
            f"of {self.config.parallel.global_batch} bags"
        )

    def _claim(self, same_code: str | None) -> None:
        """Take the output folder for this run, or refuse the folder of another."""
        folder, code = self.folder, self.provenance["code"]
        if not run_folder.is_run(folder):
            run_folder.write_config(folder, self.config)
            write_json(folder / run_folder.AUDIT, self.audit.to_json())
            write_splits(self.splits, folder / run_folder.SPLITS)
            write_outcomes(self.cohort, folder / run_folder.OUTCOMES)
            run_folder.write_marker(folder, self.identity, self.provenance, same_code)
            return
        marker = run_folder.read_marker(folder)
        there, here = _comparable(marker["provenance"], self.provenance)
        begun_by = there.pop("code", None)
        here.pop("code", None)
        if there != here:
            raise ConfigError(
                f"{folder}: holds a run that differs in {', '.join(differences(there, here)[:5])}.",
                "Give another output=..., or delete the folder.",
                topic="checkpoint",
            )
        self._remark_packages(marker)
        if code in run_folder.codes(marker):
            return
        if same_code is None or same_code not in run_folder.codes(marker):
            raise ConfigError(
                f"{folder}: holds a run that other code began (code {begun_by} there, {code} here).",
                f"If you know that both give the same numbers, continue it with --same-code {begun_by}; in a sweep, "
                f"with `code: {begun_by}` in its file. Otherwise give another output=..., or delete the folder.",
                topic="identity",
            )
        logger.warning("%s: code %s continues a run that code %s began", folder, code, begun_by)
        run_folder.add_continuation(folder, {"code": code, "program": self.provenance["program"]})

    def _remark_packages(self, marker: Mapping[str, Any]) -> None:
        """Say that other versions of Python or torch continue the run, and record it once."""
        recorded = [marker["provenance"], *marker.get("continued_by", [])]
        there = next(entry["packages"] for entry in reversed(recorded) if "packages" in entry)
        here = self.provenance["packages"]
        if there == here:
            return
        changed = ", ".join(differences(there, here))
        logger.warning("%s: other versions continue this run; its numbers may differ: %s", self.folder, changed)
        run_folder.add_continuation(
            self.folder, {"code": self.provenance["code"], "program": self.provenance["program"], "packages": here}
        )

    def check_code(self, runtime: Runtime) -> None:
        """Refuse to continue where the file of the model has changed since the run was opened.

        Raises:
            ConfigError: It has, or ranks disagree on it.
        """
        now = model_code(self.config.model.name)
        runtime.agree("model file", digest_json(None if now is None else now.identity))
        if self.code is not None and (now is None or now.identity != self.code.identity):
            raise ConfigError(
                f"{self.code.path}: was edited while the run in {self.folder} trained with it (SHA-256 "
                f"{self.code.digest[:12]} then).",
                "Restore the file and start the run again, which trains the folds that are missing; or give another "
                "output=... for the edited model.",
                topic="own-model",
            )

    def fold_folder(self, split: Split) -> Path:
        """Return where a fold's model, predictions and history are once the fold is finished."""
        return self.folder / run_folder.fold_name(split.fold, split.repeat, self.config.splits.repeats)

    def fold_checkpoints(self, split: Split) -> Path:
        """Return where a fold's checkpoints are while it trains."""
        return self.folder / run_folder.CHECKPOINTS / self.fold_folder(split).name

    def has_fold(self, runtime: Runtime, split: Split) -> bool:
        """Return whether a fold is finished, the same on every rank."""
        return bool(runtime.from_main(run_folder.is_complete(self.fold_folder(split))))

    def write_fold(
        self, runtime: Runtime, result: FoldRun, folder: Path | None = None, chosen: Mapping[str, Any] | None = None
    ) -> None:
        """Write the result of a fold on rank 0, completely or not at all; every rank waits for it.

        Args:
            runtime: The processes.
            result: The result.
            folder: Where to; None: the fold's folder. An earlier result there is replaced.
            chosen: Settings that the fold has chosen.
        """
        if runtime.is_main:
            with atomic_path(folder or self.fold_folder(result.split)) as temporary:
                result.model.save(temporary / run_folder.MODEL)
                result.predictions.to_csv(temporary / run_folder.PREDICTIONS, index=False)
                result.history.to_csv(temporary / run_folder.HISTORY, index=False)
                curves = figures.learning_curves(result.history, f"fold {result.split.fold}")
                write_figures(temporary, {"learning_curves": curves})
                write_json(temporary / run_folder.FOLD, {
                    "best_epoch": result.best_epoch, "fold": result.split.fold,
                    **run_folder.predictions_digest(temporary),
                    **({} if chosen is None else {"chosen": dict(chosen)}),
                })  # fmt: skip
        runtime.barrier()

    def tracked(self, runtime: Runtime) -> TrackedRun:
        """Begin or resume the run in MLflow, on rank 0 only."""
        config, encoder = self.config, self.dataset.index.encoder
        tracking = config.tracking if runtime.is_main else config.tracking.model_copy(update={"enabled": False})
        tracked = TrackedRun.begin(
            tracking,
            self.folder,
            run_name(config, encoder),
            run_params(config, self.provenance),
            run_tags(config, encoder),
        )
        tracked.inputs(run_inputs(config, self.cohort, self.dataset.index, self.provenance))
        return tracked

    def score(self, runtime: Runtime, parent: TrackedRun) -> Scores:
        """Score the folds on rank 0, and write the tables and figures of the run; every rank gets the scores."""
        return runtime.on_main(lambda: self._scored(parent))

    def _scored(self, parent: TrackedRun) -> Scores:
        frames = [read_predictions(run_folder.predictions_file(self.fold_folder(split))) for split in self.splits]
        scores = score(
            pd.concat(frames, ignore_index=True), self.cohort, self.splits,
            bootstrap=self.config.evaluation.bootstrap, horizons=self.config.evaluation.horizons_months,
        )  # fmt: skip
        self._write_scores(scores)
        self._track_scores(scores, parent)
        return scores

    def _write_scores(self, scores: Scores) -> None:
        folder = self.folder
        write_covariates(self.cohort, folder / run_folder.COVARIATES)
        write_text(folder / run_folder.PREDICTIONS, scores.predictions.to_csv(index=False))
        write_text(folder / run_folder.SCORES, scores.folds.to_csv(index=False))
        write_text(folder / run_folder.SUMMARY, scores.summary.to_csv(index=False))
        histories = pd.concat(run_folder.histories(folder), ignore_index=True)
        write_figures(folder / run_folder.FIGURES, run_figures(scores, histories))
        write_environment(folder / run_folder.ENVIRONMENT)

    def _track_scores(self, scores: Scores, parent: TrackedRun) -> None:
        row = scores.summary.iloc[0]
        logged = ("cindex_within", "within_low", "within_high", "cindex_mean", "cindex_std", "cindex_pooled",
                  "cindex_low", "cindex_high", "clinical_c", "added_c", "added_c_low", "added_c_high")  # fmt: skip
        parent.log({key: float(row[key]) for key in logged if key in row})
        tables: tuple[str, ...] = (run_folder.OUTCOMES, run_folder.PREDICTIONS, run_folder.SCORES, run_folder.SUMMARY)
        if self.cohort.covariates is not None:
            tables = (*tables, run_folder.COVARIATES)
        for name in (run_folder.CONFIG, run_folder.AUDIT, run_folder.RUN, *tables):
            parent.artifacts(self.folder / name)
        for name in (run_folder.FIGURES, run_folder.ENVIRONMENT, run_folder.SPLITS):
            parent.artifacts(self.folder / name, under=name)
        if self.config.tracking.register_as:
            parent.register(self.config.tracking.register_as, version_tags(self.config, row))

    def mark_done(self, runtime: Runtime, parent: TrackedRun) -> None:
        """Write the marker of a finished run, last of all."""
        if runtime.is_main:
            name = self.config.tracking.register_as
            run_folder.write_done(self.folder, self.identity, parent.registered(name) if name else None)
        runtime.barrier()


def with_begun_precision(config: Config) -> Config:
    """Return the configuration with the precision in which its run was begun, where it has `parallel.precision=auto`.

    Raises:
        ConfigError: This device lacks that precision.
    """
    if config.parallel.precision != "auto" or not run_folder.is_run(config.output):
        return config
    parallel = run_folder.read_marker(config.output)["provenance"].get("config", {}).get("parallel", {})
    precision = {key: value for key, value in parallel.items() if key == "precision"}
    begun = config.with_precision(validate(ParallelConfig, precision, str(config.output)).precision)
    try:
        check_precision(begun.parallel.precision, on_cpu=not torch.cuda.is_available())
    except ConfigError as error:
        raise ConfigError(
            f"{config.output}: was begun with parallel.precision={begun.parallel.precision}, which this device lacks.",
            "Continue it on a device that has it, or give another output=... .",
        ) from error
    return begun


def _table_digests(cohort: CohortConfig) -> dict[str, str]:
    """Return the digests of a cohort's tables, by what they hold."""
    tables = {
        "table": cohort.table, "slides": cohort.slides, "follow_up": cohort.follow_up,
        "covariates": cohort.covariates_table,
        "endpoint": None if cohort.endpoint == "OS" else cohort.covariates_table,
    }  # fmt: skip
    return {f"{name}_sha256": digest_file(path) for name, path in tables.items() if path is not None}


def _all_table_digests(config: Config) -> dict[str, Any]:
    """Return the digests of a run's tables; with several cohorts, those of each by its name."""
    if not config.cohorts:
        return _table_digests(config.cohort)
    found: dict[str, Any] = {}
    for name, cohort in config.cohorts.items():
        for key, digest in _table_digests(cohort).items():
            found.setdefault(key, {})[name] = digest
    return found


def _provenance(
    config: Config, code: OwnCode | None, dataset: ShardDataset, found: Audit, starts: Sequence[StartModel]
) -> dict[str, Any]:
    return {
        "program": cfusion.__version__,
        "code": code_digest(),
        "config": config.model_dump(mode="json", exclude={"output", "tracking"}),
        **({"notes": list(config.notes)} if config.notes else {}),
        **({} if code is None else {"model_code": code.identity}),
        **_all_table_digests(config),
        **({"start_sha256": digest_json([start.sha256 for start in starts])} if starts else {}),
        "shards_digest": dataset.index.digest,
        "splits_digest": splits_digest(found.splits),
        "packages": {"python": platform.python_version(), "torch": torch.__version__},
        "platform": platform.platform(),
    }


RECORDED_ASIDE = {
    "covariates_sha256": "only the clinical model uses them; the network never sees them",
    "notes": "they follow from the configuration, which decides",
    "program": "the digest of the code decides, not the version",
    "packages": "they are recorded, and cfusion reproduce names what differs",
    "platform": "it is recorded, and cfusion reproduce names what differs",
}
"""What `run.json` records and does not decide the numbers, and why."""


def _deciding(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What of it decides the numbers."""
    decides = {key: value for key, value in provenance.items() if key not in RECORDED_ASIDE}
    return decides | {"config": Config.without_asides(provenance.get("config", {}))}


def _comparable(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decides the numbers of two runs, where 0.1.0 recorded the path of the slides' table and no digest of it."""
    one, other = _deciding(there), _deciding(here)
    if "slides_sha256" in other and "slides_sha256" not in one:
        one["slides"], other["slides"] = (p.get("config", {}).get("cohort", {}).get("slides") for p in (there, here))
        del other["slides_sha256"]
    return one, other


def _fold_lines(splits: Sequence[Split]) -> list[str]:
    """Say who trains, chooses and is scored: a line per fold, or per repeat if there are several."""
    repeats: dict[int, list[Split]] = {}
    for split in splits:
        repeats.setdefault(split.repeat, []).append(split)
    groups = {f"fold {split.fold}": [split] for split in splits}
    if len(repeats) > 1:
        groups = {f"repeat {repeat}, {len(folds)} folds": folds for repeat, folds in repeats.items()}
    return [
        f"{name}: {_range(len(f.train) for f in folds)} train, {_range(len(f.validation) for f in folds)} choose, "
        f"{_range(len(f.test) for f in folds)} are scored"
        for name, folds in groups.items()
    ]


def _range(counts: Iterable[int]) -> str:
    found = sorted(counts)
    return f"{found[0]}" if found[0] == found[-1] else f"{found[0]} to {found[-1]}"

"""Cross-validation in one folder: cohort, audit, splits, every fold once, scores, tracking.

A fold's folder appears complete or not at all. A run that was stopped or killed therefore resumes with the missing
folds and ends with the numbers of an undisturbed run. A fold that fails fails the run.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from typing import Any

from cfusion.config import Config
from cfusion.console import Progress, progress
from cfusion.data.loader import BagSet
from cfusion.data.thread_pools import pool_of_teams, threads_each
from cfusion.errors import CfusionError, ConfigError, PartialResultError
from cfusion.files import digest_json, remove_orphans
from cfusion.interruption import graceful_stop
from cfusion.models.registry import reads_positions, spatial_graph
from cfusion.run_folder import CHECKPOINTS, GROUP, claim
from cfusion.runs.arrangement import Arrangement
from cfusion.runs.run import Run, with_begun_precision
from cfusion.runs.search import FoldSearch
from cfusion.survival.score import Scores
from cfusion.tracking import TrackedRun
from cfusion.training.fold_job import never_stop
from cfusion.training.folds import EpochCallback, FoldRun, fit, ready_fold
from cfusion.training.group.group import Group
from cfusion.training.group.group_checkpoint import GroupCheckpoints
from cfusion.training.group.member import GroupMember
from cfusion.training.runtime import Runtime
from cfusion.training.world import join_world
from cfusion.types import Split

logger = logging.getLogger(__name__)


def cross_validate(config: Config, *, same_code: str | None = None) -> Scores:
    """Train, predict and score every fold, and leave predictions and scores in `config.output`.

    Safe to re-run on the same folder: finished folds are skipped. Under `torchrun` every rank calls it.

    Args:
        config: The run.
        same_code: Digest of other code whose numbers are known to be the same; its unfinished run is resumed.

    Raises:
        ConfigError: The folder holds another run, or ranks disagree on the configuration.
        HeldError: Another process trains this run.
        RequeueError: The process was asked to stop and has saved its state.
    """
    if config.train.folds == "together":
        return cross_validate_together([config], same_code=same_code)[0]
    config = with_begun_precision(config)
    runtime = join_world(config.parallel)
    with _claimed(runtime, [config]):
        run = Run.open(runtime, config, same_code)
        with run.tracked(runtime) as parent:
            with graceful_stop(), progress(f"{run.cohort.name} {config.model.name}", len(run.splits)) as bar:
                _train_folds(runtime, run, parent, bar)
            scores = run.score(runtime, parent)
        run.mark_done(runtime, parent)
    return scores


@contextlib.contextmanager
def _claimed(runtime: Runtime, configs: Sequence[Config]) -> Iterator[None]:
    """Hold the locks of the runs' folders on rank 0, which writes to them; what a killed process left there is removed.

    Raises:
        HeldError: Another process trains one of the runs.
    """
    with contextlib.ExitStack() as stack:
        if runtime.is_main:
            for config in configs:
                stack.enter_context(claim(config.output, nested=True))
                remove_orphans(config.output)
        yield


def shares_a_read(config: Config) -> str:
    """Return a digest of what runs must share to be trained together: patients, bags and arithmetic."""
    return digest_json(_shared(config))


def cross_validate_together(configs: Sequence[Config], *, same_code: str | None = None) -> list[Scores]:
    """Cross-validate several runs; each epoch of all their folds takes one pass over the shards.

    Each run ends with the same files as when it is trained separately. If a run fails, the others continue. To resume,
    give the runs in any order; runs that are done or have failed may be omitted.

    Args:
        configs: Runs with `train.folds=together` and the same `shares_a_read`, such as other seeds and models.
        same_code: As for `cross_validate`.

    Raises:
        ConfigError: The runs cannot share a read, or as for `cross_validate`.
        PartialResultError: Some runs failed, listed with their causes; the rest are done.
        RequeueError: The process was asked to stop and has saved its state.
    """
    configs = [with_begun_precision(config) for config in configs]
    _check_shared(configs)
    runtime = join_world(configs[0].parallel)
    with _claimed(runtime, configs):
        return _cross_validate_together(runtime, configs, same_code)


def _cross_validate_together(runtime: Runtime, configs: Sequence[Config], same_code: str | None) -> list[Scores]:
    runs = [Run.open(runtime, config, same_code) for config in configs]
    tracked = [run.tracked(runtime) for run in runs]
    failed: dict[int, CfusionError] = {}
    name = f"{runs[0].cohort.name}, {len(runs)} runs together"
    try:
        with graceful_stop(), progress(name, sum(len(run.splits) for run in runs)) as bar:
            failed = _train_together(runtime, runs, tracked, bar)
        scores = [run.score(runtime, tracked[i]) for i, run in enumerate(runs) if i not in failed]
    except BaseException as error:
        for parent in tracked:
            parent.__exit__(type(error), error, error.__traceback__)
        raise
    for i, (run, parent) in enumerate(zip(runs, tracked, strict=True)):
        cause = failed.get(i)
        parent.__exit__(type(cause) if cause else None, cause, None)
        if cause is None:
            run.mark_done(runtime, parent)
    if len(runs) == 1 and failed:
        raise failed[0]
    if failed:
        causes = "; ".join(f"{runs[i].config.output}: {error.message}" for i, error in failed.items())
        raise PartialResultError(f"{len(failed)} of {len(runs)} runs failed; the rest are done. {causes}")
    return scores


def _train_together(
    runtime: Runtime, runs: Sequence[Run], tracked: Sequence[TrackedRun], bar: Progress
) -> dict[int, CfusionError]:
    """Train the missing folds and write each; return the runs that failed."""
    slides = {case: s for run in runs for case, s in run.cohort.slides_of(list(run.cohort.cases.index)).items()}
    data, dataset = runs[0].config.data, runs[0].dataset
    graphs: dict[str, int] = {}
    for model in (run.config.model for run in runs):
        for name, k in spatial_graph(model.name, data.magnifications, model.options).items():
            graphs[name] = max(k, graphs.get(name, 0))
    everyone = BagSet.open(
        dataset, slides, data,
        magnifications=data.magnifications, device=runtime.device, dtype=runtime.dtype, graphs=graphs,
        positions=any(reads_positions(run.config.model.name, run.config.model.options) for run in runs),
    )  # fmt: skip
    run_of: dict[GroupMember, int] = {}
    children: dict[GroupMember, TrackedRun] = {}
    failed: dict[int, CfusionError] = {}

    def done(member: GroupMember, result: FoldRun) -> None:
        run = runs[run_of[member]]
        folder = run.fold_folder(member.fold.split)
        run.write_fold(runtime, result)
        children[member].artifacts(folder)
        children[member].close()
        bar.advance(note=f"{folder.parent.name}/{folder.name}")

    def fails(member: GroupMember, error: CfusionError) -> list[GroupMember]:
        logger.warning("%s: %s The other runs continue.", runs[run_of[member]].config.output, error.message)
        failed[run_of[member]] = error
        return [other for other in run_of if run_of[other] == run_of[member]]

    for number, run in enumerate(runs):
        for split in run.splits:
            folder = run.fold_folder(split)
            if run.has_fold(runtime, split):
                bar.advance(note=folder.name)
                continue
            child = tracked[number].child(folder.name, {"fold": split.fold, "repeat": split.repeat})
            fold = ready_fold(
                run.config, run.cohort, split, dataset, runtime,
                folder=run.folder / CHECKPOINTS / GROUP, on_epoch=_logging_to(child), code=run.code, starts=run.starts,
            )  # fmt: skip
            member = GroupMember(runtime, fold, everyone)
            run_of[member], children[member] = number, child
    members = list(run_of)
    background = any(run.config.train.background_checkpoints for run in runs)
    checkpoints = GroupCheckpoints(members, runtime, background=background)
    Group(runtime, everyone, data, checkpoints, done, fails).train(members)
    return failed


def _logging_to(child: TrackedRun) -> EpochCallback:
    return lambda epoch, metrics: child.log(metrics, epoch)


def _shared(config: Config) -> dict[str, Any]:
    """Return what is read and how, by section. Paths are included because contents are not known yet."""
    deciding = config.deciding()
    places = config.model_dump(mode="json", include={"cohort": {"table", "slides"}, "data": {"shards"}})
    shared = {section: deciding[section] | places[section] for section in places}
    shared["cohorts"] = config.model_dump(mode="json", include={"cohorts"})["cohorts"]
    return shared | {"parallel": {"precision": config.parallel.precision}}


def _check_shared(configs: Sequence[Config]) -> None:
    for config in configs:
        if config.train.folds != "together":
            raise ConfigError(f"{config.output}: train.folds={config.train.folds}.", "Set train.folds=together.")
        for section, values in _shared(config).items():
            first = _shared(configs[0])[section]
            differing = [f"{section}.{key}" for key in {**values, **first} if values.get(key) != first.get(key)]
            if differing:
                raise ConfigError(
                    f"{config.output} and {configs[0].output} cannot share a read: they differ in "
                    f"{', '.join(differing)}.",
                    "Train them separately.",
                )
    if len({config.output for config in configs}) < len(configs):
        raise ConfigError("Runs that are trained together need different outputs.")


def _train_folds(runtime: Runtime, run: Run, parent: TrackedRun, bar: Progress) -> None:
    """Train the folds one after another, or several at once as `Run.arrangement` says.

    Folds that do not fill the cores at the end are trained one after another, each on all cores. On how many cores a
    fold trains does not depend on which folds are missing, so a resumed run has the same bits.
    """
    arrangement = run.arrangement(runtime)
    logger.info("%s", arrangement.describe())
    splits, at_once = run.splits, arrangement.at_once
    if at_once > 1:
        full = len(splits) - len(splits) % at_once
        first, splits = splits[:full], splits[full:]
        _train_side_by_side(first, arrangement, lambda split, stop: _fold(runtime, run, split, parent, bar, stop=stop))
    for split in splits:
        _fold(runtime, run, split, parent, bar)


def _train_side_by_side(
    splits: Sequence[Split], arrangement: Arrangement, fold: Callable[[Split, Callable[[], bool]], None]
) -> None:
    """Train several folds at once; if one fails or the run is interrupted, the others save their state and stop."""
    failed: list[BaseException] = []

    def train(split: Split) -> None:
        if failed:
            return
        try:
            fold(split, lambda: bool(failed))
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    with (
        pool_of_teams(arrangement.at_once, arrangement.threads, "fold") as pool,
        threads_each(arrangement.threads),
    ):
        try:
            wait([pool.submit(train, split) for split in splits])
        except KeyboardInterrupt as error:
            failed.insert(0, error)
    if failed:
        raise failed[0]


def _fold(
    runtime: Runtime,
    run: Run,
    split: Split,
    parent: TrackedRun,
    bar: Progress,
    *,
    stop: Callable[[], bool] = never_stop,
) -> None:
    folder, checkpoints = run.fold_folder(split), run.fold_checkpoints(split)
    with parent.child(folder.name, {"fold": split.fold, "repeat": split.repeat}) as child:
        if not run.has_fold(runtime, split):
            run.check_code(runtime)
            if run.config.search is not None:
                FoldSearch(runtime, run, split, stop)()
            else:
                result = fit(
                    run.config, run.cohort, split, runtime=runtime, folder=checkpoints, code=run.code,
                    starts=run.starts, stop=stop, on_epoch=lambda epoch, metrics: child.log(metrics, epoch),
                )  # fmt: skip
                run.write_fold(runtime, result)
        if runtime.is_main:
            shutil.rmtree(checkpoints, ignore_errors=True)
        child.artifacts(folder)
    bar.advance(note=folder.name)

"""`cfusion sweep`: many runs from one file."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cfusion.cli.completion import SettingsCommand
from cfusion.cli.options import (
    TASK_OPTIONS,
    Account,
    Chunk,
    Constraint,
    Cpus,
    Exclusive,
    Executor,
    Gpus,
    Hours,
    MaxParallel,
    Mem,
    Partition,
    Qos,
    RayAddress,
    Retries,
    Sbatch,
    Setup,
    cores_of,
    queue_options,
    refuse_unheard,
)
from cfusion.errors import ConfigError

if TYPE_CHECKING:
    from launch.sweep.estimate import CostEstimate
    from launch.sweep.execute import Execution
    from launch.sweep.plan import PlannedRun, SweepConfig
    from launch.sweep.status import RunStatus

logger = logging.getLogger(__name__)

sweep = typer.Typer(help="Plan, run and follow the product of cohorts, encoders, models, seeds and protocols.")

SweepFile = Annotated[Path, typer.Argument(help="YAML file of the sweep; see configs/sweeps/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value for all runs; output=FOLDER moves the sweep.")
]
Only = Annotated[list[str] | None, typer.Option("--only", help="axis=value: only these runs; may be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Slots = Annotated[
    int | None, typer.Option(help="local: runs at the same time; default: one, or as many as the GPUs hold.", min=1)
]
SlotsPerGpu = Annotated[
    int, typer.Option(help="local: runs on one GPU, each with an equal share of its memory.", min=1)
]
Processes = Annotated[int, typer.Option(help="Processes of a run (torchrun), each with one GPU.", min=1)]

WATCH_SECONDS = 5.0

TAKES = {"local": {"slots", "slots_per_gpu"}, **TASK_OPTIONS}
"""Options of `cfusion sweep run` that not every executor takes."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(sweep, name="sweep")


def planned(file: Path, overrides: list[str] | None, only: list[str] | None) -> tuple[SweepConfig, list[PlannedRun]]:
    """Return the settings of a sweep file and its runs."""
    from launch.sweep.plan import load_sweep
    from launch.sweep.plan import plan as plan_runs

    settings = load_sweep(file, overrides or [])
    return settings, plan_runs(settings, only or [])


def stale_of(settings: SweepConfig, runs: list[PlannedRun], only: list[str] | None) -> list[str]:
    """Return the stale folders of a sweep, of all its runs also where `runs` are only some of them."""
    from launch.sweep.plan import plan as plan_runs
    from launch.sweep.status import stale

    return stale(settings, plan_runs(settings) if only else runs)


def warn_of_other_code(settings: SweepConfig, runs: list[PlannedRun], only: list[str] | None, file: Path) -> None:
    """Say how many finished runs do not count because other code has trained them, and how they would."""
    from launch.sweep.status import codes_of

    for code, number in codes_of(settings, stale_of(settings, runs, only)).items():
        logger.warning(
            "%d finished runs do not count, as they are by other code; if its numbers are the same, add "
            "code: '%s' to %s",
            number, code, file,
        )  # fmt: skip


def as_json(settings: SweepConfig, statuses: list[RunStatus], stale: list[str], **more: Any) -> dict[str, Any]:
    """Return plan or status as plain values."""
    from launch.sweep.status import codes_of, counts

    runs = [status.to_json() for status in statuses]
    header = {
        "name": settings.name, "output": str(settings.output), "counts": counts(statuses), "stale": stale,
        "stale_codes": codes_of(settings, stale), **more,
    }  # fmt: skip
    return {**header, "runs": runs}


def _echo_lines(statuses: list[RunStatus]) -> None:
    """Tab-separated, a run a line: state, name, folds, word, log."""
    lines = [f"{s.state}\t{s.name}\t{s.folds_done}/{s.folds}\t{s.word}\t{s.log or ''}".rstrip("\t") for s in statuses]
    typer.echo("\n".join(lines))


@sweep.command(cls=SettingsCommand)
def plan(
    file: SweepFile,
    overrides: Overrides = None,
    only: Only = None,
    in_json: AsJson = False,
    in_full: Annotated[
        bool, typer.Option("--list", help="List the runs; a table on a terminal, tab-separated lines in a pipe.")
    ] = False,
    slots: Slots = None,
    slots_per_gpu: SlotsPerGpu = 1,
    processes: Processes = 1,
    step_seconds: Annotated[
        float | None, typer.Option(help="Time of an optimizer step; default: as the finished runs took.", min=1e-6)
    ] = None,
) -> None:
    """Summarize a sweep: its runs, what is missing of their data, and what the unfinished ones will cost.

    cfusion sweep plan configs/sweeps/backbones.yaml --slots-per-gpu 4
    """
    from launch.sweep.estimate import estimate
    from launch.sweep.status import codes_of, look
    from launch.sweep.workers import slots_here

    settings, runs = planned(file, overrides, only)
    statuses, stale = look(runs), stale_of(settings, runs, only)
    if in_full and not in_json and not sys.stdout.isatty():
        return _echo_lines(statuses)
    cost = estimate(runs, statuses, slots_here(slots, slots_per_gpu, processes), step_seconds)
    missing = _missing(runs, statuses)
    if in_json:
        return typer.echo(json.dumps(_plan_json(settings, statuses, stale, missing, cost), indent=1))
    from cfusion.cli.sweep_views import plan_summary, status_table

    for line in plan_summary(settings, statuses, missing, cost):
        typer.echo(line)
    if stale:
        typer.echo(f"{len(stale):,} stale: folders of runs whose configuration, data or code has changed since")
    for code, number in codes_of(settings, stale).items():
        typer.echo(f"{number:,} of them done by code {code}; if its numbers are the same, `code: '{code}'` in {file}")
    if not in_full:
        return typer.echo("runs: --list")
    from rich.console import Console

    Console(highlight=False).print(status_table(statuses, list(settings.axes)))


def plan_facts(settings: SweepConfig, runs: list[PlannedRun]) -> dict[str, Any]:
    """Return what `sweep plan --json` prints of all runs, for one slot a core or GPU of this machine."""
    from launch.sweep.estimate import estimate
    from launch.sweep.status import look
    from launch.sweep.workers import slots_here

    statuses = look(runs)
    cost = estimate(runs, statuses, slots_here(None, 1, 1), None)
    return _plan_json(settings, statuses, stale_of(settings, runs, None), _missing(runs, statuses), cost)


def _missing(runs: list[PlannedRun], statuses: list[RunStatus]) -> dict[str, int]:
    """Count the unfinished runs by what is missing of their data."""
    left = [run for run, status in zip(runs, statuses, strict=True) if status.state != "done"]
    return dict(Counter(run.absent for run in left if run.absent).most_common())


def _plan_json(
    settings: SweepConfig, statuses: list[RunStatus], stale: list[str], missing: dict[str, int], cost: CostEstimate
) -> dict[str, Any]:
    return as_json(settings, statuses, stale, missing=missing, estimate=asdict(cost))


@sweep.command(cls=SettingsCommand)
def status(
    file: SweepFile,
    overrides: Overrides = None,
    only: Only = None,
    in_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every 5 s until no run is open or running.")
    ] = False,
) -> None:
    """Show how far a sweep is: what is done, who trains what, what failed and why, the cost, how long it will take.

    cfusion sweep status configs/sweeps/backbones.yaml
    """
    from launch.sweep.status import look_in_queue, seconds_left, spent

    settings, runs = planned(file, overrides, only)
    warn_of_other_code(settings, runs, only, file)
    statuses = look_in_queue(runs, settings.output)
    if in_json:
        more = {"seconds_left": seconds_left(statuses), "cost": spent(statuses)}
        return typer.echo(json.dumps(as_json(settings, statuses, stale_of(settings, runs, only), **more), indent=1))
    while True:
        _show(settings, statuses, clear=watch)
        if not watch or all(status.state in ("done", "failed") for status in statuses):
            return None
        time.sleep(WATCH_SECONDS)
        statuses = look_in_queue(runs, settings.output)


def _show(settings: SweepConfig, statuses: list[RunStatus], *, clear: bool) -> None:
    """Print how far a sweep is: a picture on a terminal, lines in a pipe."""
    if not sys.stdout.isatty():
        return _echo_lines(statuses)
    from rich.console import Console

    from cfusion.cli.sweep_views import cost, duration, legend, picture, words
    from launch.sweep.status import counts, grid, seconds_left, spent

    console, left = Console(highlight=False), seconds_left(statuses)
    if clear:
        console.clear()
    console.print(picture(*grid(statuses, list(settings.axes)), console.width))
    console.print(legend(counts(statuses)), f"   about {duration(left)} left" if left else "")
    console.print(cost(spent(statuses)))
    for line in words(statuses):
        console.print(line)


@sweep.command(cls=SettingsCommand)
def clean(
    file: SweepFile,
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, only show it.")] = False,
) -> None:
    """Show the disk that a sweep uses, and remove stale runs and checkpoints of finished runs.

    cfusion sweep clean configs/sweeps/backbones.yaml
    """
    from launch.sweep.clean import disk_use, remove

    settings, runs = planned(file, overrides, None)
    use = disk_use(settings, runs)
    typer.echo(
        f"runs {use.runs / 1e9:.3f} GB, of these checkpoints {use.checkpoints / 1e9:.3f} GB; tracking "
        f"{use.tracking / 1e9:.3f} GB"
    )
    for item in use.removable:
        typer.echo(f"{'removing' if yes else 'would remove'}\t{item.size / 1e6:.1f} MB\t{item.path}\t{item.kind}")
    freed = sum(item.size for item in use.removable)
    if yes:
        remove(use.removable)
    elif use.removable:
        typer.echo(f"{freed / 1e9:.3f} GB can be removed with --yes")


@sweep.command(cls=SettingsCommand)
def run(
    context: typer.Context,
    file: SweepFile,
    overrides: Overrides = None,
    only: Only = None,
    executor: Executor = "local",
    slots: Slots = None,
    slots_per_gpu: SlotsPerGpu = 1,
    processes: Processes = 1,
    retries: Retries = 1,
    limit: Annotated[int | None, typer.Option(help="Run at most N of the unfinished runs.", min=1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would run, audit its data, and stop.")] = False,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    exclusive: Exclusive = False,
    sbatch: Sbatch = None,
    setup: Setup = None,
    hours: Hours = 24.0,
    cpus: Cpus = None,
    gpus: Gpus = 0,
    mem: Mem = None,
    max_parallel: MaxParallel = None,
    chunk: Chunk = 1,
    ray_address: RayAddress = "auto",
) -> None:
    """Train the unfinished runs of a sweep; safe to re-run after any interruption.

    A run is locked while it is trained, so several sweeps in one folder share the work. Failed runs are tried again.

      cfusion sweep run configs/sweeps/backbones.yaml --executor slurm --gpus 1
    """
    from cfusion.run_folder import is_done
    from launch.sweep.execute import Execution, run_all
    from launch.tasks.task import TaskResources

    refuse_unheard(context, executor, TAKES)
    settings, runs = planned(file, overrides, only)
    warn_of_other_code(settings, runs, only, file)
    if limit is not None:
        runs = [run for run in runs if not is_done(run.config.output)][:limit]
    slurm = queue_options(executor, partition, account, qos, constraint, exclusive, sbatch, setup)
    cores = cores_of(cpus, executor, slurm)
    resources = TaskResources(cores, gpus, mem, hours, slurm, max_parallel, chunk)
    how = Execution(executor, slots, slots_per_gpu, retries, processes, settings.group, resources, ray_address)
    if dry_run:
        return _rehearse(runs, how, settings.output)
    run_all(runs, how, settings.output)
    typer.echo(f"{len(runs)} runs are done; table: cfusion sweep report {file}")


def _rehearse(runs: list[PlannedRun], how: Execution, folder: Path) -> None:
    """List what would run, show SLURM's script, and audit each cohort with each encoder once."""
    from launch.sweep.execute import audits, script_of
    from launch.sweep.markers import JOBS
    from launch.sweep.status import look
    from launch.tasks.slurm_array import states_of_queued

    left = [run for run, status in zip(runs, look(runs), strict=True) if status.state != "done"]
    waiting = states_of_queued(folder / JOBS) if how.executor == "slurm" else {}
    for run in [run for run in left if run.name in waiting]:
        typer.echo(f"would wait\t{run.name}\t{waiting[run.name]}")
    left = [run for run in left if run.name not in waiting]
    for run in left:
        typer.echo(f"would train\t{run.name}")
    able = [run for run in left if not run.absent]
    if able and how.executor == "slurm":
        script, elements = script_of(able, how, folder)
        typer.echo(f"would queue\tan array of {elements}\n{script}")
    for line in audits(left):
        typer.echo(f"audit\t{line}")
    if left and not able:
        raise ConfigError(f"None of the {len(left)} runs could run. {left[0].absent}")


@sweep.command(cls=SettingsCommand)
def report(
    file: Annotated[Path, typer.Argument(help="YAML file of the sweep, or the archive of `cfusion sweep export`.")],
    overrides: Overrides = None,
    only: Only = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the report; default: report/ in the sweep's, NAME-report next to NAME.zip."),
    ] = None,
    published: Annotated[
        str | None,
        typer.Option("--beside", help="Published results to compare with: CSV file or name, crossfusion-midl2026."),
    ] = None,
) -> None:
    """Compare what is finished: models, cohorts and encoders in one table, as HTML, CSV, Markdown and LaTeX.

    --beside also prints every cell next to the published one, the null under its protocol and the clinical covariates.

    \b
      cfusion sweep report configs/sweeps/backbones.yaml
      cfusion sweep report configs/sweeps/table1.yaml --beside crossfusion-midl2026
    """  # noqa: D301 - the escape is typer's mark for lines that stay as they are
    from cfusion.report.comparison.published_results import read_published
    from launch.sweep.archive import is_archive
    from launch.sweep.results import report_sweep
    from launch.sweep.sharing import report_archive

    table = None if published is None else read_published(published)
    if file.suffix == ".zip" or is_archive(file):
        if overrides or only:
            raise ConfigError(f"{file}: an archive is reported as it is.", "Leave out --only and overrides.")
        page = report_archive(file, out or file.with_name(f"{file.stem}-report"), table)
    else:
        settings, runs = planned(file, overrides, only)
        warn_of_other_code(settings, runs, only, file)
        page = report_sweep(settings, runs, out or settings.output / "report", table)
    if table is not None:
        _echo_published(page.parent, table.name)
    typer.echo(f"report: {page}")


def _echo_published(folder: Path, name: str) -> None:
    """Print the cells next to published results: a table on a terminal, tab-separated lines in a pipe."""
    from cfusion.cli.sweep_views import PUBLISHED_HEAD, published_lines, published_table
    from cfusion.report.comparison.published_results import PUBLISHED, PublishedComparison

    found = PublishedComparison.read(folder / PUBLISHED, name)
    if sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False).print(published_table(found))
    else:
        typer.echo("\n".join("\t".join(line) for line in (PUBLISHED_HEAD, *published_lines(found))))
    typer.echo(found.summary)
    for note in found.notes:
        typer.echo(f"note: {note}")


@sweep.command(cls=SettingsCommand)
def export(
    file: SweepFile,
    overrides: Overrides = None,
    only: Only = None,
    out: Annotated[
        Path | None, typer.Option(help="The archive; default: NAME.zip next to the sweep's folder, by its name.")
    ] = None,
) -> None:
    """Write predictions, folds, settings and digests of the finished runs as one archive for others to score.

    `cfusion sweep report` and `cfusion score --predictions` read it. The same runs give the same bytes. It has no
    models, embeddings or logs, and patients keep their names.

      cfusion sweep export configs/sweeps/backbones.yaml --out backbones.zip
    """
    from launch.sweep.sharing import export_sweep

    settings, runs = planned(file, overrides, only)
    path = out or settings.output.with_name(f"{settings.name}.zip")
    typer.echo(f"archive: {path}\nsha256: {export_sweep(settings, runs, path)}")


@sweep.command("import", cls=SettingsCommand)
def import_(
    file: SweepFile,
    results: Annotated[Path, typer.Argument(help="Folder of the other program's results.")],
    layout: Annotated[str, typer.Option("--from", help="stamp, nnmil or patho-bench.")],
    overrides: Overrides = None,
    only: Only = None,
    model: Annotated[str | None, typer.Option(help="Name in the comparison; default: the program's.")] = None,
    cohort: Annotated[str | None, typer.Option(help="Cohort of the sweep; default: its only one.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Encoder of its features; default: the only one of the cohort's runs.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="How its epoch was chosen; default: as the program does by itself.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the sweep's runs that it is paired with; default: the lowest.")
    ] = None,
) -> None:
    """Add the predictions of STAMP, nnMIL or Patho-Bench on the sweep's folds to its report, as one more model.

    cfusion sweep import configs/sweeps/backbones.yaml stamp --from stamp
    """
    from launch.sweep.peer_runs import PeerCell, import_peer
    from launch.sweep.results import compared

    settings, runs = planned(file, overrides, only)
    cell = PeerCell(model, cohort, encoder, protocol, seed)
    typer.echo(import_peer(settings.output, compared(settings, runs), results, layout, cell))
    typer.echo(f"table: cfusion sweep report {file}")

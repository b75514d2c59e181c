"""Terminal views of a sweep: a table of its runs and a picture of their states."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from cfusion.report.comparison.published_results import PublishedComparison
    from launch.sweep.estimate import CostEstimate
    from launch.sweep.plan import SweepConfig
    from launch.sweep.status import RunStatus

COLOURS = {"done": "green", "running": "yellow", "failed": "red", "open": "bright_black"}
_ROWS = 60
_CAUSES = 10
"""Causes of missing data that a summary lists."""
_SQUARES = 16
"""Maximum number of squares in a cell."""


def status_table(statuses: Sequence[RunStatus], axes: Sequence[str]) -> RenderableType:
    """Return a table with a row per run; of many runs only the first, and how to list the rest."""
    from rich.table import Table
    from rich.text import Text

    caption = f"and {len(statuses) - _ROWS:,} more; pipe the command, or --json, for all" * (len(statuses) > _ROWS)
    table = Table("state", *axes, "folds", "name", caption=caption or None, caption_justify="left")
    for status in statuses[:_ROWS]:
        table.add_row(
            Text(status.state, COLOURS[status.state]), *(status.values[axis] for axis in axes),
            f"{status.folds_done}/{status.folds}", Text(status.name, "dim", overflow="ellipsis", no_wrap=True),
        )  # fmt: skip
    return table


def picture(
    row_axis: str, column_axis: str | None, cells: Mapping[tuple[str, str], Sequence[RunStatus]], width: int = 120
) -> RenderableType:
    """Return squares coloured by state, one cell per pair of values, for a terminal of `width` columns."""
    from rich.table import Table

    rows = dict.fromkeys(row for row, _ in cells)
    columns = dict.fromkeys(column for _, column in cells)
    squares = max(4, min(_SQUARES, (width - 2 - max(map(len, (row_axis, *rows)))) // max(1, len(columns)) - 11))
    table = Table(f"{row_axis} \\ {column_axis}" if column_axis else row_axis, *columns, show_lines=False)
    for row in rows:
        table.add_row(row, *(_squares(cells.get((row, column), ()), squares) for column in columns))
    return table


def legend(counts: Mapping[str, int]) -> Text:
    """Return the states in their colours, with the number of runs in each."""
    from rich.text import Text

    return Text("   ").join(Text(f"■ {state} {count:,}", COLOURS[state]) for state, count in counts.items())


def _squares(runs: Sequence[RunStatus], most: int) -> Text:
    """Return one square per run, or proportional squares if there are many; every state that occurs gets one."""
    from rich.text import Text

    counted = {state: sum(1 for run in runs if run.state == state) for state in COLOURS}
    text = Text()
    for state, count in counted.items():
        squares = count if len(runs) <= most else round(count / len(runs) * most)
        text.append("■" * max(squares, min(count, 1)), COLOURS[state])
    text.append(f" {counted['done']}/{len(runs)}" if runs else "–", "dim")
    return text


PUBLISHED_HEAD = (
    "cohort", "encoder", "model", "protocol", "yours", "theirs", "difference", "within your sd", "their protocol",
    "null independent", "null correlated", "clinical",
)  # fmt: skip
"""Columns of the cells next to published results."""


def published_lines(found: PublishedComparison) -> Iterator[tuple[str, ...]]:
    """Yield the cells that have a published result, as texts in the order of `PUBLISHED_HEAD`."""

    def number(value: float, sign: str = "") -> str:
        return "–" if value != value else f"{value:{sign}.3f}"

    def spread(mean: float, std: float) -> str:
        return number(mean) if std != std else f"{mean:.3f} ± {std:.3f}"

    for row in found.matched.to_dict("records"):
        yours = spread(row["cindex_mean"], row["cindex_std"]) if row["complete"] else "not complete"
        within = {True: "yes", False: "no"}.get(row["within_fold_sd"], "–")
        yield (
            row["cohort"], row["encoder"], row["model"], row["protocol"], yours,
            spread(row["their_cindex_mean"], row["their_cindex_std"]), number(row["difference"], "+"), within,
            row["their_protocol"], number(row["null_independent"]), number(row["null_correlated"]),
            number(row["clinical_c_mean"]),
        )  # fmt: skip


def published_table(found: PublishedComparison) -> RenderableType:
    """Return a table of the cells next to published results."""
    from rich.table import Table

    table = Table(*PUBLISHED_HEAD)
    for line in published_lines(found):
        table.add_row(*line)
    return table


def words(statuses: Sequence[RunStatus]) -> Iterator[Text]:
    """Yield a line per running run, then one per cause of failure or missing data, with its runs and the first log."""
    from rich.text import Text

    for run in (status for status in statuses if status.state == "running"):
        yield Text.assemble(("running ", COLOURS["running"]), f"{run.name}  {run.folds_done}/{run.folds}, {run.word}")
    causes: dict[tuple[str, str], list[RunStatus]] = {}
    for run in statuses:
        if run.state == "failed" or (run.state == "open" and run.word):
            causes.setdefault((run.state, run.word), []).append(run)
    for (state, cause), runs in causes.items():
        more = f" and {len(runs) - 1:,} more" if len(runs) > 1 else ""
        yield Text.assemble((f"{state:<8}", COLOURS[state]), f"{runs[0].name}{more}: {cause}")
        if runs[0].log is not None:
            yield Text(f"        log: {runs[0].log}", "dim")


def plan_summary(
    settings: SweepConfig, statuses: Sequence[RunStatus], missing: Mapping[str, int], cost: CostEstimate
) -> Iterator[str]:
    """Yield the lines of a plan's summary: runs, what is missing of their data, what the unfinished ones will cost.

    `missing` has the number of runs for each cause, the most frequent first.
    """
    states = Counter(status.state for status in statuses)
    product = " × ".join(f"{len(values)} {axis}" for axis, values in settings.axes.items())
    yield f"{settings.name}: {len(statuses):,} runs ({product}): {', '.join(f'{n:,} {s}' for s, n in states.items())}"
    if missing:
        yield f"data is missing for {sum(missing.values()):,} runs:"
        yield from (f"  {number:,}: {cause}" for cause, number in itertools.islice(missing.items(), _CAUSES))
        if len(missing) > _CAUSES:
            yield f"  and {len(missing) - _CAUSES:,} more causes: --json"
    yield from (f"steps of {number:,} runs not counted: {cause}" for cause, number in cost.uncounted.items())
    if not cost.runs:
        return
    yield f"left: {cost.runs:,} runs whose data is here, {cost.folds:,} folds, at most {cost.steps:,} steps"
    yield _slots_line(cost)
    if cost.disk_bytes is None:
        yield "disk: unknown until a run is done"
    else:
        yield f"disk: {cost.disk_bytes / 1e9:.2f} GB once they are done, {_DISK[cost.disk_from]}"


_DISK = {"measured": "as the finished runs", "counted": "weights and predictions without checkpoints"}


def _slots_line(cost: CostEstimate) -> str:
    """Return the slots and their price."""
    slots = f"slots: {cost.slots}"
    if cost.hours is None or cost.step_seconds is None:
        return f"{slots}; time unknown: finish a run (cfusion sweep run --limit 1), or give --step-seconds"
    parts = [f"about {duration(cost.hours * 3600)}"]
    parts += [f"{cost.gpu_hours:.3g} GPU-hours"] if cost.gpu_hours else []
    if cost.kwh is not None:
        parts.append(f"{'at most ' * (cost.kwh_from == 'limit')}{cost.kwh:.3g} kWh")
    source = f"measured on {cost.measured_runs} runs" if cost.measured_runs else "as given"
    return f"{slots}: {', '.join(parts)}, at {cost.step_seconds:.3g} s a step ({source})"


def cost(spent: Mapping[str, float]) -> str:
    """Return what a sweep has cost, in a line."""
    parts = [f"{spent['wall_s'] / 3600:.2f} h", f"{spent['cpu_s'] / 3600:.2f} h of CPU"]
    parts += [f"{spent['gpu_s'] / 3600:.2f} h of GPUs"] if spent["gpu_s"] else []
    parts += [f"{spent['energy_j'] / 3.6e6:.2f} kWh"] if spent["energy_j"] else []
    return f"spent: {', '.join(parts)} in {spent['attempts']:.0f} attempts"


def duration(seconds: float) -> str:
    """Format a time span for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"

"""Compares models, encoders and cohorts of a sweep: one cell each, tested against the best, ranked over cohorts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
from joblib import Parallel, delayed

from cfusion.errors import DataError
from cfusion.machine_limits import usable_cores
from cfusion.report.number_words import with_interval
from cfusion.report.runs import outcomes_and_splits
from cfusion.report.search_section import FoldChoice
from cfusion.run_folder import predictions_file
from cfusion.survival.paired import COLUMNS, compare, holm
from cfusion.survival.predictions import STRATUM, read_predictions
from cfusion.survival.ranks import Ranking, rank_methods
from cfusion.survival.score import score

LEVEL = 0.05
"""Significance level of the tests and of the critical difference."""

NOTHING_DONE = "Run it: cfusion sweep run. Runs of other code, data or settings are stale: cfusion sweep plan."
"""What to do if a sweep has no finished run."""

RANKED = ("models", "encoders")
"""Axes that are ranked over cohorts."""

_PARALLEL_FROM = 60
"""Number of cells from which processes are started; below it, starting them costs more than it saves."""
_NAN = float("nan")


@dataclass(frozen=True)
class Cost:
    """Cost of runs. Attempts that were killed are not included, since they record nothing.

    Attributes:
        cpu_hours: User and system time; NaN if unknown, as for imported predictions.
        gpu_hours: GPUs × time; NaN if unknown.
        energy_kwh: Energy used by the GPUs; NaN if unknown.
    """

    cpu_hours: float = 0.0
    gpu_hours: float = 0.0
    energy_kwh: float = _NAN

    @staticmethod
    def total(costs: Sequence[Cost]) -> Cost:
        """Add the costs that are known; the energy is known only if it is known for each of them."""
        known = [cost for cost in costs if not math.isnan(cost.cpu_hours)]
        if costs and not known:
            return Cost(_NAN, _NAN)
        energy = sum(c.energy_kwh for c in known) if known else _NAN
        return Cost(sum(c.cpu_hours for c in known), sum(c.gpu_hours for c in known), energy)

    @property
    def words(self) -> str:
        """Describe the cost briefly; times below a tenth of an hour in seconds."""
        parts = [_time(self.gpu_hours, "GPU"), _time(self.cpu_hours, "CPU"), (self.energy_kwh, "kWh")]
        numbers = ((f"{value:,.0f}" if value >= 100 else f"{value:.3g}", unit) for value, unit in parts if value > 0)
        return ", ".join(f"{number} {unit}" for number, unit in numbers) or "–"


def _time(hours: float, of: str) -> tuple[float, str]:
    return (hours, f"{of} h") if hours >= 0.1 else (3600 * hours, f"{of} s")


@dataclass(frozen=True)
class ComparedRun:
    """One run of a sweep and its position in the comparison.

    Attributes:
        name: Name of the run.
        folder: Folder of the run.
        cohort: Cohort of its cell.
        encoder: Encoder of the embeddings.
        model: The model, with everything else that the sweep varies.
        protocol: See `cfusion.cohort.splits`.
        seed: Seed of the training.
        permuted: Seed of the permutation of outcomes; None: real outcomes.
        state: done, running, failed or open.
        word: Reason of the failure.
        cost: Cost of the run.
        endpoint: Its end point: OS, DSS or PFI; None: unknown.
        search: What its folds chose, if it searched.
    """

    name: str
    folder: Path
    cohort: str
    encoder: str
    model: str
    protocol: str
    seed: int
    permuted: int | None
    state: str
    word: str = ""
    cost: Cost = field(default_factory=Cost)
    endpoint: str | None = None
    search: tuple[FoldChoice, ...] = ()

    @property
    def label(self) -> str:
        """Name encoder and model as one method."""
        return method_label(self.encoder, self.model)


def method_label(encoder: str, model: str) -> str:
    """Name encoder and model as one method."""
    return f"{encoder} / {model}"


@dataclass(frozen=True)
class Cell:
    """All runs of a cohort, encoder, model and protocol, scored together.

    Attributes:
        cohort: Short name.
        encoder: Encoder of the embeddings.
        model: The model, with everything else that the sweep varies.
        protocol: See `cfusion.cohort.splits`.
        members: Runs on real outcomes: one per seed, or one per seed and fold.
        permuted: Runs on permuted outcomes.
        summary: A row of `cfusion.survival.score.Scores.summary`; None if no run is done.
        null: C within folds of the finished permuted runs, mean over permutations; NaN without any.
        p_best: Holm-corrected p-value against the best of its cohort and protocol; NaN for the best itself and for
            incomplete cells.
        best: Whether it is the best of its cohort and protocol among complete cells.
    """

    cohort: str
    encoder: str
    model: str
    protocol: str
    members: tuple[ComparedRun, ...]
    permuted: tuple[ComparedRun, ...]
    summary: pd.Series | None = None
    null: float = _NAN
    p_best: float = _NAN
    best: bool = False

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Return cohort, encoder, model and protocol."""
        return self.cohort, self.encoder, self.model, self.protocol

    @property
    def complete(self) -> bool:
        """Whether every run on real outcomes is done; only complete cells are ranked, tested and averaged."""
        return bool(self.members) and all(member.state == "done" for member in self.members)

    @property
    def tied(self) -> bool:
        """Whether it is not significantly different from the best."""
        return self.p_best >= LEVEL

    @property
    def mark(self) -> str:
        """Mark after the value: † not significantly different from the best, ‡ not tested, empty otherwise."""
        if self.best or not self.complete:
            return ""
        return "‡" if math.isnan(self.p_best) else "†" if self.tied else ""

    @property
    def label(self) -> str:
        """Name encoder and model as one method."""
        return method_label(self.encoder, self.model)

    @property
    def value(self) -> float:
        """Return the C within folds, which ranks the cells; NaN for an incomplete cell."""
        return self._known("cindex_within")

    @property
    def mean_of_folds(self) -> float:
        """Return Harrell's C, mean over folds and seeds, as papers print it; NaN for an incomplete cell."""
        return self._known("cindex_mean")

    @property
    def spread(self) -> float:
        """Return the standard deviation of C over folds and seeds; NaN for an incomplete cell."""
        return self._known("cindex_std")

    def _known(self, column: str) -> float:
        return float(self.summary[column]) if self.summary is not None and self.complete else _NAN

    def _described(self, columns: str, sign: str = "") -> str:
        """Format a score with its interval; a dash where it is unknown, as for an incomplete cell."""
        if self.summary is None or not self.complete:
            return "–"
        value, low, high = (float(self.summary.get(name, _NAN)) for name in columns.split())
        return "–" if math.isnan(value) else with_interval(value, low, high, sign=sign)

    @property
    def within(self) -> str:
        """Describe the C within folds with its interval."""
        return self._described("cindex_within within_low within_high")

    @property
    def clinical(self) -> str:
        """Describe the C within folds of the clinical covariates by themselves."""
        return self._described("clinical_c clinical_c_low clinical_c_high")

    @property
    def added(self) -> str:
        """Describe what the risk adds to the C of the clinical covariates."""
        return self._described("added_c added_c_low added_c_high", sign="+")

    @property
    def states(self) -> str:
        """Describe the runs that are not done; empty if all are."""
        counts = {s: sum(1 for m in self.members if m.state == s) for s in ("failed", "running", "open")}
        states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        return f"{states} of {len(self.members)}" if states else ""

    @property
    def cost(self) -> Cost:
        """Return the cost of its runs on real outcomes."""
        return Cost.total([member.cost for member in self.members])


@dataclass(frozen=True)
class Comparison:
    """All results that a sweep's report shows.

    Attributes:
        cells: In the order of the sweep.
        tests: A row per cell compared with the best of its cohort and protocol: the columns of
            `cfusion.survival.paired.compare`, `model` and `reference` as `ENCODER / MODEL`.
        rankings: By protocol and ranked axis (see `RANKED`), over cohorts that have all of its values.
    """

    cells: tuple[Cell, ...]
    tests: pd.DataFrame
    rankings: dict[tuple[str, str], Ranking]

    @property
    def protocols(self) -> list[str]:
        """List the protocols in the order of the sweep."""
        return list(dict.fromkeys(cell.protocol for cell in self.cells))

    def of(self, protocol: str) -> list[Cell]:
        """List the cells of a protocol."""
        return [cell for cell in self.cells if cell.protocol == protocol]


def compare_runs(members: Sequence[ComparedRun], bootstrap: int = 1000) -> Comparison:
    """Score every cell, test it against the best of its cohort and protocol, and rank models and encoders.

    Args:
        members: All runs of a sweep, done or not.
        bootstrap: Replicates of the intervals and tests; 0: neither.

    Raises:
        DataError: No run is done.
    """
    if not any(member.state == "done" for member in members):
        raise DataError("none of the sweep's runs is done.", NOTHING_DONE)
    grouped: dict[tuple[str, str, str, str], list[ComparedRun]] = {}
    for member in members:
        grouped.setdefault((member.cohort, member.encoder, member.model, member.protocol), []).append(member)
    empty = [
        Cell(*key, tuple(m for m in found if m.permuted is None), tuple(m for m in found if m.permuted is not None))
        for key, found in grouped.items()
    ]
    jobs = min(usable_cores(), len(empty)) if len(empty) >= _PARALLEL_FROM else 1
    cells = list(Parallel(n_jobs=jobs)(delayed(_scored)(cell, bootstrap) for cell in empty))
    cells, tests = _tested(cells, bootstrap)
    return Comparison(tuple(cells), tests, _rankings(cells))


def _scored(cell: Cell, bootstrap: int) -> Cell:
    """Return the cell with the scores of its finished runs."""
    permutations = dict.fromkeys(member.permuted for member in cell.permuted)
    nulls = [_summary(cell, [m for m in cell.permuted if m.permuted == seed], 0) for seed in permutations]
    known = [float(null["cindex_within"]) for null in nulls if null is not None]
    null = sum(known) / len(known) if known else _NAN
    return replace(cell, summary=_summary(cell, cell.members, bootstrap), null=null)


def _summary(cell: Cell, members: Sequence[ComparedRun], bootstrap: int) -> pd.Series | None:
    done = [member for member in members if member.state == "done"]
    if not done:
        return None
    truth = outcomes_and_splits([member.folder for member in done], cell.cohort)
    return score(cell_predictions(cell, done), *truth, bootstrap=bootstrap).summary.iloc[0]


def cell_predictions(cell: Cell, members: Sequence[ComparedRun]) -> pd.DataFrame:
    """Return the predictions of some finished runs of a cell, with the cell's names of model and cohort."""
    frame = pd.concat([read_predictions(predictions_file(member.folder)) for member in members], ignore_index=True)
    frame[STRATUM] = frame["cohort"]
    return frame.assign(model=cell.label, cohort=cell.cohort)


def _tested(cells: Sequence[Cell], bootstrap: int) -> tuple[list[Cell], pd.DataFrame]:
    """Mark the best of each cohort and protocol, and test the other complete cells against it."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, cell in enumerate(cells):
        if cell.complete and not math.isnan(cell.value):
            groups.setdefault((cell.cohort, cell.protocol), []).append(number)
    marked, tables = list(cells), []
    for numbers in groups.values():
        best = max(numbers, key=lambda number: cells[number].value)
        marked[best] = replace(cells[best], best=True)
        if len(numbers) > 1 and bootstrap:
            frame = pd.concat([cell_predictions(cells[n], cells[n].members) for n in numbers], ignore_index=True)
            tables.append(compare(frame, reference=cells[best].label, replicates=bootstrap))
    if not tables:
        return marked, pd.DataFrame(columns=list(COLUMNS))
    tests = pd.concat(tables, ignore_index=True)
    tests["p_holm"] = holm(tests["p"])
    found = {
        (str(c), str(p), str(m)): float(value)
        for c, p, m, value in tests[["cohort", "protocol", "model", "p_holm"]].itertuples(index=False)
    }
    return [replace(c, p_best=found.get((c.cohort, c.protocol, c.label), _NAN)) for c in marked], tests


def _rankings(cells: Sequence[Cell]) -> dict[tuple[str, str], Ranking]:
    rows = [{"cohort": c.cohort, "encoder": c.encoder, "model": c.model, "protocol": c.protocol, "value": c.value}
            for c in cells]  # fmt: skip
    found: dict[tuple[str, str], Ranking] = {}
    for protocol, table in pd.DataFrame(rows).groupby("protocol", sort=False):
        for what in RANKED:
            ranked, other = ("model", "encoder") if what == "models" else ("encoder", "model")
            # Means over the other axis are comparable only if none of its values is missing; such cohorts are left out.
            wide = table.pivot(index=["cohort", other], columns=ranked, values="value")
            complete = wide.groupby(level="cohort").filter(lambda rows: bool(rows.notna().to_numpy().all()))
            if wide.shape[1] > 1 and len(complete):
                found[str(protocol), what] = rank_methods(complete.groupby(level="cohort").mean())
    return found

"""A sweep as one archive that another laboratory can score and report: predictions, folds, settings, digests.

`sweep.json` says which runs there are and how each ended; `runs/NAME/` has the files of a finished run that its scores
come from; `predictions.csv` has all predictions on real outcomes, under the names of the report's cells. Models,
embeddings, logs, and paths and names of the machine stay behind.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import yaml
from pydantic import Field

import cfusion
from cfusion.config import Section, validate
from cfusion.errors import DataError
from cfusion.files import check_format, read_json
from cfusion.program import code_digest
from cfusion.report.comparison.cells import NOTHING_DONE, ComparedRun, Cost, compare_runs
from cfusion.report.comparison.comparison_files import write_comparison
from cfusion.report.comparison.published_results import PublishedTable
from cfusion.report.search_section import fold_choices
from cfusion.run_folder import (
    CONFIG,
    COVARIATES,
    OUTCOMES,
    PREDICTIONS,
    RUN,
    SEARCH,
    SPLITS,
    predictions_file,
    read_marker,
)
from cfusion.survival.predictions import JOINT, read_predictions
from launch.sweep.archive import SUMS, is_archive, unpack, write_archive
from launch.sweep.peer_runs import IMPORTED
from launch.sweep.plan import PlannedRun, SweepConfig
from launch.sweep.results import bootstrap_of, compared

MANIFEST, README, ARCHIVE = "sweep.json", "README.md", "archive"
_FORMAT = 1
_RUNS = "runs"
_NAN = float("nan")
_LOCAL = ("config", "platform")
"""What `run.json` records of the machine; `config.yaml` of the archive has the settings that decide."""


class SharedRun(Section):
    """A run as an archive lists it; see `ComparedRun`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=-]*$")]
    """Name of the run, and of its folder."""
    cohort: str
    """Cohort of its cell."""
    encoder: str
    """Encoder of the embeddings."""
    model: str
    """The model, with everything else that the sweep varies."""
    protocol: Literal["strict", "fixed-epoch", "published", "unknown"]
    """How the epoch was chosen."""
    seed: int
    """Seed of the training."""
    permuted: int | None
    """Seed of the permutation of outcomes; none: real outcomes."""
    state: Literal["done", "running", "failed", "open"]
    """State of the run when the archive was written."""
    word: str
    """Reason of the failure, or where it was imported from."""
    endpoint: Literal["OS", "DSS", "PFI"] | None
    """Its end point."""
    cost: tuple[float | None, float | None, float | None]
    """CPU hours, GPU hours, kWh; none: unknown."""

    @classmethod
    def of(cls, member: ComparedRun) -> SharedRun:
        """Describe a run of the sweep."""
        known = (member.cost.cpu_hours, member.cost.gpu_hours, member.cost.energy_kwh)
        cost = tuple(None if math.isnan(value) else value for value in known)
        names = [name for name in cls.model_fields if name != "cost"]
        return cls.model_validate({"cost": cost, **{name: getattr(member, name) for name in names}})

    def member(self, folder: Path) -> ComparedRun:
        """Return the run as the report compares it; `folder` has the unpacked archive."""
        run = folder / _RUNS / self.name
        values = {name: getattr(self, name) for name in SharedRun.model_fields if name != "cost"}
        cost = Cost(*(_NAN if value is None else value for value in self.cost))
        search = fold_choices(run, self.seed) if self.state == "done" else ()
        return ComparedRun(folder=run, **{**values, "cost": cost, "search": search})


class SharedSweep(Section):
    """Content of `sweep.json`."""

    format: int
    """Format of the archive."""
    name: str
    """Name of the sweep."""
    program: str
    """Version of cfusion that wrote it."""
    code: str
    """Digest of its code."""
    bootstrap: int = Field(ge=0)
    """Replicates of the report's intervals and tests."""
    runs: tuple[SharedRun, ...]
    """All runs of the sweep, in its order."""


def export_sweep(sweep: SweepConfig, runs: Sequence[PlannedRun], path: Path) -> str:
    """Write a sweep's archive; the same finished runs give the same bytes.

    Returns:
        SHA-256 of the archive.

    Raises:
        DataError: None of the runs is finished.
    """
    members = compared(sweep, runs)
    done = [member for member in members if member.state == "done"]
    if not any(member.permuted is None for member in done):
        raise DataError("none of the sweep's runs on real outcomes is done.", NOTHING_DONE)
    planned = {run.name: run for run in runs}
    content: dict[str, bytes | Path] = {}
    for member in done:
        content |= {f"{_RUNS}/{member.name}/{name}": file for name, file in _files(member.folder)}
        if member.name in planned:
            settings = planned[member.name].config.deciding()
            content[f"{_RUNS}/{member.name}/{CONFIG}"] = yaml.safe_dump(settings, sort_keys=True).encode()
            content[f"{_RUNS}/{member.name}/{RUN}"] = _json(_digests(member.folder))
    shared = SharedSweep(
        format=_FORMAT, name=sweep.name, program=cfusion.__version__, code=code_digest(),
        bootstrap=bootstrap_of(runs), runs=tuple(SharedRun.of(member) for member in members),
    )  # fmt: skip
    content[PREDICTIONS] = _all_predictions(done).to_csv(index=False).encode()
    content[MANIFEST] = _json(shared.model_dump(mode="json"))
    content[README] = _readme(shared).encode()
    return write_archive(path, content)


def _files(run: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a run that its scores and the choices of its search come from, by their name in it."""
    for name in (PREDICTIONS, OUTCOMES, COVARIATES, IMPORTED):
        if (run / name).is_file():
            yield name, run / name
    for folder in (SPLITS, SEARCH):
        for file in sorted((run / folder).rglob("*")):
            name = file.relative_to(run).as_posix()
            if file.suffix in (".csv", ".json") and "/." not in name:
                yield name, file


def _digests(run: Path) -> dict[str, Any]:
    marker = read_marker(run)
    kept = {key: value for key, value in marker["provenance"].items() if key not in _LOCAL}
    return {**marker, "provenance": kept}


def _all_predictions(done: Sequence[ComparedRun]) -> pd.DataFrame:
    """Return the predictions on real outcomes, each model named as in the report.

    Patients of a joint run keep the name of each one's cohort, so that only those of one are compared; the column
    `joint` has the common name. If a run of only that cohort has a model of this name, it is added to the joint one's.
    """
    tables = [(member, read_predictions(predictions_file(member.folder))) for member in done if member.permuted is None]
    joint = {member.name for member, frame in tables if frame["cohort"].nunique() > 1}
    single = {(member.cohort, member.label) for member, _ in tables if member.name not in joint}
    frames = []
    for member, frame in tables:
        if member.name not in joint:
            frames.append(frame.assign(model=member.label, cohort=member.cohort, **({JOINT: ""} if joint else {})))
            continue
        taken = any((cohort, member.label) in single for cohort in frame["cohort"].unique())
        label = f"{member.label}, {member.cohort}" if taken else member.label
        frames.append(frame.assign(model=label, **{JOINT: member.cohort}))
    return pd.concat(frames, ignore_index=True)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _readme(shared: SharedSweep) -> str:
    states = [run.state for run in shared.runs]
    cohorts = ", ".join(dict.fromkeys(run.cohort for run in shared.runs))
    return f"""# {shared.name}

Predictions of the sweep {shared.name}: {len(states)} runs, {states.count("done")} of them done, on {cohorts}.
Written by cfusion {shared.program} (code {shared.code}).

| | |
|---|---|
| `{PREDICTIONS}` | all predictions on real outcomes: a row per patient, model, seed and fold |
| `{MANIFEST}` | every run: its cell, its state and its cost |
| `{_RUNS}/NAME/{PREDICTIONS}`, `{OUTCOMES}`, `{SPLITS}/` | predictions of a run, and what it is scored on |
| `{_RUNS}/NAME/{CONFIG}`, `{RUN}` | its settings; digests of its tables, folds, shards and code |
| `{SUMS}` | digests of all other files; check them with `sha256sum -c {SUMS}` |

The tables of the sweep's report, and the scores of `{PREDICTIONS}`:

    cfusion sweep report {shared.name}.zip --out report
    cfusion score --predictions {shared.name}.zip --out scored

Patients have the names of the cohort's table. Share it as you may share these.
"""


def shared_sweep(folder: Path) -> tuple[SharedSweep, list[ComparedRun]]:
    """Read an unpacked archive: what it says, and its runs.

    Raises:
        DataError: It lacks a file, or a newer program wrote it.
        ConfigError: `sweep.json` has a value that is refused.
    """
    values = read_json(folder / MANIFEST)
    if not isinstance(values, dict):
        raise DataError(f"{folder / MANIFEST}: expected keys and values, found {type(values).__name__}.")
    check_format(folder / MANIFEST, values, _FORMAT)
    shared = validate(SharedSweep, values, MANIFEST)
    return shared, [run.member(folder) for run in shared.runs]


def report_archive(path: Path, out: Path, published: PublishedTable | None = None) -> Path:
    """Check an archive, unpack it to `archive/` in `out`, and write its report to `out`.

    Args:
        path: The archive.
        out: Folder of the report.
        published: Published results to compare its cells with.

    Returns:
        Path of the page.

    Raises:
        DataError: See `launch.sweep.archive.unpack`; or `out` has another folder `archive`.
    """
    folder = out / ARCHIVE
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise DataError(f"{folder}: exists, and is no unpacked archive.", "Give another --out.")
    unpack(path, folder)
    shared, members = shared_sweep(folder)
    return write_comparison(compare_runs(members, shared.bootstrap), out, title=shared.name, published=published)


@contextlib.contextmanager
def predictions_in(path: Path) -> Iterator[Path]:
    """Yield the table of predictions of an archive, which is checked first; any other file is yielded as it is.

    Raises:
        DataError: See `launch.sweep.archive.unpack`.
    """
    if not is_archive(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        unpack(path, Path(folder) / ARCHIVE)
        yield Path(folder) / ARCHIVE / PREDICTIONS

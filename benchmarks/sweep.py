"""A sweep of 10,000 runs: made, listed with every run's state, and resumed.

    python -m benchmarks.sweep [--quick] [--json FILE]

The other side of the first rows is the plain way: each run's file is read and validated by itself, its tables are
digested for each run, and its folder's markers are looked for one by one. Half of the runs are done, so that their
folders are there.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pandas as pd
import yaml

import cfusion
from benchmarks.table import Row, options, present
from cfusion.files import digest_file, digest_json, write_json
from cfusion.run_folder import DONE, is_done
from launch.sweep.plan import PlannedRun, load_sweep, plan
from launch.sweep.status import counts, look


def sweep_file(folder: Path, runs: int) -> Path:
    """Make a sweep of a given number of runs over ten cohorts with existing tables and splits."""
    for number in range(10):
        cohort = folder / f"cohort{number}"
        (cohort / "splits").mkdir(parents=True)
        (cohort / "shards").mkdir()
        pd.DataFrame({"patient": range(400), "slide": range(400), "time": 1.0, "event": 1}).to_csv(cohort / "table.csv")
        for fold in range(5):
            (cohort / "splits" / f"splits_{fold}.csv").write_text("train,val\n" + "a,b\n" * 400)
        (cohort / "shards" / "index.json").write_text("x" * 2_000_000)
    values = {
        "name": "large",
        "output": str(folder / "sweep"),
        "base": {
            "cohort": {"name": "{cohort}", "table": str(folder / "{cohort}" / "table.csv")},
            "splits": {"directory": str(folder / "{cohort}" / "splits")},
            "data": {"shards": str(folder / "{cohort}" / "shards")},
        },
        "axes": {
            "cohort": {f"cohort{i}": {} for i in range(10)},
            "model.embed_dim": [32 * (i + 1) for i in range(10)],
            "train.lr": [round(1e-4 * (i + 1), 4) for i in range(10)],
            "seed": list(range(runs // 1000)),
        },
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def finish_half(runs: list[PlannedRun]) -> None:
    """Make every second run look done."""
    for run in runs[::2]:
        for fold in range(5):
            (run.config.output / f"fold_{fold}").mkdir(parents=True)
        (run.config.output / DONE).write_text("{}")
        write_json(run.config.output / "attempts.json", [])


def plainly(runs: list[PlannedRun], folder: Path) -> float:
    """Seconds to read, digest and look for each run by itself."""
    files = []
    for run in runs:
        path = folder / "files" / f"{run.name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
        files.append(path)
    start = time.perf_counter()
    for path in files:
        config = cfusion.load_config(path)
        assert isinstance(config.splits.directory, Path)
        tables = [
            config.cohort.table,
            Path(config.data.where) / "index.json",
            *config.splits.directory.glob("*.csv"),
        ]
        digest_json([config.model_dump(mode="json"), [digest_file(table) for table in tables]])
        is_done(config.output)
    return time.perf_counter() - start


def measure(runs: int, folder: Path) -> list[Row]:
    """Seconds of each step, and of the plain way on a twentieth of the runs, times twenty."""
    path = sweep_file(folder, runs)
    start = time.perf_counter()
    planned = plan(load_sweep(path))
    made = time.perf_counter() - start
    assert len(planned) == runs
    finish_half(planned)
    start = time.perf_counter()
    statuses = look(planned)
    listed = time.perf_counter() - start
    assert counts(statuses)["done"] == runs // 2
    start = time.perf_counter()
    again = plan(load_sweep(path))
    left = [run for run, status in zip(again, look(again), strict=True) if status.state != "done"]
    resumed = time.perf_counter() - start
    assert len(left) == runs // 2
    theirs = plainly(planned[::20], folder) * 20
    what = f"plan of {runs:,} runs"
    return [
        Row(f"{what}: made", made, theirs, "s", "lower"),
        Row(f"{what}: listed with states", listed, None, "s", "lower"),
        Row(f"{what}: resumed (made, listed, what is left)", resumed, theirs, "s", "lower"),
        Row(f"{what}: made, listed and resumed", made + listed + resumed, None, "s", "lower"),
    ]


def main() -> None:
    """Run the benchmark."""
    arguments = options(__doc__).parse_args()
    import cfusion.models.registry  # noqa: F401 - which plan() asks for the names of models

    with tempfile.TemporaryDirectory() as folder:
        rows = measure(1000 if arguments.quick else 10_000, Path(folder))
    present("A sweep of many runs", rows, arguments.json)


if __name__ == "__main__":
    main()

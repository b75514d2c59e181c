"""The acceptance run on a GPU: its rows and limits, what it does without a package, and every part on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.bench import Bench, Limit
from benchmarks.gpu.timing import seconds_per_call
from cfusion.child_processes import python_path

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(quick=True, minutes=5.0, shared=tmp_path, json_file=tmp_path / "rows.json")


def test_a_limit_of_correctness_is_checked_everywhere_and_one_of_speed_only_on_a_gpu_at_full_size(bench):
    def measure(bench: Bench) -> None:
        bench.tell("kept", 0.5, "ms", Limit(1.0))
        bench.tell("missed", 1.5, "ms", Limit(1.0))
        bench.tell("not a number", float("nan"), "", Limit(1.0))
        bench.tell("at least", 0.5, "", Limit(1.0, "least"))
        bench.tell("speed", 1.5, "ms", Limit(1.0, speed=True))

    bench.run("part", measure, 1.0)
    assert {figure.case: figure.kept for figure in bench.figures} == {
        "kept": True, "missed": False, "not a number": False, "at least": False, "speed": None,
    }  # fmt: skip
    bench.device, bench.quick = torch.device("cuda"), False
    bench.device_name = "a card"
    bench.tell("speed", 1.5, "ms", Limit(1.0, speed=True))
    assert bench.figures[-1].kept is False


def test_every_row_names_the_device_and_is_printed_and_written_at_once(bench, capsys, tmp_path):
    bench.run("part", lambda bench: bench.tell("first", 1.0, "ms", Limit(2.0)), 1.0)
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["case"] == "first"
    assert row["device"].startswith("CPU")
    shown = capsys.readouterr().out
    assert "limit ≤ 2: kept" in shown
    bench.run("part", lambda bench: bench.skip("second", "zarr is not installed"), 1.0)
    assert [r["value"] for r in json.loads((tmp_path / "rows.json").read_text())] == [1.0, None]
    assert "skipped  zarr is not installed" in capsys.readouterr().out


def test_a_part_that_fails_is_a_row_and_the_next_part_runs(bench):
    def fails(bench: Bench) -> None:
        bench.tell("before", 1.0)
        raise ValueError("broken")

    bench.run("fails", fails, 0.5)
    bench.run("next", lambda bench: bench.tell("after", 2.0), 1.0)
    assert [(f.part, f.case) for f in bench.figures] == [("fails", "before"), ("fails", "the rest"), ("next", "after")]
    assert "ValueError('broken')" in bench.figures[1].note
    assert bench.failed == ["fails"]


def test_a_part_without_time_is_skipped_and_one_without_its_package_names_it(tmp_path, monkeypatch):
    late = Bench(quick=True, minutes=0.0, shared=tmp_path, json_file=None)
    late.run("steps", command._part("steps"), 1.0)
    assert late.figures[0].note == "no time left; give more --minutes"

    def missing(name: str):
        raise ModuleNotFoundError("none", name="zarr")

    monkeypatch.setattr(command.importlib, "import_module", missing)
    bench = Bench(quick=True, minutes=5.0, shared=tmp_path, json_file=None)
    bench.run("loading", command._part("loading"), 1.0)
    assert bench.figures[0].note == "zarr is not installed"
    assert bench.failed == []


def test_a_missed_limit_or_a_failed_part_leaves_with_3(monkeypatch, tmp_path, capsys):
    def part(name: str):
        return lambda bench: bench.tell("figure", 2.0 if name == "golden" else 0.0, "", Limit(1.0))

    monkeypatch.setattr(command, "_part", part)
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick", "--part", "steps"])
    command.main()
    assert "1 figures, 0 limits missed, 0 rows skipped" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick", "--part", "steps", "golden"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 3


def test_calls_are_timed_within_their_budget_and_at_least_once():
    calls: list[int] = []
    assert seconds_per_call(lambda: calls.append(1), 1e-9) >= 0
    assert 3 <= len(calls) <= 4


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path):
    shared = Path(os.environ.get("CFUSION_SHARED", ROOT.parent / "shared"))
    rows = tmp_path / "rows.json"
    arguments = ["--quick", "--json", str(rows), "--minutes", "60", "--shared", str(shared)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": python_path(), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Speed on a GPU: not measured." in done.stdout
    found = json.loads(rows.read_text())
    assert {row["part"] for row in found} == set(command.PARTS)
    skipped = set(command.PARTS) - {row["part"] for row in found if row["value"] is not None}
    assert skipped == (set() if shared.is_dir() else {"golden", "extraction"}), "these need the shared material"
    assert not [row for row in found if row["kept"] is False]
    assert all(row["device"].startswith("CPU") for row in found)

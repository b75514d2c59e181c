"""Test that the journal holds no record twice and no partial record, whatever a kill leaves."""

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfusion.errors import DataError
from cfusion.tracking.journal import PARENT, Journal, read_records

ROOT = Path(__file__).parents[2]


def records(path, position=0):
    return [record for record, _ in read_records(path, position)]


def test_a_step_is_recorded_once_and_a_resumed_run_continues_after_it(tmp_path):
    path = tmp_path / "tracking.jsonl"
    journal = Journal(path)
    journal.start(PARENT, name="run")
    journal.start("fold_0", name="fold_0")
    for step in (0, 1):
        journal.metrics("fold_0", {"loss": 1.0 - step, "cindex": 0.5}, step)
    journal.close()
    journal = Journal(path)
    journal.start(PARENT, name="run")
    journal.start("fold_0", name="fold_0")
    for step in (1, 2):
        journal.metrics("fold_0", {"loss": 1.0 - step, "cindex": 0.5}, step)
    journal.metrics("fold_0", {"seconds": 3.0}, 1)
    journal.close()
    written = records(path)
    assert [(r["step"], sorted(r["values"])) for r in written if r["kind"] == "metrics"] == [
        (0, ["cindex", "loss"]), (1, ["cindex", "loss"]), (2, ["cindex", "loss"]), (1, ["seconds"]),
    ]  # fmt: skip
    starts = [r for r in written if r["kind"] == "start"]
    assert [r["run"] for r in starts] == [PARENT, "fold_0"]
    assert len({r["id"] for r in starts}) == 2
    assert [r["status"] for r in written if r["kind"] == "status"] == ["RUNNING", "RUNNING"]


def test_a_finished_run_is_not_started_again_and_files_are_recorded_once(tmp_path):
    path = tmp_path / "tracking.jsonl"
    for _ in range(2):
        journal = Journal(path)
        journal.start(PARENT, name="run")
        journal.once(PARENT, "artifacts", path="summary.csv", under=None)
        journal.once(PARENT, "artifacts", path="summary.csv", under="copy")
        journal.status(PARENT, "FINISHED")
        journal.close()
    assert [r["kind"] for r in records(path)] == ["start", "artifacts", "artifacts", "status"]


def test_values_that_are_not_finite_are_kept_as_such_in_valid_json(tmp_path):
    journal = Journal(tmp_path / "tracking.jsonl")
    journal.start(PARENT, name="run")
    journal.metrics(PARENT, {"a": math.nan, "b": -math.inf, "c": 0.1}, 0)
    journal.close()
    lines = (tmp_path / "tracking.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) for line in lines]
    a, b, c = (float(strict[-1]["values"][name]) for name in "abc")
    assert math.isnan(a)
    assert (b, c) == (-math.inf, 0.1)


@given(cut=st.integers(0, 400), more=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_a_truncated_journal_keeps_its_complete_records_and_continues(tmp_path_factory, cut, more):
    path = tmp_path_factory.mktemp("cut") / "tracking.jsonl"
    journal = Journal(path)
    journal.start(PARENT, name="run")
    for step in range(4):
        journal.metrics(PARENT, {"loss": step / 3}, step)
    journal.close()
    complete = path.read_bytes()
    path.write_bytes(complete[: len(complete) - cut])
    kept = records(path)
    journal = Journal(path)
    journal.start(PARENT, name="run")
    for step in range(4 + more):
        journal.metrics(PARENT, {"loss": step / 3}, step)
    journal.close()
    written = records(path)
    assert written[: len(kept)] == kept
    assert [r["step"] for r in written if r["kind"] == "metrics"] == list(range(4 + more))
    assert sum(r["kind"] == "start" for r in written) == 1


def test_positions_lead_from_one_record_to_the_next(tmp_path):
    path = tmp_path / "tracking.jsonl"
    journal = Journal(path)
    journal.start(PARENT, name="run")
    for step in range(5):
        journal.metrics(PARENT, {"loss": 1.0}, step)
    journal.close()
    ends = [end for _, end in read_records(path)]
    assert ends[-1] == path.stat().st_size
    for i, end in enumerate(ends):
        assert len(records(path, end)) == 5 - i


def test_threads_may_write_at_the_same_time(tmp_path):
    journal = Journal(tmp_path / "tracking.jsonl")
    journal.start(PARENT, name="run")

    def write(name: str) -> None:
        for step in range(200):
            journal.metrics(PARENT, {name: float(step)}, step)

    threads = [threading.Thread(target=write, args=(f"m{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    assert len(records(tmp_path / "tracking.jsonl")) == 801


_FULL = """
import resource, signal, sys
from pathlib import Path
from cfusion.errors import DataError
from cfusion.tracking.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(Path(sys.argv[1]))
journal.start("", name="run")
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    for step in range(100):
        journal.metrics("", {"loss": 1.0}, step)
except DataError as error:
    print(error)
"""


def test_a_full_disk_is_reported_and_leaves_complete_records(tmp_path):
    path = tmp_path / "tracking.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "tracking.jsonl: cannot be written" in done.stdout, done.stderr
    assert path.read_bytes().endswith(b"\n")
    kept = records(path)
    journal = Journal(path)
    for step in range(20):
        journal.metrics(PARENT, {"loss": 1.0}, step)
    journal.close()
    written = records(path)
    assert written[: len(kept)] == kept
    assert [r["step"] for r in written[1:]] == list(range(20))


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    path = tmp_path / "tracking.jsonl"
    path.write_text('{"run": "", "kind": "start"}\nnot a record\n')
    with pytest.raises(DataError, match=r"tracking\.jsonl: the record that ends at byte 42"):
        Journal(path)

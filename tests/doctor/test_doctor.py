"""What the doctor finds of a machine and of a world of processes, and how it says so."""

import os
import re
import subprocess
import sys

import pytest
from spawn import free_port

from cfusion.doctor import checks as doctor
from cfusion.doctor.checks import check_node
from cfusion.doctor.world_checks import bus_bandwidth


def only(monkeypatch, name):
    monkeypatch.setattr(doctor, "CHECKS", tuple(check for check in doctor.CHECKS if check[0] == name))
    (found,) = check_node()
    return found


def test_a_server_that_does_not_answer_is_reported_without_its_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:word@127.0.0.1:{free_port()}")
    found = only(monkeypatch, "mlflow server")
    assert not found.passed
    assert not found.required, "a run keeps its metrics until the server is back"
    assert "127.0.0.1" in found.detail
    assert "word" not in found.detail


@pytest.mark.slow
def test_an_existing_tracking_database_is_ok(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert only(monkeypatch, "mlflow server").passed


def test_slurm_is_reported_by_its_version_or_its_missing_commands(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch, srun, scontrol not on the PATH" in only(monkeypatch, "slurm").detail
    for name in ("sbatch", "srun", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\necho slurm 24.11.5\n")
        (tmp_path / name).chmod(0o755)
    assert only(monkeypatch, "slurm").detail == "slurm 24.11.5"


def test_a_slide_that_comes_back_with_other_pixels_fails(monkeypatch):
    import preprocess.slides

    real = preprocess.slides.Slide.read_rgba
    monkeypatch.setattr(preprocess.slides.Slide, "read_rgba", lambda *a, **k: real(*a, **k) ^ 1)
    found = only(monkeypatch, "openslide")
    assert (found.passed, found.required, found.detail) == (
        False,
        True,
        "a generated slide was read back with other pixels",
    )


@pytest.mark.slow
def test_deepspeed_is_imported_for_real(monkeypatch):
    found = only(monkeypatch, "deepspeed")
    assert found.passed, found.detail
    assert re.fullmatch(r"\d+\.\d+\S*, on (cpu with gloo|cuda with nccl)", found.detail)
    monkeypatch.setenv("DS_ACCELERATOR", "abacus")
    assert "abacus" in only(monkeypatch, "deepspeed").detail


@pytest.mark.parametrize("disk_is_ahead", [True, False])
def test_a_clock_that_differs_from_the_disks_is_reported(monkeypatch, disk_is_ahead):
    real = doctor.time.time
    monkeypatch.setattr(doctor.time, "time", lambda: real() + (-60 if disk_is_ahead else 60))
    found = only(monkeypatch, "clock")
    assert not found.passed
    assert re.match(r"(59|60) s from the clock", found.detail)


def test_the_bus_bandwidth_is_what_nccl_tests_print():
    # Of 8 ranks that reduce 1 GB in 10 ms: algorithm bandwidth 100 GB/s, bus bandwidth 175 GB/s.
    assert bus_bandwidth(8, 1_000_000_000, 0.01) == pytest.approx(175e9)


@pytest.mark.slow
def test_a_world_of_two_is_checked_and_only_rank_0_prints(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "cfusion", "doctor"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line[9:].split("  ")[0] for line in done.stdout.splitlines()]
    assert names.count("torch") == 1, "one line a check, from rank 0"
    assert re.search(r"world +2 processes on .+, gloo: Accelerate sees 2, torch\.distributed sees 2", done.stdout)
    assert re.search(r"latency +all-reduce of 4 bytes in \d+ µs", done.stdout)
    assert len(re.findall(r"bandwidth +all-reduce of \S+ MiB in \S+ ms, \d+\.\d\d GB/s", done.stdout)) == 3
    apart = re.search(r"clocks +(\d+\.\d) ms apart", done.stdout)
    assert apart
    assert float(apart[1]) < 1000, "both ranks read the same clock"

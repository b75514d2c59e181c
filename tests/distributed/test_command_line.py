"""`cfusion train` under a launcher reports invalid input of one process once, with its cause and exit code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from factories import CohortFiles, make_cohort


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=24)


def train(files: CohortFiles, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`cfusion train` in two processes."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(files.config(folder / "run").model_dump(mode="json")))
    agent = [
        sys.executable,
        "-m",
        "launch.torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--monitor-interval",
        ".1",
    ]
    return subprocess.run(
        [*agent, "-m", "cfusion", "train", str(path), "train.epochs=1", *overrides],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip


def damage_the_last_slide(shards: Path) -> None:
    (tar,) = shards.glob("*.tar")
    content = bytearray(tar.read_bytes())
    content[-16_000:-12_000] = bytes(4_000)
    tar.write_bytes(content)


def assert_reported_once(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert len(re.findall(message, done.stderr)) == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_folder_of_another_run_that_only_rank_0_reads(files, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"identity": "another", "provenance": {}}')
    assert_reported_once(train(files, tmp_path), "error: .*holds a run that differs in")


@pytest.mark.slow
def test_a_damaged_slide_which_one_process_reads(tmp_path):
    files = make_cohort(tmp_path / "cohort", patients=24)
    damage_the_last_slide(files.shards)
    assert_reported_once(train(files, tmp_path), "error: .*its checksum differs from the packed one")

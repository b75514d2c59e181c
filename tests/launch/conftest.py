"""One made-up cohort for each module, and scripts in place of SLURM."""

import os
from pathlib import Path

import pytest
from factories import CohortFiles, make_cohort


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scripts in place of SLURM's commands: sbatch keeps its script, sacct reports what `state` has."""
    submitit = pytest.importorskip("submitit")
    submitit.SlurmJob.watcher.clear()
    tools = tmp_path / "bin"
    tools.mkdir()
    commands = {
        "sbatch": f'cp "$1" {tmp_path}/asked.sh; echo >> {tmp_path}/calls; echo Submitted batch job 77',
        "srun": "true",
        "squeue": "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1",
        "sacct": f'touch {tmp_path}/looked; echo "JobID|State|NodeList"\n'
        f'for i in 0 1 2; do echo "77_$i|$(cat {tmp_path}/state)|n1"; done',
    }
    for name, answer in commands.items():
        (tools / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tmp_path

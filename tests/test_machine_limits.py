"""Cores and memory in containers, from made-up cgroup files."""

import os
from pathlib import Path

import psutil
import pytest

from cfusion import machine_limits
from cfusion.machine_limits import free_memory_bytes, memory_bytes, usable_cores

MB = 1 << 20


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Writes the files of made-up cgroups; 16 cores by affinity, and no SLURM."""
    monkeypatch.setattr(machine_limits, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine_limits, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))
    for name in (*machine_limits._JOB_CORES, "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"):
        monkeypatch.delenv(name, raising=False)

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path: Path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return write


def test_without_limits_the_machine_counts(cgroups):
    cgroups("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"})
    assert usable_cores() == 16
    assert memory_bytes() == psutil.virtual_memory().total


def test_the_limits_of_cgroup_v2_hold_for_all_below(cgroups):
    cgroups("0::/pod/box\n", {
        "pod/cpu.max": "250000 100000", "pod/box/cpu.max": "max 100000", "pod/memory.max": str(64 * MB),
        "pod/memory.current": str(40 * MB), "pod/memory.stat": f"anon 1\ninactive_file {10 * MB}",
    })  # fmt: skip
    assert usable_cores() == 3
    assert memory_bytes() == 64 * MB
    assert free_memory_bytes() == 34 * MB


@pytest.mark.parametrize("folder", ["docker/1/", ""], ids=["path of the host", "path of the container"])
def test_the_limits_of_cgroup_v1(cgroups, folder):
    cgroups("3:cpu,cpuacct:/docker/1\n2:memory:/docker/1\n", {
        f"cpu,cpuacct/{folder}cpu.cfs_quota_us": "200000", f"cpu,cpuacct/{folder}cpu.cfs_period_us": "100000",
        f"memory/{folder}memory.limit_in_bytes": str(32 * MB), f"memory/{folder}memory.usage_in_bytes": str(8 * MB),
        f"memory/{folder}memory.stat": f"total_inactive_file {2 * MB}",
    })  # fmt: skip
    assert usable_cores() == 2
    assert memory_bytes() == 32 * MB
    assert free_memory_bytes() == 26 * MB


def test_no_quota_in_cgroup_v1_is_no_limit(cgroups):
    cgroups("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"})
    assert usable_cores() == 16


def test_slurm_gives_fewer_cores_than_the_node_has(cgroups, monkeypatch):
    cgroups("", {})
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert usable_cores() == 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    assert usable_cores() == 16


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({"SLURM_CPUS_PER_TASK": "2", "SLURM_CPUS_ON_NODE": "8"}, 2),
        ({"SLURM_CPUS_ON_NODE": "8"}, 8),
        ({"NSLOTS": "3"}, 3),
        ({"NCPUS": "4"}, 4),
        ({"LSB_DJOB_NUMPROC": "5"}, 5),
        ({"SLURM_CPUS_ON_NODE": "64"}, 16),
        ({"NSLOTS": "undefined"}, 16),
    ],
)
def test_the_cores_of_a_job_of_any_scheduler(cgroups, monkeypatch, variables, cores):
    cgroups("0::/\n", {})
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("variables", "megabytes"),
    [
        ({"SLURM_MEM_PER_NODE": "2000"}, 2000),
        ({"SLURM_MEM_PER_CPU": "500", "SLURM_CPUS_ON_NODE": "3"}, 1500),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({}, None),
    ],
)
def test_the_memory_of_a_job(cgroups, monkeypatch, variables, megabytes):
    cgroups("0::/\n", {})
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    total = psutil.virtual_memory().total
    assert memory_bytes() == (total if megabytes is None else min(total, megabytes * MB))
    if megabytes is not None:
        assert 0 <= free_memory_bytes() <= max(0, megabytes * MB - psutil.Process().memory_info().rss // 2)


def test_the_address_space_that_a_shell_allows(cgroups, monkeypatch):
    cgroups("0::/\n", {})
    space = psutil.Process().memory_info().vms + 100 * MB
    monkeypatch.setattr(machine_limits.resource, "getrlimit", lambda _which: (space, space))
    assert memory_bytes() == min(space, psutil.virtual_memory().total)
    assert free_memory_bytes() <= 110 * MB

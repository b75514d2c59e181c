"""Test that thread pools that run during training do not start their own OpenMP team."""

import subprocess
import sys

import pytest

CODE = """
import os, sys, torch
from cfusion.data.thread_pools import single_core_pool
from concurrent.futures import ThreadPoolExecutor

torch.set_num_threads(3)
torch.randn(600, 600).half()  # the main thread's team
pool = single_core_pool(2, "bags") if sys.argv[1] == "single" else ThreadPoolExecutor(2, "bags")

def widen():
    stored = torch.ones(500, 500, dtype=torch.float16)
    return torch.empty(500, 500).copy_(stored).sum().item(), torch.get_num_threads()

pool.submit(int).result()
before = len(os.listdir("/proc/self/task"))
found = [pool.submit(widen) for _ in range(8)]
print([f.result() for f in found] == [(250000.0, 1)] * 8, len(os.listdir("/proc/self/task")) - before,
      torch.get_num_threads())
"""


def run(pool: str) -> list[str]:
    command = [sys.executable, "-c", CODE, pool]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.slow
def test_readers_widen_without_a_second_team_and_the_caller_keeps_its_threads():
    assert run("single") == ["True", "0", "3"]


@pytest.mark.slow
def test_a_plain_pool_starts_one():
    assert int(run("plain")[1]) >= 2

"""Variables of other jobs and programs do not change a run: removed with one line, or refused."""

import logging

import pytest

from cfusion.config import ParallelConfig
from cfusion.console import is_rank_zero
from cfusion.errors import ConfigError
from cfusion.training.foreign_variables import settle_variables
from cfusion.training.world import join_world, launched

WORLD = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "removed"),
    [
        ({"RANK": "1"}, ["RANK=1"]),
        ({"LOCAL_RANK": "0", "NODE_RANK": "3", "MASTER_PORT": "1"}, ["LOCAL_RANK=0", "NODE_RANK=3", "MASTER_PORT=1"]),
        (WORLD, []),
        ({**WORLD, "OMPI_COMM_WORLD_RANK": "1", "PMI_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1"}, []),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:3"}, ["ACCELERATE_TORCH_DEVICE=cuda:3"]),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["ACCELERATE_DYNAMO_BACKEND=INDUCTOR"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ["ACCELERATE_MIXED_PRECISION=fp16"]),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "false"}, []),
        ({"ACCELERATE_USE_CPU": "true", "HOME": "/root"}, []),
    ],
)  # fmt: skip
def test_what_misleads_is_removed_and_reported_once(variables, removed, caplog):
    environ = dict(variables)
    assert settle_variables(environ) == removed
    assert not [name for name in environ if name.startswith(("OMPI", "MV2", "PMI"))]
    assert {item.partition("=")[0] for item in removed} == set(variables) - set(environ) - {
        name for name in variables if name.startswith(("OMPI", "MV2", "PMI"))
    }
    assert len(caplog.records) == bool(removed)
    assert all(item in caplog.text for item in removed)
    caplog.clear()
    settle_variables(environ)
    assert not caplog.records


@pytest.mark.parametrize(
    "name",
    [
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_USE_MEGATRON_LM",
        "ACCELERATE_USE_PARALLELISM_CONFIG",
        "ACCELERATE_USE_DEEPSPEED",
    ],
)
@pytest.mark.parametrize("value", ["true", "1"])
def test_another_engine_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"{name}={value} asks Accelerate for another engine.*unset {name}"):
        settle_variables({name: value})
    settle_variables({"ACCELERATE_USE_DEEPSPEED": value}, zero=True)
    settle_variables({name: "false"})


def test_a_run_in_a_shell_of_another_job_is_one_process_and_reports(monkeypatch, caplog):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "ACCELERATE_TORCH_DEVICE": "meta"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert is_rank_zero()
    with caplog.at_level(logging.WARNING):
        runtime = join_world(ParallelConfig())
    assert (runtime.rank, runtime.world_size, runtime.device.type) == (0, 1, "cpu")
    assert "RANK=1, LOCAL_RANK=1, ACCELERATE_TORCH_DEVICE=meta" in caplog.text


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "2"}, r"RANK=2 with WORLD_SIZE=2: expected a number below it"),
        ({"LOCAL_RANK": "x"}, r"LOCAL_RANK=x with WORLD_SIZE=2"),
    ],
)
def test_ranks_that_do_not_fit_the_world_are_refused(monkeypatch, variables, message):
    for name, value in {**WORLD, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        launched()


def test_mpi_of_mvapich_is_refused_like_the_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MV2_COMM_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="mpirun_rsh started 4 separate tasks"):
        launched()


def test_a_run_keeps_the_watchdog_that_ends_processes_which_wait_for_a_lost_one():
    environ = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "WORLD_SIZE": "2", "RANK": "0"}
    assert settle_variables(environ) == ["TORCH_NCCL_ASYNC_ERROR_HANDLING=0"]
    assert environ == {"WORLD_SIZE": "2", "RANK": "0"}
    assert settle_variables({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}) == []

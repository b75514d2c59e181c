"""A failed connection is explained by its own cause; only a closed one proves that another process has ended."""

import json
import socket
from pathlib import Path

import pytest
from spawn import run_world
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from cfusion.config import ParallelConfig
from cfusion.doctor.checks import check_node
from cfusion.errors import ConfigError, ExchangeError
from cfusion.training.connection import check_network, check_port, connecting, exchange_error, record_cause
from cfusion.training.world import join_world
from launch.torchrun import first_cause, unresolved

LOOPBACK = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"GLOO_SOCKET_IFNAME": "nosuch0"},
            r"IFNAME=nosuch0: .* no network interface nosuch0; it has .*lo",
        ),
        ({"GLOO_SOCKET_IFNAME": "lo,nosuch0"}, "no network interface nosuch0"),
        ({"GLOO_SOCKET_IFNAME": "l"}, "no network interface l;"),
        ({"NCCL_SOCKET_IFNAME": "nosuch"}, "NCCL_SOCKET_IFNAME=nosuch: .* no network interface nosuch"),
        ({"NCCL_SOCKET_IFNAME": "=l"}, "no network interface l;"),
        ({**LOOPBACK, "MASTER_ADDR": "no-such-host.invalid"}, r"MASTER_ADDR=no-such-host\.invalid: .* not resolve"),
        ({**LOOPBACK, "MASTER_PORT": "mlflow"}, "MASTER_PORT=mlflow: expected a port"),
        ({**LOOPBACK, "MASTER_PORT": "70000"}, "MASTER_PORT=70000: expected a port"),
    ],
)
def test_what_cannot_be_used_is_named_by_its_variable_and_by_the_doctor(variables, message, monkeypatch):
    with pytest.raises(ConfigError, match=message) as caught:
        check_network(variables)
    assert caught.value.topic == "connection"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("cfusion.doctor.checks.CHECKS", [c for c in check_names() if c[0] == "network"])
    (check,) = check_node()
    assert (check.passed, check.required) == (False, True)
    assert next(iter(set(variables) - set(LOOPBACK)), "MASTER") in check.detail


def check_names():
    from cfusion.doctor.checks import CHECKS

    return list(CHECKS)


@pytest.mark.parametrize("variables", [{}, LOOPBACK, {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "^docker,lo"},
                                       {"NCCL_SOCKET_IFNAME": "l"}])  # fmt: skip
def test_what_can_be_used_passes(variables):
    assert "interfaces" in check_network(variables)


def test_a_port_that_is_taken_is_named_on_the_rank_that_opens_it():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(ConfigError, match=rf"MASTER_PORT={port}: cannot be opened on .*Address already in use"):
            check_port({"RANK": "0", "MASTER_PORT": port})
        check_port({"RANK": "1", "MASTER_PORT": port})
        check_port({"RANK": "0", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    check_port({"RANK": "0", "MASTER_PORT": port})


ENDED = (
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:43251"),
    RuntimeError("[gloo/transport/tcp/pair.cc:547] Read error [10.0.0.2]:1: Connection reset by peer"),
    DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?"),
)
OTHER = (
    (RuntimeError("[gloo/transport/tcp/device.cc:85] rv != -1. Unable to find interface for: nosuch0"), "nosuch0"),
    (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv"), "did not answer in"),
    (DistBackendError("NCCL error in: NCCLUtils.cpp:77, unhandled system error\nignored"), "unhandled system error"),
    (DistNetworkError("The server socket has failed to listen on any local network address. EADDRINUSE"), "EADDRINUSE"),
    (DistStoreError("Timed out after 1 seconds waiting for clients."), "did not answer in time"),
)


@pytest.mark.parametrize("error", ENDED)
def test_a_closed_connection_is_the_end_of_another_process(error):
    found = exchange_error(error)
    assert found.consequence
    assert "another process of this run has ended" in found.message


@pytest.mark.parametrize(("error", "text"), OTHER)
def test_any_other_failure_is_reported_as_it_is(error, text):
    found = exchange_error(error)
    assert not found.consequence
    assert text in found.message
    assert "has ended" not in found.message
    assert found.exit_code == 1, "another attempt may succeed"
    with pytest.raises(ExchangeError, match=r"cannot connect to the other processes, 2 in all"), connecting(2):
        raise error


def test_an_error_of_the_program_is_none_of_the_connection():
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("gloo")):
        assert exchange_error(error) is None
        with pytest.raises(type(error)), connecting(2):
            raise error


def failure(folder: Path, rank: int, exit_code: int, monkeypatch, cause: str = "") -> ProcessFailure:
    path = folder / f"{rank}.json"
    if cause:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        record_cause(cause)
    return ProcessFailure(rank, 1, exit_code, str(path))


def test_the_agent_ends_with_the_first_cause(tmp_path, monkeypatch):
    failures = {
        1: failure(tmp_path, 1, 1, monkeypatch, "a slide is damaged"),
        2: failure(tmp_path, 2, 1, monkeypatch, "another"),
        0: failure(tmp_path, 0, 1, monkeypatch),
    }
    assert first_cause(failures) == "first cause, rank 1: a slide is damaged"
    assert json.loads((tmp_path / "1.json").read_text())["message"]["extraInfo"]["timestamp"].isdecimal()
    killed = {0: failure(tmp_path, 0, -9, monkeypatch)}
    assert first_cause(killed) == "first cause: rank 0 was killed by SIGKILL, possibly out of memory"
    silent = {3: failure(tmp_path, 3, 7, monkeypatch)}
    assert first_cause(silent) == "first cause: rank 3 left with 7; its lines are above"


def test_a_first_node_whose_name_does_not_resolve_is_named():
    assert unresolved("no-such-host.invalid:29400", 0.0).startswith(
        "the host name of the first node, no-such-host.invalid, does not resolve on "
    )
    for endpoint in ("127.0.0.1:29400", "127.0.0.1", "[::1]:29400", "localhost:0", ""):
        assert unresolved(endpoint, 0.0) == ""


def hangs(folder: Path) -> None:
    """In a worker: the second process stops to answer."""
    import time

    runtime = join_world(ParallelConfig(timeout_minutes=0.03))
    if runtime.rank == 1:
        while not (folder / "late").exists():
            time.sleep(0.05)
        return
    try:
        with pytest.raises(RuntimeError) as caught:
            runtime.sum([1.0])
        (folder / "found").write_text(exchange_error(caught.value).message)
    finally:
        (folder / "late").touch()


@pytest.mark.slow
def test_a_process_that_stops_to_answer_is_waited_for_as_long_as_configured(tmp_path):
    run_world(2, hangs, tmp_path, tmp_path)
    assert "did not answer in time (parallel.timeout_minutes)" in (tmp_path / "found").read_text()

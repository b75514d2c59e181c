"""Connections between the processes of a run: checks before they are made, and what a failed one proves.

Gloo, NCCL and the store of torch raise the same types of errors for a wrong interface, a port that is taken, a host
name that does not resolve, a hung process and a dead one. Only a closed connection proves that a process has ended.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from cfusion.errors import ConfigError, ExchangeError

_CLOSED = re.compile(r"closed by peer|reset by peer|Broken pipe|Connection was likely closed|got 0 bytes", re.I)
_LATE = re.compile(r"timed? ?out", re.I)
_EXCHANGE = re.compile(r"gloo|NCCL|TCPStore|ProcessGroup|c10d", re.I)
_REMEDY = (
    "Run cfusion doctor under the same launcher: it checks the interface, the host name and the port. "
    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the interface."
)
_MOST_TEXT = 300
_LAST_PORT = 65535


def check_network(environ: Mapping[str, str] = os.environ) -> str:
    """Check the interface, the host name and the port that the launcher's variables name; return what was found.

    Raises:
        ConfigError: One of them cannot be used; the message names the variable.
    """
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        _check_interface(variable, environ.get(variable, ""), interfaces)
    found = f"interfaces {', '.join(interfaces)}"
    if "MASTER_ADDR" not in environ:
        return f"{found}; {_own_name()}"
    host, port = environ["MASTER_ADDR"], environ.get("MASTER_PORT", "")
    if not port.isdecimal() or not 0 <= int(port) <= _LAST_PORT:
        raise ConfigError(f"MASTER_PORT={port}: expected a port, 1 to {_LAST_PORT}.", topic="connection")
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR={host}: the name does not resolve on {socket.gethostname()} ({error.strerror}).",
            "Give the host name or address of the node of rank 0, as the other nodes see it.",
            topic="connection",
        ) from error
    return f"{found}; {host} resolves"


def _check_interface(variable: str, value: str, interfaces: list[str]) -> None:
    # NCCL takes the beginnings of names, "=" for a complete name and "^" for those to leave out.
    exact = variable.startswith("GLOO") or value.startswith("=")
    if value.startswith("^") and not exact:
        return
    for name in filter(None, value.removeprefix("=").split(",")):
        if not any(known == name if exact else known.startswith(name) for known in interfaces):
            raise ConfigError(
                f"{variable}={value}: {socket.gethostname()} has no network interface {name}; it has "
                f"{', '.join(interfaces)}.",
                f"Set {variable} to the interface that reaches the other nodes, or unset it.",
                topic="connection",
            )


def _own_name() -> str:
    name = socket.gethostname()
    try:
        return f"{name} is {socket.gethostbyname(name)}"
    except OSError:
        return f"{name} does not resolve; processes of other nodes cannot reach this one by its name"


def check_port(environ: Mapping[str, str] = os.environ) -> None:
    """On rank 0, check that its port is free; under torchrun's shared store its agent holds it.

    Raises:
        ConfigError: Another process listens on it.
    """
    if environ.get("RANK") != "0" or environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = int(environ.get("MASTER_PORT", "0"))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise ConfigError(
                f"MASTER_PORT={port}: cannot be opened on {socket.gethostname()} ({error.strerror}).",
                "Another job may use it: set another MASTER_PORT, or start with torchrun --standalone.",
                topic="connection",
            ) from error


@contextlib.contextmanager
def connecting(processes: int) -> Iterator[None]:
    """Within the block the processes connect; what fails then is no process that has ended.

    Raises:
        ExchangeError: They cannot connect; the message has the library's cause.
    """
    try:
        yield
    except RuntimeError as error:
        if processes == 1 or exchange_error(error) is None:
            raise
        raise ExchangeError(
            f"Rank {os.environ.get('RANK')} on {socket.gethostname()} cannot connect to the other processes, "
            f"{processes} in all: {_first_line(error)}.",
            _REMEDY,
        ) from error


def exchange_error(error: Exception) -> ExchangeError | None:
    """Explain an error in an exchange between processes; None if it is another error."""
    if isinstance(error, ExchangeError):
        return error
    if not isinstance(error, RuntimeError):
        return None
    text = _first_line(error)
    if not isinstance(error, torch.distributed.DistError) and not _EXCHANGE.search(str(error)):
        return None
    who = f"Rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
    if _CLOSED.search(str(error)):
        return ExchangeError(f"{who}: another process of this run has ended ({text}).", consequence=True)
    if _LATE.search(str(error)):
        return ExchangeError(
            f"{who}: the other processes did not answer in time (parallel.timeout_minutes): {text}.",
            "One of them is stuck, slower, or unreachable; its log may show where. " + _REMEDY,
        )
    return ExchangeError(f"{who}: an exchange with the other processes failed: {text}.", _REMEDY)


def _first_line(error: Exception) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.strip().rstrip(".")[:_MOST_TEXT]


def record_cause(text: str) -> None:
    """Leave the cause of this process's end where torchrun's agent finds it, if an agent has started it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        now = time.time()
        extra = {"timestamp": str(int(now)), "at": now, "py_callstack": text}
        with contextlib.suppress(OSError):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")

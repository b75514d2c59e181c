"""torchrun on one node, with the exit code of the run itself.

`python -m launch.torchrun` takes torchrun's arguments and differs from torchrun in two ways. torchrun exits with 1
for any exit code of its processes, so a scheduler cannot distinguish a run to requeue (75) from one with invalid
input (2). It restarts even the latter. This program passes the exit code on and does not restart invalid input.
torchrun also shares its store with the processes. That store is lost with the node that made it, and restarted
processes find the addresses of dead ones in it; here the processes make a separate store.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

import torch.distributed.launcher.api as launcher
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError, RendezvousTimeoutError
from torch.distributed.run import get_args_parser, parse_args, run

from cfusion.child_processes import python_path, stop_with_parent
from launch.cluster.cluster_plan import FINAL, REQUEUE

logger = logging.getLogger(__name__)

_SHUTDOWN = ("--shutdown-timeout", "--shutdown_timeout")

NAME_SECONDS = 30.0
"""How long the name of the first node may take to resolve."""


class _Agent(LocalElasticAgent):
    """An agent that does not restart processes that would fail in the same way."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode in FINAL for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def main(arguments: Sequence[str]) -> int:
    """Start this node's processes and watch them.

    Returns:
        0 when they are done; 75 when they were asked to stop, or when too few nodes came; 2 or 3 as the processes left;
        1 otherwise, also when the first node is lost, whose loss ends the run.
    """
    parsed = _parsed(arguments)
    # torchrun has no argument that names the class of its agent.
    launcher.LocalElasticAgent = _Agent  # type: ignore[attr-defined]
    # Until torchrun installs its handlers, a signal that asks for a stop must not look like a crash.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _leave)
    stop_with_parent()
    if cause := unresolved(parsed.rdzv_endpoint or ("" if parsed.standalone else parsed.master_addr)):
        return _report_exit(cause, 1)
    try:
        run(parsed)
    except SignalException as error:
        return _report_exit(f"stopped by {error.sigval.name}", REQUEUE)
    except RendezvousTimeoutError:
        return _report_exit("too few nodes came", REQUEUE)
    except RendezvousClosedError:
        return _report_exit("another node has ended the run", 1)
    except (RendezvousError, DistError, OSError) as error:
        at = parsed.rdzv_endpoint or f"{parsed.master_addr}:{parsed.master_port}"
        return _report_exit(f"the nodes cannot meet at {at}, or the first is lost: {_chain(error)}", 1)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        code = _of(codes)
        _report_exit(f"processes left with {', '.join(f'{c} (rank {r})' for r, c in codes.items())}", code)
        if code != REQUEUE:
            logger.warning("%s", first_cause(error.failures))
        return code
    return 0


def unresolved(endpoint: str, seconds: float = NAME_SECONDS) -> str:
    """Wait for the name of the first node to resolve, as a new pod's does after a while; return why it does not.

    torch retries for two minutes, with a stack trace each time.
    """
    host = endpoint.rpartition(":")[0] or endpoint
    end = time.monotonic() + seconds
    while host:
        try:
            socket.getaddrinfo(host.strip("[]"), None)
        except OSError as error:
            if time.monotonic() >= end:
                here = socket.gethostname()
                return f"the host name of the first node, {host}, does not resolve on {here} ({error.strerror})"
            time.sleep(min(1.0, seconds))
        else:
            break
    return ""


def first_cause(failures: Mapping[int, ProcessFailure]) -> str:
    """Return the first cause that a process recorded (`cfusion.training.connection`), or how the first one ended."""
    recorded = {
        rank: failure.error_file_data["message"]
        for rank, failure in failures.items()
        if isinstance(failure.error_file_data.get("message"), dict)
    }
    if recorded:
        rank = min(recorded, key=lambda rank: float(recorded[rank]["extraInfo"].get("at", 0.0)))
        return f"first cause, rank {rank}: {recorded[rank]['message']}"
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    if failure.exitcode < 0:
        killed = ", possibly out of memory" * (failure.exitcode == -signal.SIGKILL)
        return f"first cause: rank {rank} was killed by {signal.Signals(-failure.exitcode).name}{killed}"
    return f"first cause: rank {rank} left with {failure.exitcode}; its lines are above"


def _chain(error: BaseException) -> str:
    """Return the message of an error and of what caused it."""
    lines = []
    link: BaseException | None = error
    while link is not None:
        lines.append(str(link).strip().partition("\n")[0].rstrip("."))
        link = link.__cause__
    return ": ".join(dict.fromkeys(filter(None, lines)))


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Read torchrun's arguments, and set what its processes need."""
    os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": python_path()}
    parsed = parse_args(known_arguments(arguments, get_args_parser()))
    if parsed.module:  # a script may import from its folder
        os.environ["PYTHONSAFEPATH"] = "1"
    if (host := is_host()) is not None:
        parsed.rdzv_conf = ",".join(filter(None, [parsed.rdzv_conf, f"is_host={str(host).lower()}"]))
    return parsed


def known_arguments(arguments: Sequence[str], torchrun: argparse.ArgumentParser) -> list[str]:
    """Return the arguments without `--shutdown-timeout` where the installed torchrun is older than that option.

    Processes that do not stop are then killed after torchrun's own 30 s.
    """
    if any(option in _SHUTDOWN for action in torchrun._actions for option in action.option_strings):
        return list(arguments)
    kept, coming = list[str](), iter(arguments)
    for argument in coming:
        if argument in _SHUTDOWN:
            next(coming, None)
        elif argument.partition("=")[0] not in _SHUTDOWN:
            kept.append(argument)
    return kept


def is_host() -> bool | None:
    """Return whether this node is the first, which holds the rendezvous; None if no scheduler has numbered the nodes.

    torchrun guesses by comparing host names, which fails in containers and network namespaces.
    """
    number = os.environ.get("NODE_RANK") or os.environ.get("SLURM_NODEID")
    return None if number is None else int(number) == 0


def _report_exit(what: str, code: int) -> int:
    """Log why this node exits, and return the code."""
    logger.warning("node %s: %s; leaving with %d", os.environ.get("NODE_RANK", "-"), what, code)
    return code


def _of(codes: dict[int, int]) -> int:
    """Return one exit code for a node whose processes have failed."""
    for code in (*FINAL, REQUEUE):
        if code in codes.values():
            return code
    return 1


def _leave(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(REQUEUE)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    left_with = main(sys.argv[1:])
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread of the rendezvous may still wait for a node that exited first; a normal exit would then abort (134).
    os._exit(left_with)

"""torchrun on one node, with the exit code of the run itself.

`python -m launch.torchrun` takes torchrun's arguments. torchrun leaves with 1 whatever its processes left with, so a
scheduler cannot tell a run to be started again (75) from one whose input is bad (2); this one can.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import parse_args, run

from cfusion.errors import CfusionError, PartialResultError
from launch.cluster import REQUEUE

logger = logging.getLogger(__name__)

FINAL = (CfusionError.exit_code, PartialResultError.exit_code)
"""Exit codes of processes that would leave in the same way again."""


def main(arguments: Sequence[str]) -> int:
    """Start this node's processes and watch them.

    Returns:
        0 when they are done; 75 when they were asked to stop, or the nodes could not find each other; 2 or 3 as the
        processes left; 1 otherwise.
    """
    parsed = parse_args(list(arguments))
    if (host := is_host()) is not None:
        parsed.rdzv_conf = ",".join(filter(None, [parsed.rdzv_conf, f"is_host={str(host).lower()}"]))
    # Until torchrun has handlers of its own, a signal that asks for a stop must not look like a crash.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _leave)
    try:
        run(parsed)
    except SignalException as error:
        return told(f"stopped by {error.sigval.name}", REQUEUE)
    except RendezvousError as error:
        return told(f"the nodes did not find each other, or lost the first of them ({error})", REQUEUE)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return told(f"processes left with {', '.join(f'{c} (rank {r})' for r, c in codes.items())}", _of(codes))
    return 0


def is_host() -> bool | None:
    """Whether this node is the first, which holds the rendezvous; None where no scheduler has numbered the nodes.

    torchrun guesses by comparing host names, which fails in containers and network namespaces.
    """
    number = os.environ.get("NODE_RANK") or os.environ.get("SLURM_NODEID")
    return None if number is None else int(number) == 0


def told(what: str, code: int) -> int:
    """Say why this node leaves, and hand on the code."""
    logger.warning("node %s: %s; leaving with %d", os.environ.get("NODE_RANK", "-"), what, code)
    return code


def _of(codes: dict[int, int]) -> int:
    """One code for a node whose processes have failed."""
    for code in (REQUEUE, *FINAL):
        if code in codes.values():
            return code
    return 1


def _leave(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(REQUEUE)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    sys.exit(main(sys.argv[1:]))

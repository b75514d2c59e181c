"""A plan on this machine: each node is an agent with its processes, and they find each other on loopback."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import uuid

from cfusion.child_processes import child_environment
from cfusion.interruption import handling
from launch.cluster.cluster_plan import FINAL, REQUEUE, LaunchPlan

logger = logging.getLogger(__name__)


def run_here(plan: LaunchPlan) -> int:
    """Run a plan to its end; a node that is killed is left behind, as the plan allows.

    SIGTERM, SIGUSR1 and Ctrl-C are handed on as a request to save and leave.

    Returns:
        Exit code of the run: 0 done, 75 stopped with its state saved, 2 or 3 as its processes left, 1 otherwise.
    """
    agents = start_agents(plan)

    def stop(number: int) -> None:
        logger.warning("%s: asking %d nodes to save and leave", signal.Signals(number).name, len(agents))
        for agent in agents:
            if agent.poll() is None:
                agent.send_signal(signal.SIGTERM)

    with handling((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), stop):
        return run_code([agent.wait() for agent in agents])


def start_agents(plan: LaunchPlan) -> list[subprocess.Popen[bytes]]:
    """Start an agent for each node, each in a separate session; the first node holds the rendezvous."""
    arguments = plan.agent(endpoint=f"127.0.0.1:{free_port()}", run_id=uuid.uuid4().hex, local_address="127.0.0.1")
    return [
        subprocess.Popen(
            arguments,
            env={**child_environment(), **plan.environment(), "NODE_RANK": str(node)},
            start_new_session=True,
        )
        for node in range(plan.resources.nodes)
    ]


def run_code(codes: list[int]) -> int:
    """What the nodes' exit codes make of the run; a node that was killed has no say where another ended well."""
    return next((code for code in (0, *FINAL, REQUEUE) if code in codes), 1)


def free_port() -> int:
    """A loopback port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""One plan of a run on several nodes: what each node starts, with which rendezvous and environment.

Only this module has the settings of the rendezvous; SLURM, Kubernetes and this machine are three renderings of a plan.
With torch's settings a run resumes 46 s after a node is lost, or hangs if it waits for a replacement; with these it
resumes after about 10 s (`docs/scaling.md`).
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cfusion.addresses import Address, refuse_written
from cfusion.child_processes import python_path
from cfusion.config import load_config
from cfusion.errors import CfusionError, ConfigError, PartialResultError, RequeueError
from cfusion.extensions import plain_name

REQUEUE = RequeueError.exit_code
"""Exit code of a run that has saved its state and wants to be started again."""

FINAL = (CfusionError.exit_code, PartialResultError.exit_code)
"""Exit codes of processes that would leave in the same way again."""

WARNING_SECONDS = 120
"""How long before its time limit a job is asked to save and exit."""

SHUTDOWN_SECONDS = 30
"""How long a process has to end its step and save before it is killed; a hung one delays a restart as long."""

MAX_RESTARTS = 3
"""How often a node starts its processes again after one of them, or a peer, has died."""

MONITOR_SECONDS = 0.5
"""How often a node looks at its processes."""

RENDEZVOUS = {
    "last_call_timeout": 5,
    "keep_alive_interval": 1,
    "keep_alive_max_attempt": 3,
    "join_timeout": 600,
}
"""Seconds, or a count: a node that is silent for 3 × 1 s is lost; those that are left wait 5 s for others to join."""

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that a node's agent hands on to its processes; SIGUSR1 is SLURM's warning."""


@dataclass(frozen=True)
class LaunchResources:
    """What a run asks of a cluster.

    Attributes:
        nodes: Number of nodes.
        gpus: GPUs per node; 0: the CPU computes.
        processes: Processes per node; none: one per GPU, or one.
        cpus: Cores per process.
        hours: Time after which the run saves its state and asks to be started again; 0: as long as it takes.
    """

    nodes: int = 1
    gpus: int = 1
    processes: int | None = None
    cpus: int = 8
    hours: float = 24.0

    @property
    def processes_per_node(self) -> int:
        """Processes that each node starts."""
        return self.processes or self.gpus or 1


@dataclass(frozen=True)
class LaunchPlan:
    """A run on nodes.

    Attributes:
        name: Lower-case letters, digits and hyphens, at most 50 characters: a name that SLURM and Kubernetes take.
        resources: Nodes, GPUs, hours.
        least_nodes: The run goes on with as few nodes as this, where some are lost.
        output: Folder of the run.
        command: What each process runs, as arguments of Python.
        python: The interpreter on the nodes.
        tracking_uri: MLflow server or database; none: as the configuration says.
    """

    name: str
    resources: LaunchResources
    least_nodes: int
    output: Path
    command: tuple[str, ...]
    python: str
    tracking_uri: str | None

    @property
    def nnodes(self) -> str:
        """Nodes as torchrun takes them: `4`, or `2:4` where the run goes on with fewer."""
        nodes = self.resources.nodes
        return str(nodes) if self.least_nodes == nodes else f"{self.least_nodes}:{nodes}"

    def environment(self) -> dict[str, str]:
        """Variables of every node."""
        values = {"OMP_NUM_THREADS": str(self.resources.cpus)}
        if not self.resources.gpus:
            values["CUDA_VISIBLE_DEVICES"] = ""  # otherwise the run would take a visible GPU
        if self.python == sys.executable:  # not a container's
            values["PYTHONPATH"] = python_path()
        return values | ({"MLFLOW_TRACKING_URI": self.tracking_uri} if self.tracking_uri else {})

    def agent(self, *, endpoint: str, run_id: str, local_address: str | None = None) -> list[str]:
        """What each node starts: torchrun, which starts and watches the node's processes.

        Args:
            endpoint: `host:port` of the first node, where the nodes find each other.
            run_id: The same on all nodes of one run, different for others.
            local_address: Where the other nodes reach this one; none: its host name.
        """
        options = {
            "--nnodes": self.nnodes,
            "--nproc-per-node": str(self.resources.processes_per_node),
            "--rdzv-backend": "c10d",
            "--rdzv-endpoint": endpoint,
            "--rdzv-id": run_id,
            "--rdzv-conf": ",".join(f"{key}={value}" for key, value in RENDEZVOUS.items()),
            "--max-restarts": str(MAX_RESTARTS),
            "--monitor-interval": str(MONITOR_SECONDS),
            "--signals-to-handle": SIGNALS,
            "--shutdown-timeout": str(SHUTDOWN_SECONDS),
        }
        if local_address is not None:
            options["--local-addr"] = local_address
        pairs = [item for option in options.items() for item in option]
        return [self.python, "-P", "-m", "launch.torchrun", *pairs, *self.command]


def make_plan(
    config: Path,
    overrides: Sequence[str],
    resources: LaunchResources,
    *,
    python: str,
    name: str | None = None,
    engine: str | None = None,
) -> LaunchPlan:
    """Plan a run of a configuration; what a process would refuse at its start is refused here.

    Args:
        config: YAML file, as the nodes will find it.
        overrides: `section.key=value`.
        resources: What to ask for.
        python: The interpreter on the nodes.
        name: Name of the job; none: of cohort and model.
        engine: `parallel.engine`; none: as the configuration says.

    Raises:
        ConfigError: The configuration is refused, the processes cannot share its global batch, the name is not
            valid on a cluster, or an address that a script would hold has a password.
    """
    from cfusion.training.world import check_divides

    chosen = [*overrides, *([f"parallel.engine={engine}"] if engine else [])]
    resolved = load_config(config, chosen)
    per_node = resources.processes_per_node
    check_divides(resolved.parallel.global_batch, resources.nodes * per_node)
    for key, _, value in (override.partition("=") for override in chosen):
        refuse_written(key, Address.of(value), "a script")
    # The nodes read the configuration's address themselves.
    uri = None if resolved.tracking.uri else os.environ.get("MLFLOW_TRACKING_URI")
    refuse_written("MLFLOW_TRACKING_URI", Address.of(uri) if uri else None, "a script")
    return LaunchPlan(
        name=_checked_name(name or f"cfusion-{resolved.cohort.name}-{plain_name(resolved.model.name)}"),
        resources=resources,
        least_nodes=least_nodes(resources.nodes, per_node, resolved.parallel.global_batch),
        output=resolved.output,
        command=("-m", "cfusion", "train", str(config), *chosen),
        python=python,
        tracking_uri=uri,
    )


def least_nodes(nodes: int, processes: int, global_batch: int) -> int:
    """The fewest nodes m such that m, m + 1, …, `nodes` can all share the global batch.

    torchrun takes any number in a range, so a range with a number that does not divide would end the run with an
    error where it could have waited for a replacement.
    """
    least = nodes
    while least > 1 and global_batch % ((least - 1) * processes) == 0:
        least -= 1
    return least


def _checked_name(name: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug or len(slug) > 50 or not slug[0].isalpha():
        raise ConfigError(f"--name {name!r}: expected a name of at most 50 characters that starts with a letter.")
    return slug


def shell(arguments: Sequence[str]) -> str:
    """Arguments as a shell command, an option with its value on each line."""
    lines: list[list[str]] = [[]]
    for argument in arguments:
        if argument.startswith("--") or (argument == "-m" and "-m" in lines[0]):
            lines.append([])
        lines[-1].append(shlex.quote(argument))
    return " \\\n        ".join(" ".join(line) for line in lines)

"""A plan as a SLURM job: an sbatch script that starts one agent a node and queues itself again when asked to."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cfusion.errors import CfusionError, ConfigError
from cfusion.files import write_text
from cfusion.run_folder import DONE
from launch.cluster.cluster_plan import FINAL, MAX_RESTARTS, REQUEUE, WARNING_SECONDS, LaunchPlan, shell
from launch.tasks.slurm_options import SlurmQueueOptions, one_line
from launch.tasks.slurm_states import jobs_of_script

LOG = "slurm-%j.out"
"""Log of a job in the run's folder; %j: the job's number."""

MOST_REQUEUES = {REQUEUE: 100, 137: MAX_RESTARTS}
"""Exit codes after which a job queues itself again: it was asked to, or a node's agent was killed. With each, after how
many restarts, whatever their cause, it no longer does."""


@dataclass(frozen=True)
class SlurmOptions(SlurmQueueOptions):
    """What differs from cluster to cluster for a run on several nodes.

    Attributes:
        image: Container image, where the cluster has pyxis; the working folder is mounted in its place.
        mounts: Further folders that the container sees, `/data` or `/data:/where`.
    """

    image: str | None = None
    mounts: tuple[str, ...] = ()


def slurm_script(plan: LaunchPlan, options: SlurmOptions) -> str:
    """The sbatch script of a plan.

    Nodes that share a global batch with fewer of them go on when one is lost (`--no-kill`); otherwise SLURM ends the
    job and queues it again. SIGUSR1 reaches every process before the time is up; they save, the agents leave with 75,
    and the job queues itself again.

    Raises:
        ConfigError: An option breaks out of its line, or belongs to the plan.
    """
    # One port a job, so that jobs on a shared node do not meet.
    agent = plan.agent(endpoint="$host:$port", run_id="$SLURM_JOB_ID")
    container = _container(options)
    step = [
        "srun",
        "--kill-on-bad-exit=0",
        "--wait=0",
        # Since SLURM 22.05 srun does not take it from sbatch, and a node's processes would share a core.
        f"--cpus-per-task={_cpus(plan)}",
        *(["--no-kill"] if plan.least_nodes < plan.resources.nodes else []),
        *container,
    ]
    run = f"{shlex.join(step)} \\\n    {shell(agent)}"
    for variable in ("$host:$port", "$SLURM_JOB_ID", *container[1:]):
        run = run.replace(shlex.quote(variable), f'"{variable}"')
    done = shlex.quote(str(plan.output / DONE))
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {_summary_line(plan)} Written by cfusion launch slurm.",
            *(f"#SBATCH --{key}{f'={value}' if value else ''}" for key, value in _directives(plan, options).items()),
            "",
            *options.setup_lines(),
            "set -euo pipefail",
            *(f"export {key}={shlex.quote(value)}" for key, value in plan.environment().items()),
            "unset NODE_RANK  # SLURM_NODEID numbers the nodes",
            'read -r host < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            "port=$((20000 + SLURM_JOB_ID % 10000))",
            'echo "$(date +%FT%T) job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"',
            "",
            "status=0",
            f"{run} || status=$?",
            "",
            "# What was refused is not done, though another run of this folder may be.",
            f'case "$status" in {"|".join(map(str, FINAL))}) exit "$status" ;; esac',
            "# A node that was lost leaves its mark on srun's code, even where the others have ended the run.",
            f"if [ -e {done} ]; then exit 0; fi",
            'case "$status" in',
            *(f"    {code}) most={most} ;;" for code, most in MOST_REQUEUES.items()),
            "    *) most=0 ;;",
            "esac",
            'if [ "${SLURM_RESTART_COUNT:-0}" -lt "$most" ]; then',
            '    echo "$(date +%FT%T) left with $status; SLURM starts the job again"',
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$status"',
            "",
        ]
    )


def submit_slurm(script: str, path: Path) -> str:
    """Write the script and hand it to sbatch; returns what sbatch said.

    Raises:
        ConfigError: There is no sbatch here.
        CfusionError: sbatch refused the job, or an earlier one of this script is queued or runs.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on the PATH of this machine.", "Run this on a login node, or use --dry-run --out FILE."
        )
    earlier = jobs_of_script(path)
    if earlier:
        found = ", ".join(f"{job} ({state})" for job, state in earlier.items())
        raise CfusionError(
            f"This run is in SLURM's queue already: job {found}.",
            f"Wait for it, or end it: scancel {' '.join(earlier)}.",
            topic="held",
        )
    write_text(path, script)
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CfusionError(f"sbatch refused {path}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def _container(options: SlurmOptions) -> list[str]:
    """Return the options of srun for a container: its image, then what the script fills in."""
    if options.image is None:
        if options.mounts:
            raise ConfigError("--mount needs the --image whose container sees it.")
        return []
    for mount in options.mounts:
        if not re.fullmatch(r"/[\w./+=@-]*(:/[\w./+=@-]*)?", mount):
            raise ConfigError(f"--mount {mount!r}: expected a folder or FOLDER:WHERE, both from the root on.")
    mounts = ",".join(["$PWD:$PWD", *(mount if ":" in mount else f"{mount}:{mount}" for mount in options.mounts)])
    image = f"--container-image={one_line('--image', options.image)}"
    return [image, f"--container-mounts={mounts}", "--container-workdir=$PWD"]


def _summary_line(plan: LaunchPlan) -> str:
    resources = plan.resources
    return f"{resources.nodes} nodes of {resources.processes_per_node} processes, {resources.hours:g} h."


def _cpus(plan: LaunchPlan) -> int:
    return plan.resources.cpus * plan.resources.processes_per_node


def _directives(plan: LaunchPlan, options: SlurmOptions) -> dict[str, str]:
    resources = plan.resources
    minutes = max(1, round(resources.hours * 60))
    own = {
        "job-name": plan.name,
        "nodes": str(resources.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(_cpus(plan)),
        "time": f"{minutes // 60:02d}:{minutes % 60:02d}:00",
        "signal": f"USR1@{WARNING_SECONDS}",
        "requeue": "",
        "open-mode": "append",
        "output": one_line("output", str(plan.output / LOG)),
    }
    if resources.gpus:
        own["gpus-per-node"] = str(resources.gpus)
    if plan.least_nodes < resources.nodes:
        own["no-kill"] = ""
    return own | options.directives({**own, "ntasks": "", "no-requeue": ""})

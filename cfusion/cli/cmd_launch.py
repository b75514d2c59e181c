"""`cfusion launch`: one run over several nodes, by SLURM, by Kubernetes or on this machine."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cfusion.cli.completion import SettingsCommand
from cfusion.cli.options import Account, Constraint, Exclusive, Partition, Qos, Sbatch, Setup

if TYPE_CHECKING:
    from launch.cluster.cluster_plan import LaunchPlan

logger = logging.getLogger(__name__)

launch = typer.Typer(
    help="Start `cfusion train` on several nodes; it survives a lost node and resumes after its time limit.",
    no_args_is_help=True,
)

ConfigFile = Annotated[Path, typer.Argument(help="YAML configuration; the path must be valid on the nodes.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, such as train.epochs=20")]
Nodes = Annotated[int, typer.Option(help="Number of nodes.", min=1)]
Gpus = Annotated[int, typer.Option(help="GPUs per node, one process each; 0: use the CPU.", min=0)]
Processes = Annotated[int | None, typer.Option(help="Processes per node; default: one per GPU.", min=1)]
Cpus = Annotated[int, typer.Option(help="Cores per process.", min=1)]
Hours = Annotated[
    float, typer.Option(help="Time limit; shortly before it, the run saves its state and exits.", min=0.1, max=9999)
]
Engine = Annotated[str | None, typer.Option(help="ddp, zero1, zero2 or zero3; default: as in the configuration.")]
Name = Annotated[str | None, typer.Option(help="Name of the job; default: cohort and model.")]
Python = Annotated[str | None, typer.Option(help="Python interpreter on the nodes.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be started, and stop.")]
Out = Annotated[Path | None, typer.Option(help="Also write the printed text to this file.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(launch, name="launch")


@launch.command(cls=SettingsCommand)
def slurm(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus: Gpus = 1,
    processes: Processes = None,
    cpus: Cpus = 8,
    hours: Hours = 24.0,
    engine: Engine = None,
    name: Name = None,
    python: Python = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    exclusive: Exclusive = False,
    mem: Annotated[float | None, typer.Option(help="Memory per node in GB.", min=0.1)] = None,
    sbatch: Sbatch = None,
    setup: Setup = None,
    image: Annotated[
        str | None, typer.Option(help="Container image, which needs pyxis; this folder is mounted in it.")
    ] = None,
    mount: Annotated[list[str] | None, typer.Option(help="Additional folder to mount: /data or /data:/where.")] = None,
    dry_run: DryRun = False,
    out: Out = None,
) -> None:
    """Submit a run to SLURM.

    cfusion launch slurm study.yaml --nodes 2 --gpus 8 --hours 12 --dry-run
    """
    from launch.cluster.slurm_job import LOG, SlurmOptions, slurm_script, submit_slurm
    from launch.tasks.slurm_options import parse_sbatch

    python = python or ("python" if image else sys.executable)
    plan = _plan(config, overrides, nodes, gpus, processes, cpus, hours, engine, name, python)
    extra = parse_sbatch(sbatch or []) | ({} if mem is None else {"mem": f"{mem:g}G"})
    options = SlurmOptions(
        partition, account, extra, tuple(setup or ()), image, tuple(mount or ()),
        qos=qos, constraint=constraint, exclusive=exclusive,
    ).over_profile()  # fmt: skip
    script = slurm_script(plan, options)
    if dry_run:
        _show(script, out)
    _check_data(config, overrides)
    if not dry_run or out:
        plan.output.mkdir(parents=True, exist_ok=True)  # SLURM writes its log there, and makes no folder
    if not dry_run:
        path = out or plan.output / f"{plan.name}.sbatch"
        answer = submit_slurm(script, path)
        number = "".join(re.findall(r"\d+", answer)[:1]) or "%j"
        typer.echo(f"{answer}\nscript: {path}\nlog: {plan.output / LOG.replace('%j', number)}")


def _check_data(config: Path, overrides: list[str] | None) -> None:
    """Audit the data before anything queues; the findings go to the log."""
    from cfusion.config import load_config
    from cfusion.runs.run import Run

    for line in Run.prepare(load_config(config, overrides or [])).describe().splitlines():
        logger.info("%s", line)


@launch.command(cls=SettingsCommand)
def k8s(
    config: ConfigFile,
    claim: Annotated[str, typer.Option(help="PersistentVolumeClaim with the data and the runs.")],
    overrides: Overrides = None,
    image: Annotated[str, typer.Option(help="Container image with cfusion installed.")] = "cfusion:latest",
    nodes: Nodes = 1,
    gpus: Gpus = 1,
    processes: Processes = None,
    cpus: Cpus = 8,
    hours: Annotated[
        float | None,
        typer.Option(help="Hard time limit of the entire run; default: none.", min=0.1, max=9999),
    ] = None,
    engine: Engine = None,
    name: Name = None,
    python: Python = None,
    folder: Annotated[str, typer.Option(help="Where the volume is mounted; paths are relative to it.")] = "/work",
    secret: Annotated[str | None, typer.Option(help="Secret with variables such as MLFLOW_TRACKING_PASSWORD.")] = None,
    dry_run: DryRun = False,
    out: Out = None,
) -> None:
    """Submit a run to Kubernetes, as an Indexed Job with a headless Service.

    cfusion launch k8s study.yaml --image IMAGE --claim DATA --nodes 2
    """
    from launch.cluster.kubernetes_job import K8sOptions, k8s_manifest, submit_k8s

    plan = _plan(config, overrides, nodes, gpus, processes, cpus, hours or 0.0, engine, name, python or "python")
    manifest = k8s_manifest(plan, K8sOptions(image, claim, folder, secret))
    if dry_run:
        _show(manifest, out)
    else:
        typer.echo(submit_k8s(manifest))


@launch.command(cls=SettingsCommand)
def local(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus: Gpus = 0,
    processes: Processes = None,
    cpus: Cpus = 1,
    engine: Engine = None,
    name: Name = None,
    dry_run: DryRun = False,
    out: Out = None,
) -> None:
    """Run on this machine, with one agent per node that starts the node's processes.

    cfusion launch local configs/tcga_blca.yaml --nodes 2 --processes 2
    """
    import shlex

    from launch.cluster.local_agents import run_here

    plan = _plan(config, overrides, nodes, gpus, processes, cpus, 0.0, engine, name, sys.executable)
    if not dry_run:
        raise typer.Exit(run_here(plan))
    variables = " ".join(f"{key}={shlex.quote(value)}" for key, value in plan.environment().items())
    agent = shlex.join(plan.agent(endpoint="127.0.0.1:29400", run_id=plan.name, local_address="127.0.0.1"))
    _show("".join(f"NODE_RANK={node} {variables} {agent} &\n" for node in range(nodes)) + "wait\n", out)


def _plan(
    config: Path, overrides: list[str] | None, nodes: int, gpus: int, processes: int | None, cpus: int, hours: float,
    engine: str | None, name: str | None, python: str,
) -> LaunchPlan:  # fmt: skip
    from launch.cluster.cluster_plan import LaunchResources, make_plan

    resources = LaunchResources(nodes, gpus, processes, cpus, hours)
    return make_plan(config, overrides or [], resources, python=python, name=name, engine=engine)


def _show(text: str, out: Path | None) -> None:
    from cfusion.files import write_text

    typer.echo(text, nl=False)
    if out is not None:
        write_text(out, text)

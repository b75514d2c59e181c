"""`cfusion doctor`: check this machine, or the processes that a launcher started, before a run."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cfusion.doctor.checks import Check


def _echo(checks: list[Check]) -> None:
    from cfusion.doctor.verdict import describe_verdict, verdict

    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok" if check.passed else "FAIL" if check.required else "missing"
        typer.echo(f"{mark:<9}{check.name:<{width + 2}}{check.detail}")
    for line in describe_verdict(verdict(checks)):
        typer.echo(line)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check what a run needs: libraries, GPU, memory, disk, OpenSlide, MLflow, DeepSpeed, SLURM, the network.

    Under torchrun it also checks the processes: how many each library sees, the bandwidth and latency between them,
    and the difference between their clocks. Prints one line per check, then what this
    machine is ready for. Exits with 2 if a required check fails.

    torchrun --nproc-per-node 2 -m cfusion doctor
    """
    from cfusion.console import is_rank_zero
    from cfusion.doctor.verdict import verdict
    from cfusion.errors import CfusionError

    if "WORLD_SIZE" in os.environ:
        from cfusion.doctor.world_checks import check_world

        checks = check_world()
    else:
        from cfusion.doctor.checks import check_node

        checks = check_node()
    failed = [check.name for check in checks if check.required and not check.passed]
    if is_rank_zero():
        if as_json:
            typer.echo(
                json.dumps({"checks": [asdict(check) for check in checks], "verdict": verdict(checks)}, indent=1)
            )
        else:
            _echo(checks)
        if failed:
            raise CfusionError(f"doctor: {', '.join(failed)} failed.", "See the lines above.")
    elif failed:
        raise typer.Exit(CfusionError.exit_code)

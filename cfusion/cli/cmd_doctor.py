"""`cfusion doctor`: is this machine, or this world of processes, fit for a run?"""

from __future__ import annotations

import os

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(doctor)


def doctor() -> None:
    """Check what a run needs here: libraries, GPU, memory, disk, OpenSlide, MLflow, DeepSpeed, SLURM.

    Under torchrun it also checks the world: who sees how many processes, the bandwidth and latency between them, and
    how far their clocks are apart. Prints one line a check; leaves with 2 if one that a run cannot do without failed.

    torchrun --nproc-per-node 2 -m cfusion doctor
    """
    from cfusion.errors import CfusionError

    if "WORLD_SIZE" in os.environ:
        from cfusion.doctor.world_checks import check_world

        checks = check_world()
    else:
        from cfusion.doctor.checks import check_node

        checks = check_node()
    failed = [check.name for check in checks if check.required and not check.passed]
    if os.environ.get("RANK", "0") == "0":
        width = max(len(check.name) for check in checks)
        for check in checks:
            mark = "ok" if check.passed else "FAIL" if check.required else "missing"
            typer.echo(f"{mark:<9}{check.name:<{width + 2}}{check.told}")
        if failed:
            raise CfusionError(f"doctor: {', '.join(failed)} failed.", "The lines above say what was found.")
    elif failed:
        raise typer.Exit(CfusionError.exit_code)

"""`cfusion doctor`: is this machine, or this world of processes, fit for a run?"""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(doctor)


def doctor() -> None:
    """Check what a run needs here: libraries, GPU, memory, disk, OpenSlide, MLflow; under torchrun also the network.

    Prints one line a check; leaves with 2 if one that a run cannot do without has failed.
    """
    from cfusion.errors import CfusionError
    from launch.doctor import check_node

    checks = check_node()
    for check in checks:
        mark = "ok" if check.passed else "FAIL" if check.required else "missing"
        typer.echo(f"{mark:<8}{check.name:<14}{check.told}")
    failed = [check.name for check in checks if check.required and not check.passed]
    if failed:
        raise CfusionError(f"doctor: {', '.join(failed)} failed.", "Run bash launch/quickstart.sh again.")

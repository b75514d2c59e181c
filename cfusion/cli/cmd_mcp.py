"""`cfusion mcp`: what an assistant may ask about stores, cohorts, sweeps and runs, over the Model Context Protocol."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from cfusion.errors import CfusionError, MissingExtraError

INSTRUCTIONS = (
    "Reads what CrossFusion's commands have written and checks what they would do. Nothing is trained, extracted, "
    "submitted or removed. Paths are those of the machine where `cfusion mcp` runs."
)
_MOST = 200
"""Entries of a list in an answer; the rest is counted."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(mcp)


def mcp() -> None:
    """Serve read-only tools to an assistant over the Model Context Protocol, on standard input and output.

    The tools inspect a store, audit a cohort, plan a sweep, give its status and read the numbers of runs. An assistant
    that speaks the protocol starts this command itself; docs/howto/ask-an-assistant.md has its configuration.

      cfusion mcp
    """
    make_server().run("stdio")


def make_server() -> Any:
    """Create the server with its tools.

    Raises:
        MissingExtraError: The package `mcp` is not installed.
    """
    try:
        from mcp.server.mcpserver import MCPServer
    except ImportError as error:
        raise MissingExtraError("mcp", "mcp", "cfusion mcp") from error
    from mcp.types import ToolAnnotations

    import cfusion

    server = MCPServer("cfusion", instructions=INSTRUCTIONS, version=cfusion.__version__)
    for tool in (inspect_store, audit, sweep_plan, sweep_status, read_report):
        server.add_tool(_answering(tool), name=tool.__name__, annotations=ToolAnnotations(read_only_hint=True))
    return server


def _answering(tool: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return the tool with errors that a user can act on as its answer."""

    @functools.wraps(tool)
    def answered(*arguments: Any, **options: Any) -> dict[str, Any]:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output carries the protocol only
                return tool(*arguments, **options)
        except CfusionError as error:
            return {"error": str(error)}

    return answered


def _shortened(rows: list[Any]) -> dict[str, Any]:
    return {"total": len(rows), "shown": rows[:_MOST]}


def inspect_store(folder: str) -> dict[str, Any]:
    """List the slides of a feature store: encoder, tiles at each magnification, width, resolution, unreadable cells."""
    from preprocess.inspection import list_store

    return _shortened([dataclasses.asdict(slide) for slide in list_store(Path(folder))])


def audit(config: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """Check the cohort and splits of a YAML configuration: what a run would drop, what is doubted, and why.

    `overrides` are settings such as `splits.folds=10`.
    """
    from cfusion.cohort.audited import audited
    from cfusion.cohort.joint import read_cohorts
    from cfusion.config import load_config

    settings = load_config(Path(config), overrides or [])
    found = audited(settings, read_cohorts(settings)).to_json()
    return {**found, "findings": _shortened(found["findings"])}


def sweep_plan(file: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """List the runs of a sweep file with the state of each, counts, missing data, stale folders, and what is left.

    `estimate` has steps, hours, GPU-hours and disk of the unfinished runs; hours only if some runs are finished.
    """
    from cfusion.cli.cmd_sweep import plan_facts, planned

    settings, runs = planned(Path(file), overrides, None)
    found = plan_facts(settings, runs)
    return {**found, "runs": _shortened(found["runs"])}


def sweep_status(file: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """Say how far a sweep is: counts, failed and running runs with their logs, cost, and the seconds left."""
    from cfusion.cli.cmd_sweep import as_json, planned
    from launch.sweep.status import look, seconds_left, spent

    settings, runs = planned(Path(file), overrides, None)
    statuses = look(runs)
    found = as_json(settings, statuses, [], seconds_left=seconds_left(statuses), cost=spent(statuses))
    at_work = [run for run in found["runs"] if run["state"] in ("failed", "running")]
    return {**found, "runs": _shortened(at_work)}


def read_report(runs: list[str]) -> dict[str, Any]:
    """Read the scores of finished runs: patients, C within folds and pooled with intervals, Brier score and others."""
    import pandas as pd

    from cfusion.errors import DataError
    from cfusion.run_folder import SUMMARY, is_done

    found = {}
    for run in runs:
        if not is_done(Path(run)):
            raise DataError(f"{run}: is not the folder of a finished run.", "Give output folders of `cfusion train`.")
        table = pd.read_csv(Path(run) / SUMMARY)
        found[run] = table.astype(object).where(table.notna(), None).to_dict("records")
    return found

"""From a sweep file to the runs it means: the product of its axes, each run named by what decides its numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

import cfusion
from cfusion.config import Config, Section, validate
from cfusion.errors import ConfigError
from cfusion.files import digest_file, digest_json


class SweepConfig(Section):
    """A sweep: settings that all runs share, and axes whose product gives the runs."""

    name: str
    """Name of the sweep; also its MLflow experiment."""
    output: Path = Path("runs/sweep")
    """Folder of the sweep; each run has a folder below it."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Settings of every run, in sections as in a run's own file."""
    axes: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    """Axis → value's name → `section.key: value` of that value."""
    exclude: tuple[dict[str, str], ...] = ()
    """Combinations that are left out, as axis: value; a run is left out if it has all values of one entry."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: Values of its axes and a digest of its configuration, its tables and index, and the program's version.
        values: Its value on each axis.
        config: Its resolved configuration, `output` included.
    """

    name: str
    values: Mapping[str, str]
    config: Config


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep file.

    Raises:
        ConfigError: It cannot be read, or a key is unknown.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())}).") from error
    return validate(SweepConfig, values if isinstance(values, dict) else {}, str(path))


def plan(sweep: SweepConfig) -> list[PlannedRun]:
    """The runs of a sweep, in the order of its axes.

    Raises:
        ConfigError: A value's setting is unknown or refused, or an exclusion names an unknown axis or value.
    """
    for entry in sweep.exclude:
        for axis, value in entry.items():
            if value not in sweep.axes.get(axis, {}):
                raise ConfigError(f"sweep {sweep.name}: exclude names {axis}: {value}, which is on no axis.")
    digests: dict[Path, str] = {}
    return [_planned(sweep, values, digests) for values in _combinations(sweep)]


def _combinations(sweep: SweepConfig) -> Iterator[dict[str, str]]:
    for chosen in itertools.product(*(axis.keys() for axis in sweep.axes.values())):
        values = dict(zip(sweep.axes, chosen, strict=True))
        if not any(entry.items() <= values.items() for entry in sweep.exclude):
            yield values


def _planned(sweep: SweepConfig, values: Mapping[str, str], digests: dict[Path, str]) -> PlannedRun:
    settings: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in sweep.base.items()}
    tracking = settings.setdefault("tracking", {})
    tracking.setdefault("experiment", sweep.name)
    for axis, value in values.items():
        for key, setting in sweep.axes[axis][value].items():
            section, _, name = key.rpartition(".")
            target = settings.setdefault(section, {}) if section else settings
            target[name] = setting
    title = "-".join(values.values()) or sweep.name
    config = validate(Config, settings, f"sweep {sweep.name}, run {title}")
    decides = {
        "config": config.model_dump(mode="json", exclude={"output", "tracking"}),
        "data": [_digest(path, digests) for path in (config.cohort.table, Path(config.data.shards) / "index.json")],
        "program": cfusion.__version__,
    }
    name = f"{title}-{digest_json(decides)[:10]}"
    return PlannedRun(name, values, config.model_copy(update={"output": sweep.output / "runs" / name}))


def _digest(path: Path, known: dict[Path, str]) -> str:
    if path not in known:
        known[path] = digest_file(path) if path.is_file() else "absent"
    return known[path]

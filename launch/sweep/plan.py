"""From a sweep file to its runs: the product of its axes. What determines the numbers of a run also names it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from cfusion.config import Config, Section, validate
from cfusion.errors import ConfigError, nearest
from cfusion.extensions import names_file, plain_name
from cfusion.files import digest_json
from cfusion.program import DIGITS, code_digest
from cfusion.study.packaged import refuse_missing_config
from cfusion.yaml_files import apply_override, read_yaml, set_key
from launch.sweep.data_digests import DataDigests, contents, remembered

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_ALLOWED = "only letters, digits and . _ + = - are allowed"
_PLACE = re.compile(r"\{(\w[\w.]*)\}")

Settings = dict[str, Any]
"""`section.key` → value."""


_SETTINGS = {
    "cohort": "cohort.name", "encoder": "data.encoder", "model": "model.name", "protocol": "evaluation.protocol",
    "fold": "splits.fold",
}  # fmt: skip
"""The setting that an axis of this name varies if it is a list of values."""


def _named_values(axes: Any) -> Any:
    """Expand an axis that is a list: the values of the one setting that the axis is named after."""
    if not isinstance(axes, dict):
        return axes
    return {axis: _named(axis, values) if isinstance(values, list) else values for axis, values in axes.items()}


def _named(axis: str, values: list[Any]) -> dict[str, Settings]:
    named = {plain_name(str(value)): {_SETTINGS.get(axis, axis): value} for value in values}
    if len(named) < len(values):
        raise ValueError(f"axes.{axis}: {', '.join(map(str, values))}: two values get the same name; give them names")
    return named


def _as_text(digest: Any) -> Any:
    """Restore a digest without letters, which YAML reads as a number; refuse one that lost digits by it.

    A leading zero makes an octal number of it, an `e` between digits a number with an exponent.
    """
    if isinstance(digest, int | float) and not (type(digest) is int and len(str(digest)) == DIGITS):
        raise ValueError(f"code: YAML reads {digest!r} here; write the digest in quotes: code: '0123456789'")
    return str(digest) if type(digest) is int else digest


class SweepConfig(Section):
    """A sweep: settings that all runs share, and axes whose product gives the runs."""

    name: str
    """Name of the sweep; also its MLflow experiment."""
    output: Path = Path("runs/sweep")
    """Folder of the sweep; each run has a folder below it."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Settings of every run, in sections as in the file of a single run. `{axis}` in a text, here or on an axis, stands
    for the name of the run's value on that axis."""
    axes: Annotated[dict[str, dict[str, Settings]], BeforeValidator(_named_values)] = Field(default_factory=dict)
    """Axis → value's name → `section.key: value` of that value. Or a list of values of one setting, which the axis
    names: a key such as `seed: [1, 2, 3]`, or cohort, encoder, model, protocol, fold."""
    search: dict[str, Any] | None = None
    """Settings that each fold of every run chooses by trials on its training side, as `search` in the file of a single
    run: `space`, `trials`, `sampler`, `prune`, `seed`."""
    exclude: tuple[dict[str, str], ...] = ()
    """Combinations to leave out, as axis: value; a run is left out if it has all values of one entry."""
    code: Annotated[str | None, BeforeValidator(_as_text)] = None
    """Digest of the code whose runs count as done, as `cfusion sweep plan` prints it for stale folders; default: this
    program's. For updates that you know to change no numbers."""
    group: int = Field(8, ge=1)
    """Maximum number of runs that share one read of the shards with `train.folds=together`; the models, moments and
    best weights of all their folds are in memory at once."""

    @model_validator(mode="after")
    def _names_are_plain(self) -> SweepConfig:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} becomes a folder's name: {_ALLOWED}")
        for axis, values in self.axes.items():
            for name in (axis, *values):
                if not _NAME.fullmatch(name):
                    raise ValueError(f"axes.{axis}: {name!r} becomes part of a folder's name: {_ALLOWED}")
        if "output" in self.base or any("output" in keys for values in self.axes.values() for keys in values.values()):
            raise ValueError(
                "output is the folder of the sweep, with a folder for each run; set it at the top of the file"
            )
        return self

    @model_validator(mode="after")
    def _search_stands_once(self) -> SweepConfig:
        if self.search is None:
            return self
        if self.base.get("search") is not None:
            raise ValueError("search stands at the top of the file and in base; keep one")
        space = self.search.get("space")
        for axis, values in self.axes.items():
            twice = {key for settings in values.values() for key in settings} & set(space if space else ())
            if twice:
                raise ValueError(f"search.space and axes.{axis} both set {min(twice)}; keep one")
        return self

    @model_validator(mode="after")
    def _axes_set_distinct_keys(self) -> SweepConfig:
        owners = {axis: {key for settings in values.values() for key in settings} for axis, values in self.axes.items()}
        for (one, keys), (other, others) in itertools.combinations(owners.items(), 2):
            for key, twin in itertools.product(sorted(keys), sorted(others)):
                if f"{key}.".startswith(f"{twin}.") or f"{twin}.".startswith(f"{key}."):
                    raise ValueError(
                        f"axes {one} and {other} both set {max(key, twin, key=len)}, and one would override the other; "
                        f"set it on one of them, with {{{one}}} in its text if it depends on both"
                    )
        return self


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: Values of its axes and a digest of its configuration, its data and the code.
        values: Its value on each axis.
        config: Its resolved configuration, `output` included.
        absent: What is missing of its data, in a sentence; empty if nothing is.
        data: Digest of each of its tables, splits and shards, by path.
        code: Digest of the program that planned it.
        same_code: Digest of the code whose runs count as done, if the sweep names it.
    """

    name: str
    values: Mapping[str, str]
    config: Config
    absent: str = ""
    data: Mapping[str, str] = field(default_factory=dict)
    code: str = field(default_factory=code_digest)
    same_code: str | None = None

    def changed(self, data: DataDigests) -> str:
        """Report what changed since the run was named, in a sentence; empty if nothing did.

        Args:
            data: Digests of the data now; each file is read once for several runs.
        """
        now, absent = data.of(self.config)
        if absent:
            return absent
        other = [place for place, digest in self.data.items() if now[place] != digest]
        other += ["the program"] if code_digest() != self.code else []
        return f"Changed since the run was planned: {', '.join(other)}. Start the sweep again." if other else ""


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep file; `overrides` (`section.key=value`) apply to all its runs, `output=…` moves the sweep.

    Raises:
        ConfigError: It cannot be read, a key is unknown, or an override sets what an axis sets.
    """
    refuse_missing_config(path)
    values = read_yaml(path)
    base = values.get("base") or {}
    if not isinstance(base, dict):
        raise ConfigError(f"{path}: base={base!r}: expected sections with keys, found {type(base).__name__}.")
    keys = [apply_override(base, override) for override in overrides]
    if "output" in keys:
        values["output"] = base.pop("output")
    sweep = validate(SweepConfig, {**values, "base": base}, str(path))
    for axis, named in sweep.axes.items():
        for key in set(keys) & {key for settings in named.values() for key in settings}:
            raise ConfigError(f"{key}=…: the axis {axis} of {path} sets it.", f"Choose with --only {axis}=VALUE.")
    return sweep


def plan(sweep: SweepConfig, only: Sequence[str] = ()) -> list[PlannedRun]:
    """Return the runs of a sweep, in the order of its axes.

    Args:
        sweep: The sweep.
        only: `axis=value`: only runs with this value; several values of one axis may be named.

    Raises:
        ConfigError: A value's setting is unknown or refused, a model does not exist, or an exclusion or `only` names an
            unknown axis or value.
    """
    for entry in sweep.exclude:
        for axis, value in entry.items():
            _check_value(sweep, axis, value, f"sweep {sweep.name}: exclude names {axis}: {value}")
    chosen: dict[str, set[str]] = {}
    for text in only:
        axis, _, value = text.partition("=")
        _check_value(sweep, axis, value, f"--only {text}")
        chosen.setdefault(axis, set()).add(value)
    data = DataDigests(remembered(sweep.output))
    runs = [
        _planned(sweep, values, data)
        for values in _combinations(sweep)
        if all(values[axis] in names for axis, names in chosen.items())
    ]
    if not runs:
        raise ConfigError(
            f"sweep {sweep.name}: has no runs.", "An axis is empty, or exclude or --only leaves out all runs."
        )
    _check_models(sweep, {run.config.model.name for run in runs})
    _check_twins(sweep, runs)
    return runs


def _check_value(sweep: SweepConfig, axis: str, value: str, what: str) -> None:
    if axis not in sweep.axes:
        raise ConfigError(f"{what}: there is no axis {axis}.", nearest(axis, sweep.axes))
    if value not in sweep.axes[axis]:
        raise ConfigError(f"{what}: there is no {value} on the axis {axis}.", nearest(value, sweep.axes[axis]))


def _check_twins(sweep: SweepConfig, runs: Sequence[PlannedRun]) -> None:
    seen: dict[str, str] = {}
    for run in runs:
        digest = run.name.rpartition("-")[2]
        if digest in seen:
            raise ConfigError(
                f"sweep {sweep.name}: {seen[digest]} and {run.name} are the same run: no setting differs.",
                "Leave out one of the two values.",
            )
        seen[digest] = run.name


def _check_models(sweep: SweepConfig, names: set[str]) -> None:
    from cfusion.models.registry import model_code

    for name in sorted(name for name in names if not names_file(name)):
        try:
            model_code(name)
        except ConfigError as error:
            raise ConfigError(f"sweep {sweep.name}: {error.message}", error.remedy, topic=error.topic) from error


def _combinations(sweep: SweepConfig) -> Iterator[dict[str, str]]:
    for chosen in itertools.product(*(axis.keys() for axis in sweep.axes.values())):
        values = dict(zip(sweep.axes, chosen, strict=True))
        if not any(entry.items() <= values.items() for entry in sweep.exclude):
            yield values


def _planned(sweep: SweepConfig, values: Mapping[str, str], data: DataDigests) -> PlannedRun:
    title = "-".join(values.values()) or sweep.name
    source = f"sweep {sweep.name}, run {title}"
    settings = _filled(sweep.base, values, source)
    if sweep.search is not None:
        settings["search"] = _filled(sweep.search, values, source)
    tracking = settings.setdefault("tracking", {})
    if isinstance(tracking, dict):
        tracking.setdefault("experiment", sweep.name)
    for axis, value in values.items():
        for key, setting in sweep.axes[axis][value].items():
            set_key(settings, key, _filled(setting, values, source))
    config = validate(Config, settings, source)
    digests, absent = data.of(config)
    decides = {"config": config.deciding(), "data": contents(config, digests), "code": sweep.code or code_digest()}
    name = f"{title}-{digest_json(decides)[:10]}"
    config = config.model_copy(update={"output": sweep.output / "runs" / name})
    return PlannedRun(name, values, config, absent, digests, same_code=sweep.code)


def _filled(setting: Any, values: Mapping[str, str], source: str) -> Any:
    """Copy a setting, with every `{axis}` in its texts replaced."""
    if isinstance(setting, dict):
        return {key: _filled(value, values, source) for key, value in setting.items()}
    if isinstance(setting, list):
        return [_filled(value, values, source) for value in setting]
    if not isinstance(setting, str) or "{" not in setting:
        return setting

    def value_of(place: re.Match[str]) -> str:
        if place[1] not in values:
            raise ConfigError(f"{source}: {setting!r}: there is no axis {place[0]}.", nearest(place[1], values))
        return values[place[1]]

    return _PLACE.sub(value_of, setting)

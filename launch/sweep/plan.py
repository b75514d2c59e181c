"""From a sweep file to its runs: the product of its axes. What determines the numbers of a run also names it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from cfusion.addresses import Address
from cfusion.config import Config, Section, validate
from cfusion.errors import ConfigError, DataError, nearest
from cfusion.extensions import file_of, names_file, package_code, plain_name
from cfusion.files import digest_file, digest_json, read_json, write_json
from cfusion.program import DIGITS, code_digest
from cfusion.run_folder import CARD, REGISTRY, WEIGHTS, fold_models, is_done
from cfusion.study.packaged import data_name
from cfusion.yaml_files import apply_override, read_yaml, set_key

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_ALLOWED = "only letters, digits and . _ + = - are allowed"
_DATA, _ABSENT = "data.json", "absent"
_PACKAGED = "model "
"""Prefix of the key under which the digest of an installed package's model is stored."""
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
    data = DataDigests(_remembered(sweep.output))
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
    decides = {"config": config.deciding(), "data": _contents(config, digests), "code": sweep.code or code_digest()}
    name = f"{title}-{digest_json(decides)[:10]}"
    config = config.model_copy(update={"output": sweep.output / "runs" / name})
    return PlannedRun(name, values, config, absent, digests, same_code=sweep.code)


def places(config: Config) -> dict[str, str]:
    """Return the names of a run's tables, folds, shards and model file by setting; a packaged one is `package:PATH`."""
    return {key: _place_name(path) for key, path in _paths(config).items()}


def _paths(config: Config) -> dict[str, Path | Address]:
    model = config.model.name
    found: dict[str, Path | Address | None] = {}
    for one in config.cohort_configs:
        section = f"cohorts.{one.name}" if config.cohorts else "cohort"
        found |= {f"{section}.{key}": getattr(one, key) for key in ("table", "slides", "follow_up")}
    found |= {"splits.test_cases": config.splits.test_cases}
    found |= _numbered("splits.directory", config.splits.directory) | _numbered("data.shards", config.data.shards)
    found |= {"model.name": file_of(model) if names_file(model) else None, "train.start_from": _start_folder(config)}
    return {key: path for key, path in found.items() if path}


def _numbered(key: str, value: Any) -> dict[str, Any]:
    """Return the places of a setting, by the setting and, of several, the name or number of each."""
    if isinstance(value, tuple):
        value = dict(enumerate(value))
    return {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}


def _start_folder(config: Config) -> Path | None:
    """Return the folder of the model that training starts from; None for a registered one, which has no digest yet."""
    start = config.train.start_from
    return None if start is None or start.startswith(REGISTRY) else Path(start)


def _place_name(path: Path | Address) -> str:
    return data_name(path) if isinstance(path, Path) else str(path)


def _contents(config: Config, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return the data that a run's name depends on: contents by setting, or the path where a file is missing."""
    located = {
        key: digests[place] if digests[place] != _ABSENT else [_ABSENT, place] for key, place in places(config).items()
    }
    packages = {place: digest for place, digest in digests.items() if place.startswith(_PACKAGED)}
    start = config.train.start_from
    registered = {"train.start_from": start} if start is not None and "train.start_from" not in located else {}
    return located | packages | registered


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


@dataclass
class DataDigests:
    """Digests of the files that runs depend on; each is read once for the entire sweep.

    Attributes:
        remembered: Digests of files when the sweep was last run. If a file is missing now, as on a machine other than
            the one that trained, its runs keep their names.
    """

    remembered: Mapping[str, str]
    _known: dict[str, tuple[str, str]] = field(default_factory=dict)
    _packages: dict[str, str] = field(default_factory=dict)

    def of(self, config: Config) -> tuple[dict[str, str], str]:
        """Return digests of a run's tables, splits, shards and model file by path, and what is missing, in a sentence.

        Shards are identified by their index, which has a checksum of every tar; a model of an installed package by the
        version of the package and its module.
        """
        found = {_place_name(path): self._digest(path) for path in _paths(config).values()}
        absent = next((sentence for _, sentence in found.values() if sentence), "")
        digests = {place: digest for place, (digest, _) in found.items()}
        model = config.model.name
        if not names_file(model) and (digest := self._package(model)):
            digests[f"{_PACKAGED}{model}"] = digest
        return digests, absent

    def _package(self, model: str) -> str:
        """Return the digest of the installed package that offers a model; empty if none does."""
        if model not in self._packages:
            code = package_code("cfusion.models", model)
            self._packages[model] = "" if code is None else digest_json(code.identity)
        return self._packages[model]

    def _digest(self, path: Path | Address) -> tuple[str, str]:
        place = str(path)
        if place not in self._known:
            digest, absent = _digest_place(path.reveal() if isinstance(path, Address) else place)
            self._known[place] = (self.remembered.get(place, digest) if absent else digest, absent)
        return self._known[place]


def remember_data(output: Path, runs: Sequence[PlannedRun]) -> None:
    """Store the digests of the runs' data in the sweep's folder."""
    seen = {place: digest for run in runs for place, digest in run.data.items() if digest != _ABSENT}
    if seen.items() - _remembered(output).items():
        write_json(output / _DATA, {**_remembered(output), **seen})


def _remembered(output: Path) -> dict[str, str]:
    return read_json(output / _DATA) if (output / _DATA).is_file() else {}


def _model_weights(folder: Path) -> list[Path]:
    """Return the weights of the model in a folder, or of the fold models of the run there."""
    if (folder / CARD).is_file():
        return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []
    return [model / WEIGHTS for model in fold_models(folder)] if is_done(folder) else []


def _digest_place(place: str) -> tuple[str, str]:
    from cfusion.data.shard_index import INDEX_NAME

    if "://" in place:
        from cfusion.data.remote import RangeSource

        try:
            return digest_json(RangeSource(place).read_all(INDEX_NAME).hex()), ""
        except DataError as error:
            return _ABSENT, str(error)
    path = Path(place)
    if path.is_file():
        return digest_file(path), ""
    if (path / INDEX_NAME).is_file():
        return digest_file(path / INDEX_NAME), ""
    weights = _model_weights(path)
    if weights:
        return digest_json([digest_file(file) for file in weights]), ""
    files = sorted(path.glob("splits_*.csv"))
    if files:
        return digest_json([(file.name, digest_file(file)) for file in files]), ""
    if path.exists():
        return (
            _ABSENT,
            f"{place}: has neither {INDEX_NAME} nor splits_K.csv nor a model. Set it to the folder that has.",
        )
    # Any folder of the path may be wrong, such as an encoder's.
    wrong = next(part for part in (path, *path.parents) if part.parent.is_dir())
    siblings = [p.name for p in sorted(wrong.parent.glob("*"))]
    remedy = nearest(wrong.name, siblings) if siblings else "Put it there, or correct the setting."
    return _ABSENT, f"{place}: not found. {remedy}" if wrong == path else f"{place}: there is no {wrong}. {remedy}"

"""The data that a run depends on: where it is, its digests, and what of it is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfusion.addresses import Address
from cfusion.config import Config
from cfusion.errors import DataError, nearest, similar
from cfusion.extensions import file_of, names_file, package_code
from cfusion.files import digest_file, digest_json, read_json, write_json
from cfusion.run_folder import CARD, REGISTRY, WEIGHTS, fold_models, is_done
from cfusion.study.packaged import data_name

_DATA, _ABSENT = "data.json", "absent"
_FEW = 8
"""Most neighbours of a missing file that its error lists."""
_PACKAGED = "model "
"""Prefix of the key under which the digest of an installed package's model is stored."""


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


def contents(config: Config, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return the data that a run's name depends on: contents by setting, or the path where a file is missing."""
    located = {
        key: digests[place] if digests[place] != _ABSENT else [_ABSENT, place] for key, place in places(config).items()
    }
    packages = {place: digest for place, digest in digests.items() if place.startswith(_PACKAGED)}
    start = config.train.start_from
    registered = {"train.start_from": start} if start is not None and "train.start_from" not in located else {}
    return located | packages | registered


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


def remember_data(output: Path, data: Sequence[Mapping[str, str]]) -> None:
    """Store digests of the runs' data, by path, in the sweep's folder."""
    seen = {place: digest for run in data for place, digest in run.items() if digest != _ABSENT}
    if seen.items() - remembered(output).items():
        write_json(output / _DATA, {**remembered(output), **seen})


def remembered(output: Path) -> dict[str, str]:
    """Return the digests of data when the sweep in a folder was last run, by path."""
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
    siblings = [p.name for p in sorted(wrong.parent.glob("[!.]*"))]
    named = len(siblings) <= _FEW or similar(wrong.name, siblings)
    remedy = nearest(wrong.name, siblings) if siblings and named else "Put it there, or correct the setting."
    return _ABSENT, f"{place}: not found. {remedy}" if wrong == path else f"{place}: there is no {wrong}. {remedy}"

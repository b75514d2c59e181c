"""Find out what a folder of features is, and make shards of it that a run reads."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cfusion.data.encoder_names import TRIDENT, encoder_name
from cfusion.data.shard_index import ShardIndex, read_index
from cfusion.data.store import FeatureStore, encoders_in
from cfusion.errors import DataError, LayoutError
from cfusion.types import magnification_value
from preprocess.encoders.cards import CARDS
from preprocess.importers import ImportOptions, find_layout, import_features
from preprocess.layouts import Found, SourceFolder, stated_magnification
from preprocess.packing import pack_store

logger = logging.getLogger(__name__)

COMMON_SHARE = 0.5
"""Share of the slides that must have a magnification for a model to read it; the audit drops the other slides."""

USUAL_MAGNIFICATION = 20.0
"""Taken for tiles of one size whose files, folders and options state no magnification."""

UNNAMED = "unnamed"
"""Name of an encoder that nothing states."""


@dataclass(frozen=True)
class FeatureAnswers:
    """What the user says about the features.

    Attributes:
        layout: Layout of another program's folder, or auto.
        encoder: Encoder to use, or its name where the files state none.
        only: Patterns of folders or files to take; empty: all.
        magnification: Magnification of files that do not state theirs.
    """

    layout: str = "auto"
    encoder: str | None = None
    only: tuple[str, ...] = ()
    magnification: float | None = None


@dataclass(frozen=True)
class ShardedFeatures:
    """Shards for a run, and what is known of them.

    Attributes:
        shards: Their folder.
        encoder: The encoder.
        dim: Width of an embedding.
        tiles: Number of tiles by magnification name, for each slide.
        magnifications: Those that enough slides have, finest first.
        came_from: The input, as words.
        remarks: What was assumed or left out, as sentences for the user.
    """

    shards: Path
    encoder: str
    dim: int
    tiles: Mapping[str, Mapping[str, int]]
    magnifications: tuple[float, ...]
    came_from: str
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(cls, shards: Path, index: ShardIndex, came_from: str, remarks: list[str]) -> ShardedFeatures:
        """Describe shards by their index.

        Raises:
            DataError: No slide has been packed.
        """
        tiles = {sample.slide_id: sample.tiles for sample in index.samples}
        if not tiles:
            raise DataError(f"{shards}: has no slides.", "Check the folder of features.")
        remarks += [f"{len(index.refused)} slides of the store were not packed"] * bool(index.refused)
        held = {name: sum(bool(of_slide.get(name)) for of_slide in tiles.values()) for name in index.magnifications}
        common = [name for name, slides in held.items() if slides >= COMMON_SHARE * len(tiles)]
        for name, slides in held.items():
            if slides < len(tiles):
                use = "" if name in common else ", so the model does not read it"
                remarks.append(f"{slides} of {len(tiles)} slides have {name}{use}")
        return cls(shards, index.encoder, index.dim, tiles, tuple(map(magnification_value, common)), came_from,
                   tuple(remarks))  # fmt: skip


def shard_features(source: Path, shards: Path, store: Path, answers: FeatureAnswers) -> ShardedFeatures:
    """Return shards of the features in a folder, which are made where they are not there yet.

    Args:
        source: Shards, a feature store, or a folder of another program.
        shards: Folder for the shards, unless `source` has them.
        store: Feature store for what is imported.
        answers: What the user says about the features.

    Raises:
        ConfigError, DataError: The folder has no features, or they cannot be used, or an answer does not fit them.
    """
    if not source.is_dir():
        raise LayoutError(f"{source}: no such folder.", "Give the folder of the features.")
    if (source / "index.json").is_file():
        _refuse_answers(source, "holds shards", answers, "encoder", "layout", "only", "magnification")
        return ShardedFeatures.of(source, read_index(source), f"the shards in {source}", [])
    remarks: list[str] = []
    origin = f"the feature store {source}"
    if encoders_in(source):
        _refuse_answers(source, "is a feature store", answers, "layout", "only", "magnification")
        store = source
        encoder = answers.encoder
    else:
        layout, encoder, remarks = _import(source, store, answers)
        origin = f"the folder {source} (layout {layout})"
    logger.info("packing %s into %s", store, shards)
    index = pack_store(FeatureStore.open(store, encoder), shards)
    return ShardedFeatures.of(shards, index, origin, remarks)


def _refuse_answers(source: Path, what: str, answers: FeatureAnswers, *names: str) -> None:
    defaults = FeatureAnswers()
    for name in names:
        if getattr(answers, name) != getattr(defaults, name):
            option = {"layout": "from"}.get(name, name)
            raise LayoutError(f"{source}: {what}, so --{option} has no use.", f"Leave out --{option}.")


def _import(source: Path, store: Path, answers: FeatureAnswers) -> tuple[str, str, list[str]]:
    """Import another program's features; return layout, encoder and remarks."""
    folder = SourceFolder(source, answers.only, answers.magnification)
    layout, found = find_layout(folder, answers.layout)
    answers, remarks = _completed(source, found, answers)
    options = ImportOptions(answers.only, answers.magnification)
    # An assumed magnification changes how the files are read.
    same = found if answers.magnification == folder.magnification else None
    report = import_features(source, store, layout, answers.encoder, options, same)
    if not report.imported:
        name, why = next(iter(report.refused.items()), (str(source), "no slide"))
        raise DataError(f"{source}: no slide could be imported; first: {name}: {why}", f"See {report.table}.")
    if report.refused:
        remarks.append(f"refused slides: {len(report.refused)}; see {report.table}")
    remarks.append(report.alignment)
    return layout, _stored_name(answers.encoder, found), remarks


def _stored_name(answer: str | None, found: Found) -> str:
    """Return the name of the encoder in the store, see `import_features`."""
    if answer:
        which, _, name = answer.partition("=")
        return name or encoder_name(which)
    return encoder_name(next(name for name in sorted({f.encoder or "" for f in found.files}) if name))


def _completed(source: Path, found: Found, answers: FeatureAnswers) -> tuple[FeatureAnswers, list[str]]:
    """Fill in what neither the files nor the user state: from the names of folders, or the usual."""
    remarks: list[str] = []
    wrong = "if that is wrong, delete what was made and give"
    if not any(file.magnification for file in found.files) and answers.magnification is None:
        named = _named_magnification(source, found)
        taken = named or USUAL_MAGNIFICATION
        answers = dataclasses.replace(answers, magnification=taken)
        why = "from the name of the folder" if named else "assumed, since nothing states it"
        remarks.append(f"magnification {taken:g}x, {why}; {wrong} --magnification")
    if not any(file.encoder for file in found.files) and not answers.encoder:
        encoder = _named_encoder(source, found)
        answers = dataclasses.replace(answers, encoder=encoder or UNNAMED)
        why = "from the name of the folder" if encoder else "since the files state none"
        remarks.append(f"encoder {answers.encoder}, {why}; {wrong} --encoder")
    return answers, remarks


def _folders(source: Path, found: Found) -> list[str]:
    """List the names of the folders of the files, innermost first."""
    inner = next((file.paths[0].absolute().parent for file in found.files), source.absolute())
    return [inner.name, *(parent.name for parent in inner.parents if parent.is_relative_to(source.absolute()))]


def _named_magnification(source: Path, found: Found) -> float | None:
    return next((stated for name in _folders(source, found) if (stated := stated_magnification(name))), None)


def _named_encoder(source: Path, found: Found) -> str | None:
    known = sorted({*TRIDENT, *CARDS}, key=len, reverse=True)
    for name in _folders(source, found):
        for encoder in known:
            if re.search(rf"(?<![a-z0-9]){re.escape(encoder)}(?![a-z0-9])", name.lower()):
                return encoder_name(encoder)
    return None

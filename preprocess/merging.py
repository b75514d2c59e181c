"""Merge feature stores: copy the slides of one store into another, unless the two contradict each other."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfusion.console import progress
from cfusion.data.store import FeatureStore, check_digests, encoders_in, write_slide
from cfusion.errors import ConfigError, DataError, LayoutError
from cfusion.files import atomic_path
from preprocess.annotation import SHEET_SUFFIXES
from preprocess.outcome import store_is_lost

logger = logging.getLogger(__name__)

SAME_ENCODER = ("version", "weights", "code_sha256", "transform", "pool", "coarser")
"""Attributes in which all slides of one encoder must agree: otherwise equal columns mean different things."""

SAME_SETTINGS = ("resolution", "resample", "min_tissue", "grid_version", "tissue", "artefacts", "precision")
"""Settings of extraction that may differ between the slides of a store; the difference is reported."""


@dataclass(frozen=True)
class Merge:
    """What a merge copies.

    Attributes:
        source: Store to copy from.
        target: Store to copy into.
        copied: Encoder and slide of each group to copy.
        same: Groups that both have, with the same content.
        refused: Groups that cannot be copied, by `encoder/slide_id`, with the reason.
        remarks: Settings in which the stores differ.
    """

    source: Path
    target: Path
    copied: tuple[tuple[str, str], ...]
    same: tuple[tuple[str, str], ...]
    refused: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def plan_merge(source: Path, target: Path) -> Merge:
    """Compare two stores; nothing is changed.

    Raises:
        ConfigError: The two are the same store.
        LayoutError: They have features of one encoder name that were made with different encoders.
        StoreError: A store is missing or empty.
    """
    if source.resolve() == target.resolve():
        raise ConfigError(f"{source}: a store cannot be merged with itself.", "Give another store.")
    encoders = encoders_in(source)
    if not encoders:
        raise ConfigError(f"{source}: holds no encoder's features.", "Give the folder that `cfusion preprocess` wrote.")
    copied: list[tuple[str, str]] = []
    same: list[tuple[str, str]] = []
    refused: dict[str, str] = {}
    remarks: list[str] = []
    for encoder in encoders:
        ours, theirs = FeatureStore(target / encoder), FeatureStore(source / encoder)
        there = set(ours.slide_ids())
        if there:
            remarks += _compared(ours, theirs)
        for slide_id in theirs.slide_ids():
            name = f"{encoder}/{slide_id}"
            digests = (theirs.attrs_if_complete(slide_id) or {}).get("digests")
            if digests is None:
                refused[name] = "unreadable, or without digests"
            elif slide_id not in there:
                copied.append((encoder, slide_id))
            elif (ours.attrs_if_complete(slide_id) or {}).get("digests") == digests:
                same.append((encoder, slide_id))
            else:
                refused[name] = f"{target} has other features of it; remove them there, or in {source}"
    return Merge(source, target, tuple(copied), tuple(same), refused, tuple(dict.fromkeys(remarks)))


def _compared(ours: FeatureStore, theirs: FeatureStore) -> list[str]:
    """Return the settings in which two stores of one encoder differ.

    Raises:
        LayoutError: The embeddings are not of the same encoder, or have other widths or magnifications.
    """
    first, second = (_facts(store) for store in (ours, theirs))
    for key in ("width", "magnifications", *SAME_ENCODER):
        # Imported features do not state all of these.
        untold = None in (first.get(key), second.get(key)) and key != "coarser"
        if first.get(key) != second.get(key) and not untold:
            raise LayoutError(
                f"{ours.path} and {theirs.path} differ in {key}: {first.get(key)} and {second.get(key)}.",
                "Store them under different names: `cfusion preprocess import` or another --store.",
            )
    differing = [key for key in (*SAME_ENCODER, *SAME_SETTINGS) if first.get(key) != second.get(key)]
    return [f"{ours.encoder}: {key} {first.get(key)} and {second.get(key)}" for key in differing]


def _facts(store: FeatureStore) -> dict[str, Any]:
    """Return what the first readable slide of a store says about its encoder."""
    for slide_id in store.slide_ids():
        attrs = store.attrs_if_complete(slide_id)
        if attrs is not None:
            shapes = store.shapes(slide_id)
            widths = {width for _, width in shapes.values()}
            return {**attrs, "width": sorted(widths), "magnifications": list(shapes)}
    return {}


def merge_stores(merge: Merge) -> dict[str, str]:
    """Carry out a merge; a slide whose bytes differ from their digests is not copied.

    Returns:
        Slides that were not copied, by `encoder/slide_id`, with the reason: those that the plan names among them.

    Raises:
        DataError: The target cannot be written. Slides that were copied until then stay.
    """
    refused = dict(merge.refused)
    with progress("Merging", len(merge.copied)) as bar:
        for encoder, slide_id in merge.copied:
            try:
                slide = FeatureStore(merge.source / encoder).read(slide_id)
                check_digests(slide)
                write_slide(merge.target, slide)
                _copy_sheets(merge, slide_id)
            except DataError as error:
                if store_is_lost(error):
                    raise
                logger.warning("slide %s refused: %s", slide_id, error)
                refused[f"{encoder}/{slide_id}"] = str(error)
            bar.advance()
    return refused


def _copy_sheets(merge: Merge, slide_id: str) -> None:
    for suffix in SHEET_SUFFIXES:
        source, target = (store / "sheets" / f"{slide_id}{suffix}" for store in (merge.source, merge.target))
        if source.is_file() and not target.exists():
            try:
                with atomic_path(target) as temporary:
                    shutil.copyfile(source, temporary)
            except OSError as error:
                raise DataError(f"{target}: cannot be written ({error.strerror or error}).") from error

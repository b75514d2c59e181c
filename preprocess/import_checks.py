"""Compare the files of a folder of features with each other, and with the store that they go into."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from cfusion.data.store import FeatureStore
from cfusion.errors import LayoutError, StoreError
from cfusion.types import SLIDE, magnification_name, magnification_value
from preprocess.feature_files import declared_shape
from preprocess.layouts import FeatureFile


def check_tilings(source: Path, files: Sequence[FeatureFile]) -> None:
    """Refuse one magnification with several tile sizes or overlaps.

    Raises:
        LayoutError: The folder has such a magnification.
    """
    by_name: dict[str, dict[str, Path]] = {}
    for file in files:
        by_name.setdefault(file.magnification, {}).setdefault(file.tiling, file.paths[0].parent)
    for tilings in by_name.values():
        if len(tilings) > 1:
            first, second, *_ = tilings.values()
            raise LayoutError(
                f"{source}: {first} and {second} have one magnification with different tile sizes or overlaps.",
                f"Choose one, such as --only '{first.parent.name}', with the folders of the other magnifications.",
            )


def check_magnification(source: Path, files: Sequence[FeatureFile], wanted: float | None) -> None:
    """Refuse files of another magnification than the user says.

    Raises:
        LayoutError: The folder has such files.
    """
    others = sorted({f.magnification for f in files} - {magnification_name(wanted)}) if wanted is not None else []
    if others:
        raise LayoutError(
            f"{source}: its files are of {', '.join(others)}, but --magnification says {wanted:g}.",
            "Leave --magnification out, or choose folders with --only.",
        )


def odd_widths(
    source: Path, by_slide: Mapping[str, Sequence[FeatureFile]], store: FeatureStore, *, overwrite: bool
) -> dict[str, str]:
    """Return the slides whose embeddings have another width than those of the other slides, with both files.

    Args:
        source: The folder.
        by_slide: The files of each slide.
        store: The encoder's slides in the store, which need not exist.
        overwrite: Whether slides that the store has are replaced.

    Raises:
        LayoutError: No width is that of most files.
        StoreError: The store has features of another width.
    """
    width_of = {file: width for files in by_slide.values() for file in files if (width := _width(file))}
    counts = collections.Counter(width_of.values()).most_common()
    if not counts:
        return {}
    example = {width: next(f.paths[0] for f in width_of if width_of[f] == width) for width, _ in counts}
    usual = counts[0][0]
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        raise LayoutError(
            f"{source}: {example[usual]} has embeddings of width {usual}, but {example[counts[1][0]]} of width "
            f"{counts[1][0]}, so they are of different encoders.",
            "Choose the files of one encoder with --only.",
        )
    replaced = set(by_slide) if overwrite else set()
    widths = ((slide_id, _stored(store, slide_id)) for slide_id in store.slide_ids() if slide_id not in replaced)
    kept, width = next(((slide_id, width) for slide_id, width in widths if width is not None), ("", usual))
    if width != usual:
        raise StoreError(
            f"{store.path}: slide {kept} has embeddings of width {width}, but {example[usual]} has width {usual}, so "
            "they are of different encoders.",
            f"Give another --store, or another name with --encoder {store.encoder}=NAME.",
        )
    return {
        slide_id: f"{file.paths[0]}: has embeddings of width {width_of[file]}, but {example[usual]} and most others "
        f"have width {usual}, so they are of different encoders"
        for slide_id, files in by_slide.items()
        for file in files
        if width_of.get(file, usual) != usual
    }


def _stored(store: FeatureStore, slide_id: str) -> int | None:
    """Return the width of a slide's embeddings in the store; None if they are unreadable."""
    try:
        return next((shape[1] for shape in store.shapes(slide_id).values()), None)
    except StoreError:
        return None


def _width(file: FeatureFile) -> int | None:
    """Return the width of a file's embeddings; None if it has none, or is not of the shape that its layout has."""
    shape = declared_shape(file.paths[0])
    if not shape or 0 in shape:
        return None
    vector = max(shape) == math.prod(shape)
    fits = vector if file.magnification == SLIDE else len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)
    return shape[-1] if fits else None


def missing_magnifications(by_slide: Mapping[str, Sequence[FeatureFile]]) -> dict[str, str]:
    """Return the slides that lack magnifications which most slides have, with a warning."""
    has = {slide_id: {file.magnification for file in files} for slide_id, files in by_slide.items()}
    counts = collections.Counter(name for names in has.values() for name in names)
    usual = {name for name, count in counts.items() if name and count > len(has) / 2}
    lacks = {slide_id: sorted(usual - names, key=magnification_value) for slide_id, names in has.items()}
    return {slide_id: f"lacks {', '.join(names)}, which most slides have" for slide_id, names in lacks.items() if names}

"""Derive coarser magnifications from finer ones: the embedding of a cell is the mean of its children's.

It is a stand-in for an embedding of the coarser picture. So it is stored apart and marked, and a model that was trained
on one kind does not read the other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import cfusion
from cfusion.console import progress
from cfusion.data.store import FeatureStore, array_digests, check_digests, write_slide
from cfusion.errors import ConfigError, DataError, StoreError
from cfusion.types import SlideFeatures, magnification_name, magnification_value
from preprocess.grid import check_halving
from preprocess.outcome import store_is_lost

logger = logging.getLogger(__name__)

CHILDREN = 4
"""Tiles of the next finer magnification in a complete cell."""


@dataclass(frozen=True)
class DerivedStore:
    """Result of a derivation.

    Attributes:
        done: Slides that were written, each with the mean share of children per derived magnification.
        refused: Slides that were not, with the reason.
    """

    done: dict[str, dict[str, float]]
    refused: dict[str, str]


def derive_store(
    source: Path, target: Path, magnifications: Sequence[float], encoder: str | None = None
) -> DerivedStore:
    """Derive coarser magnifications of all slides of a store, and write them with the finest into another store.

    Nothing that the other store has is replaced: a slide with the same features is done, one with others is refused.

    Args:
        source: Feature store.
        target: Feature store to write; it must be another one.
        magnifications: Those to derive, finest first, each half the one before.
        encoder: The encoder; None: the only one.

    Raises:
        ConfigError: The stores are the same, or the magnifications do not halve.
        StoreError: The store cannot be read or written, or the other one has features that are not derived.
    """
    if source.resolve() == target.resolve():
        raise ConfigError(f"{target}: derived features go into another store.", "Give another --out.")
    check_halving(magnifications)
    store = FeatureStore.open(source, encoder)
    written = FeatureStore(target / store.encoder)
    for slide_id in written.slide_ids():
        if not (written.attrs_if_complete(slide_id) or {}).get("coarser"):
            raise StoreError(
                f"{target}: slide {slide_id} of {store.encoder} is not derived, and derived features go into a store "
                "without others.",
                "Give another --out.",
            )
    done: dict[str, dict[str, float]] = {}
    refused: dict[str, str] = {}
    slide_ids = store.slide_ids()
    with progress("Deriving", len(slide_ids)) as bar:
        for slide_id in slide_ids:
            try:
                slide = store.read(slide_id)
                check_digests(slide)
                found = derive_slide(slide, magnifications)
                if not _is_stored(written, found):
                    write_slide(target, found)
                done[slide_id] = found.attrs["derived_share"]
            except DataError as error:
                if store_is_lost(error):
                    raise
                logger.warning("slide %s refused: %s", slide_id, error)
                refused[slide_id] = str(error)
            bar.advance()
    return DerivedStore(done, refused)


def _is_stored(store: FeatureStore, slide: SlideFeatures) -> bool:
    """Return whether the store has exactly these features.

    Raises:
        StoreError: It has others.
    """
    attrs = store.attrs_if_complete(slide.slide_id)
    if attrs is None:
        return False
    if attrs.get("digests") == array_digests(slide):
        return True
    raise StoreError(
        f"{store.path}: already has other derived features of slide {slide.slide_id}.",
        "Give another --out, or remove them first with `cfusion preprocess remove`.",
    )


def derive_slide(slide: SlideFeatures, magnifications: Sequence[float]) -> SlideFeatures:
    """Derive coarser magnifications of a slide from its finest.

    Cells lie on the grid of the finest tiles. Where these have several grids, as CLAM's contours, a tile belongs to the
    cell that contains its centre. Coarser magnifications that the slide already has are left out.

    Raises:
        StoreError: The slide has no coordinates, is itself derived, or its finest magnification is not twice the first.
    """
    name = max(slide.features, key=magnification_value)
    if slide.attrs.get("coarser"):
        raise StoreError(f"slide {slide.slide_id}: its features are derived already.", "Give the store they came from.")
    if magnification_value(name) != 2 * magnifications[0]:
        raise StoreError(
            f"slide {slide.slide_id}: its finest magnification is {name}, so {magnifications[0]:g}x is not the next.",
            f"Give --magnifications from {magnification_value(name) / 2:g} on.",
        )
    side = slide.attrs.get("tile_px_level0", {}).get(name)
    if side is None or not len(slide.coords.get(name, ())):
        raise StoreError(
            f"slide {slide.slide_id}: its tiles have no coordinates, so nothing lies in a cell.",
            "Import files with coordinates.",
        )
    features, coords = {name: slide.features[name]}, {name: slide.coords[name]}
    parents, sides, shares = {}, {name: float(side)}, {}
    origin = _origin(slide.coords[name], side)
    for magnification in magnifications:
        coarse = magnification_name(magnification)
        cells, parents[name] = _cells(coords[name], sides[name], origin)
        sides[coarse] = 2 * sides[name]
        counts = np.bincount(parents[name], minlength=len(cells))
        sums = np.zeros((len(cells), features[name].shape[1]), np.float64)
        np.add.at(sums, parents[name], features[name].astype(np.float64))
        features[coarse] = (sums / counts[:, None]).astype(np.float16)
        coords[coarse] = np.rint(origin + cells * sides[coarse]).astype(np.int32)
        shares[coarse] = round(float(np.minimum(counts / CHILDREN, 1).mean()), 4)
        name = coarse
    attrs = {key: value for key, value in slide.attrs.items() if key != "digests"}
    finest = next(iter(features))
    attrs |= {
        "tile_px_level0": sides, "coarser": f"mean of {finest}", "derived_share": shares,
        "program_version": cfusion.__version__,
    }  # fmt: skip
    return SlideFeatures(slide.slide_id, features, coords, parents, attrs)


def _origin(coords: np.ndarray, side: float) -> np.ndarray:
    """Return where the grid of the tiles begins, f64 [2]: 0 if they lie on several grids, or on one from the corner."""
    offsets = coords - np.floor(coords / side + 0.5) * side
    spread = np.ptp(offsets, axis=0)
    # Corners are rounded to integer pixels.
    return np.where(spread <= 1, offsets.mean(axis=0), 0.0) if (spread <= 1).all() else np.zeros(2)


def _cells(coords: np.ndarray, side: float, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the cells of 2 × 2 tiles, [C, 2] column and row from the top, and each tile's cell, i32 [N]."""
    places = np.floor((coords - origin + side / 2) / (2 * side)).astype(np.int64)
    found, number = np.unique(places[:, ::-1], axis=0, return_inverse=True)
    return found[:, ::-1], number.reshape(-1).astype(np.int32)

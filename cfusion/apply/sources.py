"""Where the bags of a prediction come from: packed shards, or a feature store as it was extracted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cfusion.config import DataConfig
from cfusion.data.batches import slide_numbers
from cfusion.data.encoder_names import encoder_name
from cfusion.data.joined_shards import EXTRACTED, SAME_FOR_ALL
from cfusion.data.loader import BagSet
from cfusion.data.partition import bag_cost
from cfusion.data.positions import bag_positions
from cfusion.data.shards import ShardDataset, open_shards
from cfusion.data.store import FeatureStore
from cfusion.errors import StoreError
from cfusion.training.fitted import ModelCard
from cfusion.training.runtime import Runtime
from cfusion.types import BagBatch, SlideFeatures, magnification_name, magnification_names

Cases = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Embeddings:
    """What a source holds, for comparison with what a model reads.

    Attributes:
        where: The source, for messages.
        encoder: Name of the encoder.
        dim: Width of an embedding.
        magnifications: Names.
        made: How they were made, as far as all slides agree: weight digest, transform, …
    """

    where: str
    encoder: str
    dim: int
    magnifications: tuple[str, ...]
    made: Mapping[str, Any]

    def check(self, card: ModelCard) -> None:
        """Refuse embeddings that the model of a card was not trained on.

        Raises:
            StoreError: The encoder, its weights or the width differ, or a magnification is missing.
        """
        if (encoder_name(self.encoder), self.dim) != (encoder_name(card.encoder), card.backbone_dim):
            raise StoreError(
                f"{self.where}: holds embeddings of {self.encoder} ({self.dim} wide), but the model reads "
                f"{card.encoder} ({card.backbone_dim} wide).",
                "Embed the slides with the model's encoder.", topic="encoder",
            )  # fmt: skip
        missing = [name for name in map(magnification_name, card.magnifications) if name not in self.magnifications]
        if missing:
            raise StoreError(
                f"{self.where}: holds {', '.join(self.magnifications)}, but the model also reads {', '.join(missing)}.",
                f"Extract the slides at {','.join(f'{m:g}' for m in card.magnifications)}.",
            )
        ours, theirs = (made.get("coarser") or EXTRACTED for made in (self.made, card.embeddings))
        if ours != theirs and len(card.magnifications) > 1:
            raise StoreError(
                f"{self.where}: its coarser magnifications are {ours}, but the model was trained on {theirs} ones.",
                "`cfusion preprocess derive` makes the one from the other's finest.", topic="encoder",
            )  # fmt: skip
        for key in SAME_FOR_ALL:
            ours, theirs = self.made.get(key), card.embeddings.get(key)
            if ours is not None and theirs is not None and ours != theirs:
                raise StoreError(
                    f"{self.where}: its embeddings of {self.encoder} have {key} {ours}, but those the model was "
                    f"trained on have {theirs}.",
                    "Extract the slides as the training's were.", topic="encoder",
                )  # fmt: skip


class Bags(Protocol):
    """Bags in a fixed order, a patient each."""

    @property
    def case_ids(self) -> tuple[str, ...]:
        """The patients."""
        ...

    @property
    def costs(self) -> np.ndarray:
        """Work that each bag makes, for sharing it evenly."""
        ...

    def stream(self, indices: Sequence[int]) -> Iterator[BagBatch]:
        """The given bags, one a batch, in order."""
        ...


class BagSource(Protocol):
    """Slides with their embeddings."""

    @property
    def embeddings(self) -> Embeddings:
        """What it holds."""
        ...

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """Its slides."""
        ...

    def open(self, cases: Cases, magnifications: Sequence[float], runtime: Runtime) -> Bags:
        """A bag a patient."""
        ...

    def read(self, slide_id: str) -> SlideFeatures:
        """All features of one slide, with the coordinates of its tiles."""
        ...


class ShardSource:
    """Packed shards, local or remote.

    Attributes:
        dataset: The shards.
    """

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self.dataset: ShardDataset = open_shards(data)

    @property
    def embeddings(self) -> Embeddings:
        """What the index says."""
        index = self.dataset.index
        return Embeddings(self._data.where, index.encoder, index.dim, index.magnifications, index.provenance)

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """The slides, in the order of the shards."""
        return self.dataset.slide_ids

    def open(self, cases: Cases, magnifications: Sequence[float], runtime: Runtime) -> Bags:
        """A bag a patient, read ahead by threads."""
        bags = BagSet.open(
            self.dataset,
            cases,
            self._data,
            magnifications=magnifications,
            device=runtime.device,
            dtype=runtime.dtype,
        )
        return _ShardBags(bags)

    def read(self, slide_id: str) -> SlideFeatures:
        """Refuse: shards hold no coordinates of tiles in the slide.

        Raises:
            StoreError: Always.
        """
        raise StoreError(
            f"{self._data.where}: shards hold no coordinates of the tiles in slide {slide_id}.",
            "Give the feature store that the shards were packed from, or the slide.",
        )


@dataclass(frozen=True)
class _ShardBags:
    bags: BagSet

    @property
    def case_ids(self) -> tuple[str, ...]:
        return tuple(bag.case_id for bag in self.bags.bags)

    @property
    def costs(self) -> np.ndarray:
        return self.bags.costs

    def stream(self, indices: Sequence[int]) -> Iterator[BagBatch]:
        return self.bags.loader.stream([[i] for i in indices], epoch=0, training=False)


class StoreSource:
    """The slides of one encoder in a feature store.

    Args:
        root: The feature store.
        encoder: Encoder whose features are read.
    """

    def __init__(self, root: Path, encoder: str) -> None:
        self._store = FeatureStore.open(root, encoder)
        self._root = root

    @property
    def embeddings(self) -> Embeddings:
        """What the groups say; every slide is looked at.

        Raises:
            StoreError: Slides differ in width or magnifications.
        """
        shapes = {slide: self._store.shapes(slide) for slide in self.slide_ids}
        kinds: dict[tuple, str] = {}
        for slide, by_name in shapes.items():
            kinds.setdefault((tuple(by_name), *(dim for _, dim in by_name.values())), slide)
        if len(kinds) != 1:
            raise StoreError(
                f"{self._store.path}: slides {', '.join(list(kinds.values())[:2])} differ in width or magnifications.",
                "Extract them again with the same settings.",
            )
        ((names, dim, *_),) = kinds
        attrs = [self._store.attrs(slide) for slide in self.slide_ids]
        made = {
            key: attrs[0].get(key)
            for key in (*SAME_FOR_ALL, "coarser")
            if all(a.get(key) == attrs[0].get(key) for a in attrs)
        }
        return Embeddings(str(self._root), self._store.encoder, dim, names, made)

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """The slides, sorted."""
        return tuple(self._store.slide_ids())

    def read(self, slide_id: str) -> SlideFeatures:
        """All features of one slide, with the coordinates of its tiles where the store has them."""
        return self._store.read(slide_id)

    def open(self, cases: Cases, magnifications: Sequence[float], runtime: Runtime) -> Bags:
        """A bag a patient, read when its turn comes."""
        names = magnification_names(magnifications)
        return _StoreBags(self._store, {case: tuple(slides) for case, slides in cases.items()}, names, runtime)


@dataclass(frozen=True)
class _StoreBags:
    store: FeatureStore
    slides_of: Mapping[str, tuple[str, ...]]
    names: tuple[str, ...]
    runtime: Runtime

    @property
    def case_ids(self) -> tuple[str, ...]:
        return tuple(self.slides_of)

    @property
    def costs(self) -> np.ndarray:
        shapes = [[self.store.shapes(slide) for slide in slides] for slides in self.slides_of.values()]
        return np.array([bag_cost({n: sum(by[n][0] for by in bag) for n in self.names}) for bag in shapes])

    def stream(self, indices: Sequence[int]) -> Iterator[BagBatch]:
        for index in indices:
            yield self._batch(self.case_ids[index])

    def _batch(self, case: str) -> BagBatch:
        slides = [self.store.read(slide) for slide in self.slides_of[case]]
        return bag_of_slides(slides, self.names, case).to(self.runtime.device, self.runtime.dtype)


def bag_of_slides(slides: Sequence[SlideFeatures], names: Sequence[str], case_id: str) -> BagBatch:
    """Make one bag of the slides of a patient.

    Args:
        slides: Their features.
        names: The magnifications that the model reads.
        case_id: Names the bag.

    Returns:
        The bag; without positions where a slide has no coordinates or no tile sides at one of the magnifications.
    """
    features = {name: np.concatenate([slide.features[name] for slide in slides]) for name in names}
    bag = bag_of_arrays(features, _positions(slides, names), case_id)
    if len(slides) == 1:
        return bag
    numbers = {name: slide_numbers([len(slide.features[name]) for slide in slides]) for name in names}
    return dataclasses.replace(bag, slides={name: torch.from_numpy(table)[None] for name, table in numbers.items()})


def _positions(slides: Sequence[SlideFeatures], names: Sequence[str]) -> dict[str, np.ndarray] | None:
    sides = [slide.attrs.get("tile_px_level0", {}) for slide in slides]
    if any(not len(s.coords.get(n, ())) or n not in side for s, side in zip(slides, sides, strict=True) for n in names):
        return None
    corners = [{name: slide.coords[name] for name in names} for slide in slides]
    return bag_positions(corners, [{name: float(side[name]) for name in names} for side in sides])


def bag_of_arrays(
    features: Mapping[str, np.ndarray], positions: Mapping[str, np.ndarray] | None, *case_ids: str
) -> BagBatch:
    """Make one bag of features [tile, dim] and grid positions [tile, 2] per magnification, on the CPU in f32."""
    placed = None
    if positions is not None:
        placed = {name: torch.from_numpy(grid)[None] for name, grid in positions.items()}
    tensors = {name: torch.from_numpy(np.asarray(f, np.float32))[None] for name, f in features.items()}
    return BagBatch(tensors, None, placed, case_ids)

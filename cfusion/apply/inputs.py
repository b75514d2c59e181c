"""Inputs of a model: shards, a feature store, one slide's group in a store, or slides.

Slides are preprocessed with the settings of the training. The rest of the program sees only a `BagSource`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cfusion.apply.sources import BagSource, ShardSource, StoreSource
from cfusion.config import DataConfig, validate
from cfusion.data.encoder_names import encoder_name
from cfusion.data.shard_index import INDEX_NAME
from cfusion.data.store import SUFFIX, encoders_in
from cfusion.errors import DataError, StoreError
from cfusion.training.fitted import ModelCard
from cfusion.training.runtime import Runtime
from preprocess.annotation import find_mask
from preprocess.extraction import preprocess_slides
from preprocess.settings import PreprocessConfig
from preprocess.slide_files import find_slides, same_name, slide_id_of


@dataclass(frozen=True)
class Extraction:
    """How slides are preprocessed, except for the settings that the model fixes.

    Attributes:
        store: Feature store to write.
        settings: Other settings of `PreprocessConfig`, such as `default_mpp`.
        overwrite: Extract a slide again if its features in `store` were made with other settings.
    """

    store: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False


@dataclass(frozen=True)
class Inputs:
    """Slides whose embeddings a model reads.

    Attributes:
        where: What the user named, for messages.
        source: Their embeddings.
        slide_ids: The slides, among those of the source.
        files: Slide files by slide name, if known.
        failed: Slides that could not be preprocessed.
    """

    where: str
    source: BagSource
    slide_ids: tuple[str, ...]
    files: Mapping[str, Path] = field(default_factory=dict)
    failed: tuple[str, ...] = ()

    def choose(self, slide_ids: Sequence[str] | None = None, pictures: Path | None = None) -> Inputs:
        """Keep only some slides, and find their files if they come from a store.

        Args:
            slide_ids: Slides to keep; None: all.
            pictures: A folder that is searched for the slides' files.

        Raises:
            StoreError: A slide is missing.
        """
        missing = [slide_id for slide_id in slide_ids or () if slide_id not in self.slide_ids]
        if missing:
            raise StoreError(
                f"{self.where}: has no slide {', '.join(missing)}.",
                "`cfusion preprocess inspect` lists the slides of a store.",
            )
        found = _by_name(find_slides(pictures), slide_ids or self.slide_ids) if pictures else {}
        return replace(self, slide_ids=tuple(slide_ids or self.slide_ids), files={**self.files, **found})


def open_inputs(
    given: Sequence[str], card: ModelCard, extraction: Extraction, runtime: Runtime | None = None
) -> Inputs:
    """Open what the user named as one source of bags.

    Args:
        given: The folder or URL of shards; a feature store, one encoder's folder in it or one slide's group; or any
            number of slides and folders of slides.
        card: Card of the model: its encoder and the settings of its embeddings.
        extraction: How slides are preprocessed.
        runtime: The processes that share the extraction; each gets all slides. None: only this process.

    Raises:
        StoreError: The store holds other embeddings than the model reads, or a folder holds nothing usable.
        DataError: No slide could be read.
    """
    first = Path(given[0])
    if len(given) == 1 and ("://" in given[0] or (first / INDEX_NAME).is_file()):
        shards = ShardSource(DataConfig(shards=given[0]))
        return Inputs(given[0], shards, shards.slide_ids)
    if len(given) == 1 and first.is_dir() and (first.suffix == SUFFIX or _encoder_folder(first) or encoders_in(first)):
        return _open_store(first, card)
    return _extract([Path(path) for path in given], card, extraction, runtime)


def _encoder_folder(path: Path) -> bool:
    return any(path.glob(f"[!.]*{SUFFIX}"))


def _open_store(path: Path, card: ModelCard) -> Inputs:
    chosen: tuple[str, ...] = ()
    if path.suffix == SUFFIX:
        path, chosen = path.parent, (path.name.removesuffix(SUFFIX),)
    root, held = (path.parent, [path.name]) if _encoder_folder(path) else (path, encoders_in(path))
    if encoder_name(card.encoder) not in {encoder_name(name) for name in held}:
        raise StoreError(
            f"{path}: holds embeddings of {', '.join(held)}, but the model reads {card.encoder}.",
            f"Preprocess the slides with --encoder {card.encoder}.",
            topic="encoder",
        )
    features = StoreSource(root, card.encoder)
    inputs = Inputs(str(root / card.encoder), features, features.slide_ids)
    return inputs.choose(chosen) if chosen else inputs


def _extract(given: Sequence[Path], card: ModelCard, extraction: Extraction, runtime: Runtime | None) -> Inputs:
    """Extract this process's share of the slides with the model's encoder and the settings of its training."""
    paths = list(dict.fromkeys(file for path in given for file in _slides_in(path, card)))
    files = _by_name(paths, [slide_id_of(file) for file in paths])
    share = (0, 1) if runtime is None else (runtime.rank, runtime.world_size)
    states = [
        state for path in given for state in _extract_share(path, card, _for_path(path, given, card, extraction), share)
    ]
    states = states if runtime is None else runtime.gather(states)
    extracted = sorted({slide for slide, done in states if done})
    failed = sorted({slide for slide, done in states if not done})
    if not extracted:
        raise DataError(f"None of the {len(failed)} slides could be read: {', '.join(failed[:5])}.", "See above.")
    features = StoreSource(extraction.store, card.encoder)
    return Inputs(", ".join(map(str, given)), features, tuple(extracted), files, tuple(failed))


def _by_name(files: Sequence[Path], slide_ids: Sequence[str]) -> dict[str, Path]:
    """Return the files of slides by name.

    Raises:
        StoreError: Two files have the name of one of `slide_ids`.
    """
    for slide_id, several in same_name(files).items():
        if slide_id in slide_ids:
            raise StoreError(f"The files {', '.join(map(str, several))} share the name {slide_id}.", "Rename one.")
    return {slide_id_of(file): file for file in files}


def _for_path(path: Path, given: Sequence[Path], card: ModelCard, extraction: Extraction) -> Extraction:
    """Leave out a folder of masks that has none for the slides of this path, but has for those of another."""
    masks = extraction.settings.get("masks")
    if masks is None or len(given) == 1 or not masks.is_dir():
        return extraction
    fits = {p for p in given if any(find_mask(masks, slide_id_of(file)) for file in _slides_in(p, card))}
    return replace(extraction, settings={**extraction.settings, "masks": None if fits and path not in fits else masks})


def _slides_in(path: Path, card: ModelCard) -> list[Path]:
    try:
        return find_slides(path)
    except DataError as error:
        if not path.is_dir():
            raise
        raise StoreError(
            f"{path}: is not a feature store.",
            f"Give one slide, a folder of slides, a store, or one slide's group in it. Features of another program: "
            f"first cfusion preprocess import {path} --store features --encoder {card.encoder}.",
        ) from error


def _extract_share(
    slides: Path, card: ModelCard, extraction: Extraction, share: tuple[int, int]
) -> list[tuple[str, bool]]:
    """Extract this process's share of the slides; return each slide and whether its features are in the store."""
    values = {"slides": slides, "store": extraction.store, **card.preprocessing, **extraction.settings}
    config = validate(PreprocessConfig, values, str(slides))
    summary = preprocess_slides(config, strict=slides.is_file(), overwrite=extraction.overwrite, share=share)
    return [(outcome.slide_id, outcome.status in ("done", "skipped")) for outcome in summary.outcomes]

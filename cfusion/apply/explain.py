"""Explanations of slides from wherever they come: a slide, a feature store, one slide's group in a store."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.data.store import SUFFIX, FeatureStore, encoders_in
from cfusion.errors import CfusionError, ConfigError, DataError, PartialResultError, StoreError
from cfusion.explanation import Explanation, explain
from cfusion.explanation.explanation_files import check_target, write_results
from cfusion.explanation.faithfulness import deletion_areas, deletion_curves
from cfusion.explanation.scoring import Occlusion
from cfusion.training.fitted import ModelCard
from preprocess.extraction import preprocess_slides
from preprocess.regions import SlidePictures
from preprocess.settings import PreprocessConfig
from preprocess.slides import find_slides, slide_id_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Features of slides, and the slides themselves where they are at hand.

    Attributes:
        store: The features.
        slide_ids: Which of them.
        slides: Files of slides by name; those that are missing have no pictures.
    """

    store: FeatureStore
    slide_ids: tuple[str, ...]
    slides: Mapping[str, Path]


@dataclass(frozen=True)
class Explained:
    """What became of one slide.

    Attributes:
        explanation: Its scores.
        page: Its page.
        areas: Areas of its deletion curves, where they were made.
    """

    explanation: Explanation
    page: Path
    areas: pd.DataFrame | None


def from_slide(slide: Path, card: ModelCard, store: Path, **settings: Any) -> Source:
    """Extract a slide's features as the model needs them, unless they are there.

    Args:
        slide: The slide.
        card: Of the model: how its embeddings are made.
        store: Feature store to write.
        settings: Others of `PreprocessConfig`, such as `default_mpp`.

    Raises:
        CfusionError: The slide cannot be read or has no tissue, or the encoder cannot be had.
    """
    config = PreprocessConfig(slides=slide, store=store, **card.preprocessing, **settings)
    preprocess_slides(config, strict=True, overwrite=True)
    return Source(FeatureStore.open(store, card.encoder), (slide_id_of(slide),), {slide_id_of(slide): slide})


def from_store(path: Path, card: ModelCard, slide_ids: Sequence[str] = (), slides: Path | None = None) -> Source:
    """Slides of a feature store, of one encoder's folder in it, or one slide's group.

    Args:
        path: The store, the folder or the group.
        card: Of the model: its encoder.
        slide_ids: Which slides; none: all.
        slides: A folder that is searched for their files.

    Raises:
        StoreError: There is no store, it holds another encoder's embeddings, or it lacks a slide.
    """
    if path.suffix == SUFFIX:
        path, slide_ids = path.parent, (path.name.removesuffix(SUFFIX),)
    root = path.parent if path.is_dir() and any(path.glob(f"[!.]*{SUFFIX}")) else path
    held = [path.name] if root != path else encoders_in(root)
    if not held:
        raise StoreError(f"{path}: is no feature store.", "Give one slide, a store, or one slide's group in it.")
    if card.encoder not in held:
        raise StoreError(
            f"{path}: holds embeddings of {', '.join(held)}, but the model reads {card.encoder}.",
            f"Preprocess the slides with --encoder {card.encoder}.",
            topic="encoder",
        )
    store = FeatureStore.open(root, card.encoder)
    known = store.slide_ids()
    missing = [slide_id for slide_id in slide_ids if slide_id not in known]
    if missing:
        raise StoreError(
            f"{store.path}: has no slide {', '.join(missing)}.", "`cfusion preprocess inspect` lists what is there."
        )
    files = {slide_id_of(file): file for file in find_slides(slides)} if slides else {}
    return Source(store, tuple(slide_ids) or tuple(known), files)


def explain_source(
    source: Source,
    ensemble: FoldEnsemble,
    out: Path,
    *,
    magnifications: Sequence[str] | None = None,
    occlusion: Occlusion = "cells",
    most_removals: int = 256,
    faithfulness: bool = False,
    default_mpp: float | None = None,
    device: str = "cpu",
) -> Iterator[Explained]:
    """Explain every slide of a source, each into a folder of its name in `out`.

    Args:
        source: The slides.
        ensemble: The models.
        out: Folder to write.
        magnifications: Names of those to report; None: all that the models read.
        occlusion: See `cfusion.explain`.
        most_removals: Likewise.
        faithfulness: Also make deletion curves.
        default_mpp: µm/px of slides whose files do not tell, for their pictures.
        device: Where the models run.

    Raises:
        DataError: The only slide cannot be explained.
        PartialResultError: Some slides cannot; the others are done.
    """
    failed: dict[str, CfusionError] = {}
    for slide_id in source.slide_ids:
        try:
            check_target(out / slide_id)
            slide = source.store.read(slide_id)
            found = explain(
                ensemble, slide, occlusion=occlusion, most_removals=most_removals, magnifications=magnifications,
                device=device,
            )  # fmt: skip
            curves = deletion_curves(ensemble, slide, found, device=device) if faithfulness else None
            page = _write(found, source.slides.get(slide_id), default_mpp, out, curves)
        except DataError as error:
            if len(source.slide_ids) == 1:
                raise
            logger.warning("failed: %s", error)
            failed[slide_id] = error
            continue
        yield Explained(found, page, None if curves is None else deletion_areas(curves))
    if failed:
        raise PartialResultError(
            f"{len(failed)} of {len(source.slide_ids)} slides were not explained: {', '.join(sorted(failed)[:5])}.",
            f"The first: {next(iter(failed.values())).message}",
        )


def _write(
    found: Explanation, file: Path | None, default_mpp: float | None, out: Path, curves: pd.DataFrame | None
) -> Path:
    folder = out / found.slide_id
    if file is None:
        logger.info("%s: no gallery and no picture under the heatmaps, as its slide is not at hand", found.slide_id)
        return write_results(found, folder, curves=curves)
    with SlidePictures(file, default_mpp=default_mpp) as pictures:
        size = found.attrs.get("slide_size_px")
        if size and tuple(size) != pictures.size_px:
            raise DataError(
                f"{file}: has {pictures.size_px[0]} × {pictures.size_px[1]} px, but the features of {found.slide_id} "
                f"are of a slide of {size[0]} × {size[1]} px.",
                "Give the folder of the slides that the features were made of.",
            )
        return write_results(found, folder, pictures=pictures, curves=curves)


def checked_device(name: str | None) -> str:
    """The device of this name; none: a GPU where there is one, or else the CPU.

    Raises:
        ConfigError: There is no such device.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: cannot be used ({str(error).splitlines()[0]}).") from error
    return name

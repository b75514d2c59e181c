"""Attention, input×gradient and occlusion of every tile of a slide, for a fold ensemble."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from cfusion.bag_sources import Embeddings
from cfusion.console import progress
from cfusion.data.positions import bag_positions
from cfusion.errors import ConfigError, DataError
from cfusion.explanation.removal import Keep, Lineage, risks_without
from cfusion.explanation.result import Explanation, TileScores
from cfusion.models import input_times_gradient, tile_attention
from cfusion.models.bag import BagModel
from cfusion.prediction import FoldEnsemble
from cfusion.training.fitted import FittedModel
from cfusion.types import BagBatch, SlideFeatures, SurvivalOutput

logger = logging.getLogger(__name__)

Occlusion = Literal["cells", "tiles", "none"]


def explain(
    model: FoldEnsemble | FittedModel,
    slide: SlideFeatures,
    *,
    occlusion: Occlusion = "cells",
    magnifications: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> Explanation:
    """Score every tile of a slide by what the models did with it.

    Three methods, at each magnification that the models read: `attention`, the share a tile had in what the bag's
    summary read (see `cfusion.models.tile_attention`), times the number of tiles; `gradient`, input×gradient of the
    risk (see `cfusion.models.input_times_gradient`); `occlusion`, the risk less the risk without the tile and all that
    lies in it. With `grid: file` (the published layout) removing a tile also moves those after it on the token grid,
    which is part of its effect; with `grid: spatial` the others stay where they are.

    Args:
        model: The models of all folds, or one.
        slide: Features of one slide, as `FeatureStore.read` gives them.
        occlusion: `cells`: remove the tiles of the slide's coarsest magnification one by one, whether the models read
            it or not, a forward pass each and fold; `tiles`: those of every magnification that the models read;
            `none`: leave the method out.
        magnifications: Names of those to report; None: all that the models read, and that of the cells.
        device: Where the models run.

    Returns:
        Mean and standard deviation over folds of every score.

    Raises:
        DataError: The slide has other embeddings than the model reads, lacks a magnification or its coordinates, or
            holds a value that is not finite.
        ConfigError: A magnification is not one that the model reads.
    """
    models = model.models if isinstance(model, FoldEnsemble) else (model,)
    network = _network(models[0])
    bag = slide_bag(slide, models[0], device)
    lineage = Lineage(slide, list(bag.features))
    removed = {"cells": [lineage.cells], "tiles": list(bag.features), "none": []}[occlusion]
    names = _checked_names([*bag.features, *(name for name in removed if name not in bag.features)], magnifications)
    removed = [name for name in removed if name in names]
    found: dict[str, list[dict[str, np.ndarray]]] = {"attention": [], "gradient": [], "occlusion": []}
    outputs = []
    passes = len(models) * sum(lineage.counts[name] for name in removed)
    with progress(f"Explaining {slide.slide_id}", len(models) + passes) as bar:
        for fold in models:
            network = _network(fold)
            network.to(device=device, dtype=torch.float32).eval()
            with torch.inference_mode():
                outputs.append(network(bag))
            found["attention"].append(_attention(network, bag))
            found["gradient"].append({n: t[0].cpu().numpy() for n, t in input_times_gradient(network, bag).items()})
            risk = outputs[-1].risk.item()
            found["occlusion"].append(
                {name: risk - risks_without(network, bag, _one_by_one(lineage, name), bar.advance) for name in removed}
            )
            bar.advance()
    methods = tuple(method for method, folds in found.items() if any(folds))
    levels = {name: _level(slide, name, [found[method] for method in methods]) for name in names}
    risks = tuple(output.risk.item() for output in outputs)
    return Explanation(slide.slide_id, methods, levels, _curve(models, outputs), risks, _attrs(models, slide))


def slide_bag(slide: SlideFeatures, model: FittedModel, device: torch.device | str = "cpu") -> BagBatch:
    """One slide as the bag that a model reads.

    Raises:
        DataError: The embeddings are not those the model reads, a magnification or its coordinates are missing, or a
            value is not finite.
    """
    network, where = _network(model), f"slide {slide.slide_id}"
    held = {name: features.shape[1] for name, features in slide.features.items() if len(features)}
    encoder = str(slide.attrs.get("encoder", "an unnamed encoder"))
    for dim in set(held.values()):
        Embeddings(where, encoder, dim, tuple(held), slide.attrs).check(model.card)
    for name in network.magnification_names:
        _check_level(slide, name)
    sides = {name: float(slide.attrs["tile_px_level0"][name]) for name in network.magnification_names}
    corners = {name: slide.coords[name] for name in network.magnification_names}
    places = bag_positions([corners], [sides])
    return BagBatch(
        {n: torch.from_numpy(slide.features[n].astype(np.float32))[None].to(device) for n in sides},
        None,
        {name: torch.from_numpy(place)[None].to(device) for name, place in places.items()},
        (slide.slide_id,),
    )


def _one_by_one(lineage: Lineage, name: str) -> list[Callable[[], Keep]]:
    return [partial(lineage.without_one, name, row) for row in range(lineage.counts[name])]


def _network(model: FittedModel) -> BagModel:
    if not isinstance(model.module, BagModel):
        raise ConfigError(f"model {model.card.model.get('name')}: only models of bags can be explained.")
    return model.module


def _checked_names(known: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    for name in wanted or ():
        if name not in known:
            raise ConfigError(
                f"magnification {name}: the model does not read it, so no tile of it has a score.",
                f"There are scores at {', '.join(known)}.",
            )
    return [name for name in known if wanted is None or name in wanted]


def _check_level(slide: SlideFeatures, name: str) -> None:
    where, features = f"slide {slide.slide_id}, {name}", slide.features[name]
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{where}: the features of tile {int(np.argmin(finite))} are not finite.", "Extract or import it again."
        )
    if len(slide.coords.get(name, ())) != len(features) or name not in slide.attrs.get("tile_px_level0", {}):
        source = slide.attrs.get("imported_from")
        told = f"was imported from the {source} layout, which keeps none" if source else "was stored without them"
        raise DataError(
            f"{where}: its tiles have no coordinates, so no heatmap can be drawn: it {told}.",
            "Import CLAM, TRIDENT or STAMP files, which carry coordinates (`cfusion preprocess import`), or run "
            "`cfusion preprocess` on the slide.",
            topic="import",
        )


def _attention(network: BagModel, bag: BagBatch) -> dict[str, np.ndarray]:
    return {name: (share * len(share)).cpu().numpy() for name, share in tile_attention(network, bag).items()}


def _level(slide: SlideFeatures, name: str, methods: Sequence[Sequence[dict[str, np.ndarray]]]) -> TileScores:
    count = len(slide.features[name])
    mean, sd = (np.full((len(methods), count), np.nan, np.float32) for _ in range(2))
    for row, folds in enumerate(methods):
        if name in folds[0]:
            scores = np.stack([fold[name] for fold in folds]).astype(np.float64)
            mean[row] = scores.mean(axis=0)
            if len(folds) > 1:
                sd[row] = scores.std(axis=0)
    parent = slide.parents.get(name)
    return TileScores(slide.coords[name], float(slide.attrs["tile_px_level0"][name]), mean, sd, parent)


def _curve(models: Sequence[FittedModel], outputs: Sequence[SurvivalOutput]) -> pd.DataFrame:
    """Survival, mean and spread over folds, at 0 and wherever some fold's time bin ends."""
    months = np.unique(np.concatenate([[0.0], *(m.bins.right_edges_months for m in models)]))
    curves = []
    for model, output in zip(models, outputs, strict=True):
        values = np.concatenate([[1.0], output.survival[0].double().cpu().numpy()])
        curves.append(values[np.searchsorted(model.bins.right_edges_months, months, side="right")])
    spread = np.std(curves, axis=0) if len(models) > 1 else np.full(len(months), np.nan)
    return pd.DataFrame({"months": months, "survival": np.mean(curves, axis=0), "survival_sd": spread})


def _attrs(models: Sequence[FittedModel], slide: SlideFeatures) -> dict[str, Any]:
    card = models[0].card
    return {
        "encoder": card.encoder, "model": str(card.model.get("name", "")), "cohort": card.cohort,
        "endpoint": card.endpoint, "risk_cutoff": FoldEnsemble(tuple(models)).risk_cutoff,
        "slide_size_px": slide.attrs.get("slide_size_px"), "mpp": slide.attrs.get("mpp"),
        "slide_digest": slide.attrs.get("slide_digest"),
    }  # fmt: skip


__all__ = ["Occlusion", "explain", "slide_bag"]

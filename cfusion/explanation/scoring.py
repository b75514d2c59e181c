"""Compute attention, input×gradient and occlusion scores of every tile of a slide, for a fold ensemble."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.apply.ranking import RunRanking
from cfusion.apply.sources import Embeddings, bag_of_slides
from cfusion.console import Progress, progress
from cfusion.data.tile_places import check_level_0
from cfusion.errors import ConfigError, DataError
from cfusion.explanation.noise import p_values
from cfusion.explanation.removal import Keep, Lineage, risks_without
from cfusion.explanation.result import METHODS, Explanation, TileScores
from cfusion.models import input_times_gradient, tile_attention
from cfusion.models.bag import BagModel
from cfusion.survival.curves import step_values
from cfusion.training.fitted import FittedModel
from cfusion.types import BagBatch, SlideFeatures, SurvivalOutput

logger = logging.getLogger(__name__)

Occlusion = Literal["cells", "tiles", "none"]


def explain(
    model: FoldEnsemble | FittedModel,
    slide: SlideFeatures,
    *,
    occlusion: Occlusion = "cells",
    most_removals: int = 256,
    magnifications: Sequence[str] | None = None,
    ranking: RunRanking | None = None,
    device: torch.device | str = "cpu",
) -> Explanation:
    """Score the contribution of every tile of a slide to its risk; the bag is only this slide.

    There are three methods, for each magnification that the models read: `attention`, the attention of the bag's
    summary to a tile (see `cfusion.models.tile_attention`) times the number of tiles; `gradient`, input×gradient of the
    risk (see `cfusion.models.input_times_gradient`); `occlusion`, the risk minus the risk without the tile and the
    finer tiles inside it.

    CrossFusion normalises each projected tile, so the length of an embedding hardly changes the risk: its
    input×gradient scores are small, and their order is more informative than their size. With `grid: file` (the
    published layout) removing a tile also moves later tiles on the token grid, which is part of the measured effect;
    with `grid: spatial` the other tiles keep their positions.

    Args:
        model: The models of all folds, or one model.
        slide: Features of one slide, from `FeatureStore.read`.
        occlusion: `cells`: remove the tiles of the slide's coarsest magnification one by one, even if the models do not
            read it, with one forward pass per tile and fold; `tiles`: remove the tiles of every magnification that the
            models read; `none`: skip the method.
        most_removals: Maximum number of removals with `cells`. If a slide has more cells, squares of cells are removed,
            as small as possible, and the effect of a square is divided equally among its cells.
        magnifications: Names of the magnifications to report; None: all that the models read, and that of the cells.
        ranking: How the run of the models ranks held-out patients, as `cfusion.apply.ranking.run_ranking` gives it;
            None: unknown.
        device: Device of the models.

    Returns:
        Mean and standard deviation over folds of every score.

    Raises:
        DataError: The embeddings are not those that the model reads, a magnification or its coordinates are missing, or
            a value is not finite.
        ConfigError: A magnification is not one that the model reads, or the models read different ones.
    """
    models = model.models if isinstance(model, FoldEnsemble) else (model,)
    if len({_network(fold).magnification_names for fold in models}) > 1:
        raise ConfigError("The models read different magnifications.", "Give the folder of one run.")
    bag = slide_bag(slide, models[0], device)
    lineage = Lineage(slide, list(bag.features))
    removed = {"cells": [lineage.cells], "tiles": list(bag.features), "none": []}[occlusion]
    names = _checked_names([*bag.features, *(name for name in removed if name not in bag.features)], magnifications)
    squares = {
        name: _squares(slide, name, most_removals if occlusion == "cells" else lineage.counts[name])
        for name in removed
        if name in names
    }
    passes = len(models) * sum(number.max() + 1 for number in squares.values())
    with progress(f"Explaining {slide.slide_id}", len(models) + passes) as bar:
        folds = [_explain_fold(_network(fold), bag, lineage, squares, bar) for fold in models]
    methods = tuple(method for method in METHODS if any(scores[method] for _, scores in folds))
    levels = {name: _level(slide, name, {m: [scores[m] for _, scores in folds] for m in methods}) for name in names}
    outputs = [output for output, _ in folds]
    risks = tuple(output.risk.item() for output in outputs)
    attrs = _attrs(models, slide, ranking)
    percentile = float(FoldEnsemble(tuple(models)).percentile(np.array([risks]))[0])
    attrs["risk_percentile"] = None if np.isnan(percentile) else percentile
    return Explanation(slide.slide_id, methods, levels, _curve(models, outputs), risks, attrs)


def _explain_fold(
    network: BagModel, bag: BagBatch, lineage: Lineage, squares: dict[str, Int[np.ndarray, " tile"]], bar: Progress
) -> tuple[SurvivalOutput, dict[str, dict[str, np.ndarray]]]:
    """Return one model's output, and its scores by method and magnification."""
    network.to(device=next(iter(bag.features.values())).device, dtype=torch.float32).eval()
    with torch.inference_mode():
        output = network(bag)
    if not torch.isfinite(output.logits).all():
        raise DataError(f"slide {bag.case_ids[0]}: the risk is not finite.", "Check the model's weights.")
    shares = tile_attention(network, bag)
    risk = output.risk.item()
    scores = {
        "attention": {name: (share * len(share)).cpu().numpy() for name, share in shares.items()},
        "gradient": {name: change[0].cpu().numpy() for name, change in input_times_gradient(network, bag).items()},
        "occlusion": {n: _shares(risk, network, bag, lineage, n, number, bar) for n, number in squares.items()},
    }
    bar.advance()
    return output, scores


def slide_bag(slide: SlideFeatures, model: FittedModel, device: torch.device | str = "cpu") -> BagBatch:
    """Convert one slide to a bag for a model.

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
    check_level_0(slide)
    return bag_of_slides([slide], network.magnification_names, slide.slide_id).to(device)


def _squares(slide: SlideFeatures, name: str, most: int) -> Int[np.ndarray, " tile"]:
    """Assign each tile to the square of tiles with which it is removed; one square per tile if there are few."""
    coords, side = slide.coords[name], float(slide.attrs["tile_px_level0"][name])
    if len(coords) <= most:
        return np.arange(len(coords))
    for tiles in itertools.count(2):
        places = np.floor((coords - coords.min(axis=0)) / (side * tiles) + 1e-6)
        found, number = np.unique(places, axis=0, return_inverse=True)
        if len(found) <= max(most, 1):
            logger.info("slide %s: %s tiles are removed in %d squares of %d", slide.slide_id, name, len(found), tiles)
            return number.ravel()
    raise AssertionError


def _shares(
    risk: float,
    network: BagModel,
    bag: BagBatch,
    lineage: Lineage,
    name: str,
    square: Int[np.ndarray, " tile"],
    bar: Progress,
) -> Float[np.ndarray, " tile"]:
    """Return the decrease in risk without each tile's square, divided by the number of its tiles."""
    keeps = [partial(_without_square, lineage, name, square, number) for number in range(square.max() + 1)]
    lost = risk - risks_without(network, bag, keeps, bar.advance)
    return (lost / np.bincount(square))[square]


def _without_square(lineage: Lineage, name: str, square: np.ndarray, number: int) -> Keep:
    return lineage.without(name, square == number)


def _network(model: FittedModel) -> BagModel:
    if not isinstance(model.module, BagModel):
        raise ConfigError(f"model {model.card.model.get('name')}: only models of bags can be explained.")
    return model.module


def _checked_names(known: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    for name in wanted or ():
        if name not in known:
            raise ConfigError(
                f"magnification {name}: the model does not read it, so it has no scores.",
                f"There are scores at {', '.join(known)}.",
            )
    return [name for name in known if wanted is None or name in wanted]


def _check_level(slide: SlideFeatures, name: str) -> None:
    where, features = f"slide {slide.slide_id}, {name}", slide.features[name]
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{where}: the features of tile {int(np.argmin(finite))} are not finite.",
            "Extract or import the slide again.",
        )
    if len(slide.coords.get(name, ())) != len(features) or name not in slide.attrs.get("tile_px_level0", {}):
        source = slide.attrs.get("imported_from")
        cause = f"the {source} layout, from which it was imported, has none" if source else "none were stored"
        raise DataError(
            f"{where}: its tiles have no coordinates, so no heatmap can be drawn: {cause}.",
            "Import CLAM, TRIDENT or STAMP files, which have coordinates (`cfusion preprocess import`), or run "
            "`cfusion preprocess` on the slide.",
            topic="import",
        )


def _level(slide: SlideFeatures, name: str, methods: dict[str, list[dict[str, np.ndarray]]]) -> TileScores:
    count = len(slide.features[name])
    mean, sd, p = (np.full((len(methods), count), np.nan, np.float32) for _ in range(3))
    several = len(next(iter(methods.values()))) > 1
    for row, (method, folds) in enumerate(methods.items()):
        if name in folds[0]:
            scores = np.stack([fold[name] for fold in folds]).astype(np.float64)
            mean[row] = scores.mean(axis=0)
            if several:
                sd[row] = scores.std(axis=0)
                p[row] = p_values(scores - METHODS[method].neutral)
    side_px, parent = float(slide.attrs["tile_px_level0"][name]), slide.parents.get(name)
    return TileScores(slide.coords[name], side_px, mean, sd, parent, p if several else None)


def _curve(models: Sequence[FittedModel], outputs: Sequence[SurvivalOutput]) -> pd.DataFrame:
    """Return mean and spread of survival over folds, at 0 and at the end of every time bin of any fold."""
    months = np.unique(np.concatenate([[0.0], *(m.bins.right_edges_months for m in models)]))
    curves = [
        step_values(model.bins.right_edges_months, output.survival[0].double().cpu().numpy(), months, before=1.0)
        for model, output in zip(models, outputs, strict=True)
    ]
    spread = np.std(curves, axis=0) if len(models) > 1 else np.full(len(months), np.nan)
    return pd.DataFrame({"months": months, "survival": np.mean(curves, axis=0), "survival_sd": spread})


def _attrs(models: Sequence[FittedModel], slide: SlideFeatures, ranking: RunRanking | None) -> dict[str, Any]:
    card = models[0].card
    return {
        "encoder": card.encoder, "model": str(card.model.get("name", "")), "cohort": card.cohort,
        "endpoint": card.endpoint, "risk_cutoff": FoldEnsemble(tuple(models)).risk_cutoff,
        "slide_size_px": slide.attrs.get("slide_size_px"), "mpp": slide.attrs.get("mpp"),
        "slide_digest": slide.attrs.get("slide_digest"),
        "ranking": None if ranking is None else ranking.record(),
    }  # fmt: skip


__all__ = ["Occlusion", "explain", "slide_bag"]

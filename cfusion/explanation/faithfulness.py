"""Test whether scores are faithful to the model: compare removing tiles by rank with removing them in random order.

Deletion curves after Samek et al., IEEE TNNLS 2017 (region perturbation) and Petsiuk et al., BMVC 2018 (RISE). Tiles
are removed together with the finer tiles inside them, not blurred or zeroed. The tiles with the highest scores are
removed first, so the risk falls faster than in random order if the method is faithful.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.console import progress
from cfusion.explanation.removal import Lineage, risks_without
from cfusion.explanation.result import METHODS, Explanation
from cfusion.explanation.scoring import slide_bag
from cfusion.report.number_words import decimal, significant
from cfusion.report.svg import Plot, number
from cfusion.training.fitted import FittedModel
from cfusion.types import BagBatch, SlideFeatures, magnification_words

RANDOM = "random"

BAND = (5.0, 95.0)
"""Percentiles of the random orders that bound the band."""


def deletion_curves(
    ensemble: FoldEnsemble,
    slide: SlideFeatures,
    explanation: Explanation,
    *,
    steps: int = 20,
    seeds: int = 20,
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """Compute the risk of a slide as its tiles are removed.

    A curve needs one forward pass per step and model; the random orders need `seeds` times as many.

    Args:
        ensemble: The models that were explained.
        slide: The slide that was explained.
        explanation: Scores of its tiles.
        steps: Number of points of a curve after its start, at equal shares of the tiles; the last tile is not removed.
        seeds: Number of random orders.
        device: Device of the models.

    Returns:
        One row per point: `magnification, method` (or `random`), `removed` (tiles), `share` (of the tiles), `risk`
        (mean over models, and over orders where random), `low, high` (band of the random orders; NaN for a method).
    """
    bags = [(model, slide_bag(slide, model, device)) for model in ensemble.models]
    for model in ensemble.models:
        model.module.to(device=device, dtype=torch.float32).eval()
    lineage = Lineage(slide, list(bags[0][1].features))
    orders = {
        (name, method): [np.argsort(-explanation.scores(name, method), kind="stable")]
        for name in explanation.levels
        for method in explanation.methods
        if np.isfinite(explanation.scores(name, method)).all()
    }
    for name in list(dict.fromkeys(name for name, _ in orders)):
        tiles = lineage.counts[name]
        orders[name, RANDOM] = [np.random.default_rng([seed]).permutation(tiles) for seed in range(seeds)]
    frames = []
    with progress(f"Removing tiles of {slide.slide_id}", sum(map(len, orders.values()))) as bar:
        for (name, method), drawn in orders.items():
            if lineage.counts[name] > 1:
                counts = np.unique(np.linspace(0, lineage.counts[name] - 1, steps + 1).round().astype(int))
                risks = np.stack([_risks(bags, lineage, name, order, counts) for order in drawn])
                frames.append(_frame(name, method, counts, lineage.counts[name], risks))
            bar.advance(len(drawn))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)


COLUMNS = ["magnification", "method", "removed", "share", "risk", "low", "high"]


def deletion_areas(curves: pd.DataFrame) -> pd.DataFrame:
    """Measure how far each method's curve is below that of the random orders.

    Returns:
        One row per magnification and method: `area`, the mean over shares of the random orders' mean risk minus the
        method's risk (in units of the risk; above 0: better than random), and `below_band`, the share of points below
        the band of the random orders.
    """
    rows = []
    for name, level in curves.groupby("magnification", sort=False):
        random = level[level["method"] == RANDOM]
        for method, curve in level[level["method"] != RANDOM].groupby("method", sort=False):
            gain = random["risk"].to_numpy() - curve["risk"].to_numpy()
            share = curve["share"].to_numpy()
            rows.append(
                {
                    "magnification": name, "method": method,
                    "area": float(np.trapezoid(gain, share) / (share[-1] - share[0])),
                    "below_band": float((curve["risk"].to_numpy() < random["low"].to_numpy())[1:].mean()),
                }
            )  # fmt: skip
    return pd.DataFrame(rows, columns=["magnification", "method", "area", "below_band"])


def draw_deletion(curves: pd.DataFrame, magnification: str, where: str) -> str:
    """Draw the deletion curves of one magnification as SVG, with the band of the random orders."""
    level = curves[curves["magnification"] == magnification]
    values = level[["risk", "low", "high"]].to_numpy().ravel()
    low, high = np.nanmin(values), np.nanmax(values)
    pad = max((high - low) * 0.06, 1e-6)
    plot = Plot((0, 1), (low - pad, high + pad), height=300, margins=(58, 56, 14, 40))
    decimals = max(2, 2 - math.ceil(math.log10(high - low + 2 * pad)))
    x_words = f"share of {magnification_words(magnification)} tiles removed"
    plot.axes(x_words, "risk", y_format=partial(decimal, digits=decimals))
    random = level[level["method"] == RANDOM]
    if len(random):
        upper = list(zip(random["share"], random["high"], strict=True))
        lower = list(zip(random["share"], random["low"], strict=True))
        outline = "L".join(f"{number(plot.px(x))} {number(plot.py(y))}" for x, y in [*upper, *lower[::-1]])
        plot.add(f'<path class="band high" d="M{outline}Z"/>')
        plot.line(zip(random["share"], random["risk"], strict=True), "rule")
    areas = deletion_areas(level).set_index("method")["area"]
    for place, (method, area) in enumerate(areas.items()):
        curve, css = level[level["method"] == method], f"series{list(METHODS).index(str(method))}"
        plot.line(zip(curve["share"], curve["risk"], strict=True), f"line {css}")
        plot.text(plot.px(1), 14 + 14 * place, f"{method}: area {significant(area, sign='+')}", f"note {css}", "end")
    distances = ", ".join(f"{method} {significant(area, sign='+')}" for method, area in areas.items())
    return plot.finish(
        f"Deletion curves at {magnification_words(magnification)}, {where}",
        f"Mean distance below random removal (dashed, band {BAND[0]:g}% to {BAND[1]:g}% of the orders): {distances}.",
    )


def _risks(
    bags: Sequence[tuple[FittedModel, BagBatch]],
    lineage: Lineage,
    name: str,
    order: Int[np.ndarray, " tile"],
    counts: Int[np.ndarray, " point"],
) -> Float[np.ndarray, " point"]:
    """Return the mean risk over models after removing the first tiles of an order, for each of `counts`."""
    keeps = [partial(_without_first, lineage, name, order, count) for count in counts]
    return np.mean([risks_without(model.module, bag, keeps) for model, bag in bags], axis=0)


def _without_first(lineage: Lineage, name: str, order: np.ndarray, count: int) -> dict[str, np.ndarray]:
    removed = np.zeros(len(order), bool)
    removed[order[:count]] = True
    return lineage.without(name, removed)


def _frame(name: str, method: str, counts: np.ndarray, tiles: int, risks: np.ndarray) -> pd.DataFrame:
    low, high = np.percentile(risks, BAND, axis=0) if method == RANDOM else (np.nan, np.nan)
    values = (name, method, counts, counts / tiles, risks.mean(axis=0), low, high)
    return pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))


__all__ = ["RANDOM", "deletion_areas", "deletion_curves", "draw_deletion"]

"""What a model has seen: digests of its patients, and the region that their mean embeddings fill.

A prediction for patients far outside of that region rests on nothing: another stain, scanner, preparation or version of
the encoder moves the embeddings. The check is the usual one of multivariate process control (Jackson and Mudholkar,
Technometrics 21, 1979): Hotelling's T² along the principal axes, and the squared distance Q from them.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import eigh
from scipy.stats import betabinom

from cfusion.config import DataConfig
from cfusion.data.bags import BagEntry
from cfusion.data.shards import ShardDataset
from cfusion.data.slide_means import slide_means
from cfusion.errors import DataError
from cfusion.training.runtime import Runtime
from cfusion.types import magnification_names

FEWEST = 20
"""Fewest bags that a region is fitted on."""

_AXES = 16
_BAGS_PER_AXIS = 10
_PARTS = 5
"""Parts of the training bags; the distances of each, from a region of the others, give the limits."""

_QUANTILE = 0.995
"""Of T² and of Q, so that 1% of patients like those of the training are outside."""

_NOTABLE, _LEVEL = 0.1, 0.01
"""A share outside is reported from this on, if chance makes as large a one in less than this share of cohorts."""

_MEANS: dict[str, dict[tuple[str, tuple[float, ...]], np.ndarray]] = {}
"""Mean embeddings of the shards that this process read last, by their digest: the folds of a run share them."""


@dataclass(frozen=True, eq=False)
class EmbeddingRegion:
    """Region that the mean embeddings of the training bags fill.

    Attributes:
        mean: [column], of the magnifications one after the other.
        scale: [column], standard deviation.
        axes: [axis, column], principal axes of the standardised columns.
        variances: [axis].
        limits: [2], of T² and Q.
        bags: Number of training bags.
    """

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray
    variances: np.ndarray
    limits: np.ndarray
    bags: int

    @classmethod
    def fit(cls, values: np.ndarray) -> EmbeddingRegion | None:
        """Fit the region to mean embeddings [bag, column]; None for fewer than `FEWEST` bags, or without spread."""
        values = values.astype(float)
        if len(values) < FEWEST or not np.ptp(values, axis=0).any():
            return None
        part, count = np.arange(len(values)) % _PARTS, max(1, min(_AXES, len(values) // _BAGS_PER_AXIS))
        held_out = np.zeros((len(values), 2))
        for number in range(_PARTS):
            held_out[part == number] = _principal(values[part != number], count)._statistics(values[part == number])
        limits = np.quantile(held_out, _QUANTILE, axis=0, method="higher")
        found = _principal(values, count)
        return replace(found, limits=np.maximum(limits, np.finfo(np.float32).tiny))

    def distance(self, values: np.ndarray) -> np.ndarray:
        """Return the distance of mean embeddings [bag, column], [bag]; above 1 is outside."""
        return np.asarray(np.sqrt((self._statistics(values.astype(float)) / self.limits).max(axis=1)))

    def _statistics(self, values: np.ndarray) -> np.ndarray:
        """Return T² and Q, [bag, 2]."""
        columns = (values - self.mean) / self.scale
        along = columns @ self.axes.T
        rest = columns - along @ self.axes
        return np.stack([(along**2 / self.variances).sum(axis=1), (rest**2).sum(axis=1)], axis=1)


def _principal(values: np.ndarray, count: int) -> EmbeddingRegion:
    """Return mean, scale and the first `count` axes of values [bag, column]; the limits are not known yet."""
    mean, scale = values.mean(axis=0), values.std(axis=0)
    # A column that hardly varies would make any difference an infinite one.
    scale = np.maximum(scale, 1e-3 * np.median(scale[scale > 0])) if scale.any() else np.ones_like(scale)
    columns = (values - mean) / scale
    # [bag, bag] is far smaller than [column, column]
    squares, sides = eigh(columns @ columns.T, subset_by_index=(len(values) - count, len(values) - 1))
    kept = squares > 1e-9 * max(squares[-1], np.finfo(float).tiny)
    axes = (columns.T @ sides[:, kept] / np.sqrt(squares[kept])).T
    return EmbeddingRegion(mean, scale, axes, squares[kept] / (len(values) - 1), np.ones(2), len(values))


@dataclass(frozen=True, eq=False)
class Seen:
    """What a model has seen.

    Attributes:
        digests: Digests of the patients that trained it or chose its epoch.
        region: Region of the training bags' mean embeddings; None if they were too few.
        risks: [case], risks of the training patients, in increasing order; None for models from before they were kept.
    """

    digests: frozenset[str]
    region: EmbeddingRegion | None
    risks: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        runtime: Runtime,
        dataset: ShardDataset,
        bags: Sequence[BagEntry],
        patients: Iterable[str],
        data: DataConfig,
        risks: Sequence[float],
    ) -> Seen:
        """Read the mean embeddings of training bags; each slide is read once in a process. Every rank must call this.

        Args:
            runtime: The processes, which share the reading.
            dataset: The shards.
            bags: The training bags.
            patients: Everyone who trained the model or chose its epoch.
            data: How the bags are read.
            risks: [case], risks of the training patients.
        """
        names = magnification_names(data.magnifications)
        if dataset.index.digest not in _MEANS:
            _MEANS.clear()
        kept = _MEANS.setdefault(dataset.index.digest, {})
        missing = sorted({s for bag in bags for s in bag.slide_ids if (s, data.magnifications) not in kept})
        own = slide_means(dataset, missing[runtime.rank :: runtime.world_size], data, data.magnifications)
        for slide, mean in runtime.gather(list(own.items())):
            kept[slide, data.magnifications] = mean
        rows = []
        for bag in sorted(bags, key=lambda bag: bag.key):
            means = np.array([kept[slide, data.magnifications] for slide in bag.slide_ids], dtype=float)
            tiles = np.array([[dataset.tiles(slide)[name] for name in names] for slide in bag.slide_ids], dtype=float)
            rows.append(((means * tiles[..., None]).sum(axis=0) / tiles.sum(axis=0)[:, None]).ravel())
        return cls(frozenset(map(digest_case, patients)), EmbeddingRegion.fit(np.array(rows)), np.sort(risks))

    def with_patients(self, digests: frozenset[str]) -> Seen:
        """Return the same with further patients, such as those of the model that training started from."""
        return replace(self, digests=self.digests | digests)

    def percentile(self, risks: np.ndarray) -> np.ndarray:
        """Return the percentage of the training patients with a lower risk; equal ones count half; NaN if unknown."""
        if self.risks is None:
            return np.full(np.shape(risks), np.nan)
        below, up_to = (np.searchsorted(self.risks, risks, side=side) for side in ("left", "right"))
        return np.asarray(100 * (below + up_to) / (2 * len(self.risks)))

    def save(self, path: Path) -> None:
        """Write `training.npz`."""
        arrays = {"patients": np.array(sorted(self.digests), dtype="U16")}
        if self.risks is not None:
            arrays["risks"] = self.risks.astype(np.float64)
        if self.region is not None:
            arrays |= {name: np.asarray(value, dtype=np.float32) for name, value in vars(self.region).items()}
        np.savez(path, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Seen:
        """Read `training.npz`; nothing is unpickled.

        Raises:
            DataError: The file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays: dict[str, Any] = {name: stored[name] for name in stored.files}
            digests = frozenset(map(str, arrays.pop("patients")))
            risks = arrays.pop("risks", None)
            if not arrays:
                return cls(digests, None, risks)
            bags = int(arrays.pop("bags"))
            return cls(digests, EmbeddingRegion(**{n: v.astype(float) for n, v in arrays.items()}, bags=bags), risks)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}).") from error


def digest_case(case: str) -> str:
    """Return the digest of a patient's name; upper and lower case count as the same."""
    return hashlib.sha256(case.strip().upper().encode()).hexdigest()[:16]


def bag_vector(features: Mapping[str, Any], magnifications: Sequence[float]) -> np.ndarray:
    """Return the mean embedding [column] of one bag of features [1, tile, dim] per magnification name."""
    names = magnification_names(magnifications)
    return np.concatenate([features[name][0].float().mean(dim=0).cpu().numpy() for name in names])


def outside_words(distance: np.ndarray, bags: int) -> str | None:
    """Say how many of the patients are outside of the training's region; None if about as many as usual.

    Args:
        distance: [case], see `EmbeddingRegion.distance`; NaN where unknown.
        bags: Number of training bags that gave the limits; those of few bags vary.
    """
    known = distance[np.isfinite(distance)]
    outside = int((known > 1).sum())
    if not len(known) or outside / len(known) < _NOTABLE:
        return None
    beyond = 2 * (int((1 - _QUANTILE) * bags) + 1)  # training bags at or beyond one of the two limits
    if betabinom.sf(outside - 1, len(known), beyond, bags + 1 - beyond) >= _LEVEL:
        return None
    return (
        f"the mean embeddings of {outside} of {len(known)} patients ({outside / len(known):.0%}) are outside of those "
        "of the training, where 1% is usual. Stain, scanner, preparation or encoder differ; the model has not learnt "
        "from such slides."
    )

"""Define the shared types: cohort, split, slide features, bag batch, targets, output.

Names contain units (`_px`, `_months`). A magnification is a number, 20 for 20x at 0.5 µm/px. Its name, `x20`, is the
key in features, coordinates and batches.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


SLIDE_SUFFIXES = (
    ".bif", ".czi", ".dcm", ".i2syntax", ".isyntax", ".kfb", ".mrxs", ".ndpi", ".qptiff", ".scn", ".sdpc", ".svs",
    ".svslide", ".tif", ".tiff", ".tmap", ".vms", ".vmu", ".vsi",
)  # fmt: skip
"""Suffixes of files that look like slides. Those that OpenSlide cannot read are listed as failed."""

FEATURE_SUFFIXES = (".h5", ".hdf5", ".npy", ".npz", ".pkl", ".pt", ".pth")
"""Suffixes of files that look like features of a slide."""

SLIDE = "slide"
"""Key of embeddings of entire slides, one vector in place of tiles; as a magnification it is 0."""


def magnification_name(magnification: float) -> str:
    """Return the key of a magnification: 20 → `x20`, 2.5 → `x2.5`, 0 → `slide`."""
    return f"x{magnification:g}" if magnification else SLIDE


def magnification_names(magnifications: Iterable[float]) -> tuple[str, ...]:
    """Return the keys of magnifications, finest first."""
    return tuple(magnification_name(m) for m in sorted(magnifications, reverse=True))


def magnification_value(name: str) -> float:
    """Return the magnification of a key: `x20` → 20.0, `slide` → 0.0."""
    return 0.0 if name == SLIDE else float(name.removeprefix("x"))


def magnification_words(name: str) -> str:
    """Return a key in the usual notation: `x20` → `20x`."""
    return name if name == SLIDE else f"{magnification_value(name):g}x"


def titled_table(title: str, table: pd.DataFrame, rows: int | None = None) -> str:
    """Return HTML for a notebook: a title and the first `rows` rows of a table; None: all rows."""
    shown = table if rows is None else table.head(rows)
    more = f"<p>… {len(table) - len(shown)} more rows</p>" if len(shown) < len(table) else ""
    return f"<p>{html.escape(title)}</p>{shown.to_html(index=False, float_format='{:.3g}'.format, border=0)}{more}"


@dataclass(frozen=True, repr=False)
class Cohort:
    """Patients of one cancer type, or of several that are trained as one, their outcomes and their slides.

    Attributes:
        name: Short name, such as `tcga_blca`.
        cases: One row per patient, indexed by `case_id`: `time_months` (float, ≥ 0), `event` (bool, true = the event
            happened), and, if known, `site` and other covariates.
        slides: One row per slide, indexed by `slide_id` (file stem): `case_id`.
        endpoint: The endpoint: OS, DSS or PFI.
        covariates: Clinical covariates as numbers, one column each, indexed by `case_id`, NaN where missing; None if
            there are none. No model of slides reads them.
        unused_covariates: Why a column of covariates is not in `covariates`, by its name.
        strata: Name of the cohort by `case_id` where several are trained as one, also for the owners of slides without
            a row in `cases`; None for one cohort. Outcomes are compared only within a cohort.
    """

    name: str
    cases: pd.DataFrame
    slides: pd.DataFrame
    endpoint: str = "OS"
    covariates: pd.DataFrame | None = None
    strata: pd.Series | None = None
    unused_covariates: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def stratum_names(self) -> tuple[str, ...]:
        """Return the names of the cohorts that are trained as one; of one cohort, its own."""
        return (self.name,) if self.strata is None else tuple(dict.fromkeys(self.strata))

    def strata_of(self, case_ids: Sequence[str]) -> np.ndarray:
        """Return the name of the cohort of each given patient, [case]."""
        if self.strata is None:
            return np.full(len(case_ids), self.name, dtype=object)
        return self.strata.loc[list(case_ids)].to_numpy(dtype=object)

    def parts(self) -> tuple[Cohort, ...]:
        """Return each of the cohorts that are trained as one; one cohort is its only part."""
        if self.strata is None:
            return (self,)
        return tuple(self._part(name, self.strata.index[self.strata == name]) for name in self.stratum_names)

    def _part(self, name: str, owners: pd.Index) -> Cohort:
        cases = self.cases[self.cases.index.isin(owners)]
        return Cohort(
            name,
            cases,
            self.slides[self.slides["case_id"].isin(owners)],
            self.endpoint,
            None if self.covariates is None else self.covariates.reindex(cases.index),
        )

    def slides_of(self, case_ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return the slides of each of the given patients, sorted by name.

        A model that lays the tiles of a bag on a grid depends on their order, which must be that of later predictions.
        """
        grouped = {
            case: tuple(sorted(rows)) for case, rows in self.slides.groupby("case_id", sort=False).groups.items()
        }
        return {case: grouped.get(case, ()) for case in case_ids}

    def subset(self, case_ids: Sequence[str]) -> Cohort:
        """Return a cohort of only the given patients, in the given order."""
        kept = self.slides[self.slides["case_id"].isin(set(case_ids))]
        return dataclasses.replace(self, cases=self.cases.loc[list(case_ids)], slides=kept)

    def __repr__(self) -> str:
        events = int(self.cases["event"].sum())
        counts = f"{len(self.cases)} patients, {events} events, {len(self.slides)} slides"
        return f"Cohort({self.name}: {counts}, {self.endpoint})"

    def _repr_html_(self) -> str:
        counted = self.cases.assign(
            slides=self.slides["case_id"].value_counts().reindex(self.cases.index, fill_value=0)
        )
        return titled_table(repr(self), counted.reset_index(), rows=8)


@dataclass(frozen=True, repr=False)
class Split:
    """One fold: disjoint patients for training, for choosing the model, and for the final score.

    Attributes:
        fold: Number of the fold, from 0.
        train: Patients whose outcomes determine parameters, time bins and cut-offs.
        validation: Patients for early stopping and model selection, from the training side. Empty under `fixed-epoch`.
        test: Patients scored once. Under the `published` protocol they also choose the model.
        repeat: Number of the repetition in repeated cross-validation.

    The protocol follows from the sides, see `protocol`.
    """

    fold: int
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    repeat: int = 0

    @property
    def protocol(self) -> str:
        """Protocol by which a model trained on this split is chosen, a value of `evaluation.protocol`.

        `fixed-epoch` if no patients choose the model, `published` if patients choose it who are also scored, else
        `strict`.
        """
        if not self.validation:
            return "fixed-epoch"
        return "strict" if set(self.validation).isdisjoint(self.test) else "published"

    def __repr__(self) -> str:
        again = f", repeat {self.repeat}" if self.repeat else ""
        counts = f"{len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test"
        return f"Split(fold {self.fold}{again}: {counts})"


@dataclass(frozen=True)
class SlideFeatures:
    """One slide's embeddings at all magnifications, as stored in a feature store or shard.

    Attributes:
        slide_id: File stem of the slide.
        features: Per magnification name, f16 [N, d].
        coords: Per magnification name, i32 [N, 2]: x, y of each tile's top-left corner in level-0 px. Empty if the
            source has no coordinates.
        parents: For each magnification except the coarsest, i32 [N]: the row in the next coarser magnification.
        attrs: Provenance: encoder, weight digest, transform, resample filter, mpp and its source, `tile_px_level0`
            (per magnification name, side of a tile in level-0 px), grid version, slide digest, program version.
    """

    slide_id: str
    features: dict[str, np.ndarray]
    coords: dict[str, np.ndarray]
    parents: dict[str, np.ndarray]
    attrs: dict[str, Any]


@dataclass(frozen=True)
class BagBatch:
    """Bags padded to a common length, one tensor per magnification name.

    Attributes:
        features: [bag, tile, dim], zero in the padding.
        masks: [bag, tile], true for tiles, false for padding; None if there is no padding.
        positions: [bag, tile, 2], column and row on the grid of the magnification; None if the source has no
            coordinates. Slides of one case are placed side by side, so their positions do not collide.
        case_ids: The patient of each bag.
        slides: [bag, tile], number of the slide within its bag, 0 in the padding; None if every bag is one slide, or
            if the source does not say.
        neighbours: [bag, tile, k], rows of each tile's nearest others in its slide, nearest first, −1 where there is
            none; computed by the loader where it was asked to. None: models of graphs find them from the positions.
        lengths: Tiles of each bag, where the bags are joined one after the other in one row, [1, tile, …], without
            padding. None: a bag is a row.
    """

    features: dict[str, Float[Tensor, "bag tile dim"]]
    masks: dict[str, Bool[Tensor, "bag tile"]] | None = None
    positions: dict[str, Int[Tensor, "bag tile 2"]] | None = None
    case_ids: tuple[str, ...] = ()
    slides: dict[str, Int[Tensor, "bag tile"]] | None = None
    neighbours: dict[str, Int[Tensor, "bag tile k"]] | None = None
    lengths: dict[str, tuple[int, ...]] | None = None

    def __len__(self) -> int:
        if self.lengths is not None:
            return len(next(iter(self.lengths.values())))
        return next(iter(self.features.values())).shape[0]

    def name(self, bag: int) -> str:
        """Return the name of a bag for errors: its patient, or its number if there are no patients."""
        return self.case_ids[bag] if self.case_ids else f"number {bag}"

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BagBatch:
        """Copy the batch to `device`, with features converted to `dtype` if it is given."""

        def move(tensors: Mapping[str, Tensor] | None, as_type: torch.dtype | None = None) -> Any:
            if tensors is None:
                return None
            return {k: t.to(device=device, dtype=as_type, non_blocking=True) for k, t in tensors.items()}

        return dataclasses.replace(
            self,
            features=move(self.features, dtype),
            **{name: move(getattr(self, name)) for name in ("masks", "positions", "slides", "neighbours")},
        )


@dataclass(frozen=True)
class Targets:
    """Outcomes of a batch.

    Attributes:
        label: [bag], the time bin of the follow-up time, 0 … n_bins − 1.
        event: [bag], true if the event was observed, false if censored.
        time_months: [bag], follow-up time.
        stratum: [bag], number of the patient's cohort; losses over sets compare only patients of one. None: one cohort.
    """

    label: Int[Tensor, " bag"]
    event: Bool[Tensor, " bag"]
    time_months: Float[Tensor, " bag"]
    stratum: Int[Tensor, " bag"] | None = None

    def to(self, device: torch.device | str) -> Targets:
        """Copy the targets to `device`."""
        stratum = None if self.stratum is None else self.stratum.to(device)
        return Targets(self.label.to(device), self.event.to(device), self.time_months.to(device), stratum)

    def of(self, bags: Tensor | slice) -> Targets:
        """Return the outcomes of some of the bags, by their numbers [bag] or as a range."""
        stratum = None if self.stratum is None else self.stratum[bags]
        return Targets(self.label[bags], self.event[bags], self.time_months[bags], stratum)

    @staticmethod
    def join(parts: Sequence[Targets]) -> Targets:
        """Return the outcomes of several batches as one."""
        strata = [part.stratum for part in parts if part.stratum is not None]
        label, event, time = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("label", "event", "time_months")
        )
        return Targets(label, event, time, torch.cat(strata) if strata else None)


def at_least_f32(values: Tensor) -> Tensor:
    """Return values of a half-precision type in f32, others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


@dataclass(frozen=True)
class SurvivalOutput:
    """Output of every model: a discrete-time survival distribution per bag (CrossFusion, section 3.5).

    Attributes:
        logits: [bag, bin].
        hazards: [bag, bin] in (0, 1): sigmoid of the logits, the probability of the event in a bin given survival up
            to it.
        survival: [bag, bin] in (0, 1), not increasing: the probability of surviving past the right edge of each bin.
        risk: [bag], minus the sum of `survival`; higher is worse.
        instance_logits: [bag, bin], of the critical tile of each bin, if a model trains an instance branch in addition
            to its bag branch (DSMIL); the loss is then the mean of both.
        branch_logits: [bag, bin] of each further branch that is trained with the bag's (MuSTMIL); the loss is then the
            mean of all.
        penalty: [bag], added to the loss of each bag (ProtoSurv); None: nothing is.
    """

    logits: Float[Tensor, "bag bin"]
    hazards: Float[Tensor, "bag bin"]
    survival: Float[Tensor, "bag bin"]
    risk: Float[Tensor, " bag"]
    instance_logits: Float[Tensor, "bag bin"] | None = None
    branch_logits: tuple[Float[Tensor, "bag bin"], ...] = ()
    penalty: Float[Tensor, " bag"] | None = None

    @property
    def heads(self) -> list[Float[Tensor, "bag bin"]]:
        """Return all logits that enter the loss."""
        instance = [] if self.instance_logits is None else [self.instance_logits]
        return [self.logits, *instance, *self.branch_logits]

    @classmethod
    def from_logits(
        cls, logits: Float[Tensor, "bag bin"], *, branches: tuple[Float[Tensor, "bag bin"], ...] = ()
    ) -> SurvivalOutput:
        """Compute hazards, survival and risk, at least in f32: f16 is too imprecise for products of hazards."""
        logits = at_least_f32(logits)
        hazards = torch.sigmoid(logits)
        survival = torch.cumprod(1 - hazards, dim=1)
        return cls(logits, hazards, survival, -survival.sum(dim=1), branch_logits=branches)


__all__ = [
    "BagBatch", "Cohort", "SlideFeatures", "Split", "SurvivalOutput", "Targets", "magnification_name",
    "magnification_value", "titled_table",
]  # fmt: skip

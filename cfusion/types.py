"""The words of the house as types: cohort, split, bag, batch, target, output.

Units stand in the names (`_px`, `_months`). A magnification is written as the field writes it, 20 for 20x at
0.5 µm/px; its name, `x20`, is the key under which features, coordinates and batches carry it.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


def magnification_name(magnification: float) -> str:
    """The key of a magnification: 20 → `x20`, 2.5 → `x2.5`."""
    return f"x{magnification:g}"


def magnification_value(name: str) -> float:
    """The magnification of a key: `x20` → 20.0."""
    return float(name.removeprefix("x"))


def magnification_words(name: str) -> str:
    """A key as people say it: `x20` → `20x`."""
    return f"{magnification_value(name):g}x"


def titled_table(title: str, table: pd.DataFrame, rows: int | None = None) -> str:
    """HTML for a notebook: a line, and the first `rows` rows of a table; none: all."""
    shown = table if rows is None else table.head(rows)
    more = f"<p>… {len(table) - len(shown)} more rows</p>" if len(shown) < len(table) else ""
    return f"<p>{html.escape(title)}</p>{shown.to_html(index=False, float_format='{:.3g}'.format, border=0)}{more}"


@dataclass(frozen=True, repr=False)
class Cohort:
    """Patients of one cancer type, their outcomes and their slides.

    Attributes:
        name: Short name, such as `tcga_blca`.
        cases: One row per patient, indexed by `case_id`: `time_months` (float, ≥ 0), `event` (bool, true = the event
            happened), and, where known, `site` and other covariates.
        slides: One row per slide, indexed by `slide_id` (file stem): `case_id`.
        endpoint: What the event is: OS, DSS, PFI.
    """

    name: str
    cases: pd.DataFrame
    slides: pd.DataFrame
    endpoint: str = "OS"

    def slides_of(self, case_ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The slides of each of the given patients, in the table's order."""
        grouped = {case: tuple(rows) for case, rows in self.slides.groupby("case_id", sort=False).groups.items()}
        return {case: grouped.get(case, ()) for case in case_ids}

    def subset(self, case_ids: Sequence[str]) -> Cohort:
        """The cohort of the given patients alone, in their order."""
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
    """One fold: disjoint patients for training, for choosing the model, and for the one final score.

    Attributes:
        fold: Number from 0.
        train: Patients whose outcomes the parameters, time bins and cut-offs may see.
        validation: Patients for early stopping and model choice; part of the training side. Empty under `fixed-epoch`.
        test: Patients scored once. Under the `published` protocol these choose the model too.
        repeat: Number of the repetition in repeated cross-validation.
    """

    fold: int
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    repeat: int = 0

    def __repr__(self) -> str:
        again = f", repeat {self.repeat}" if self.repeat else ""
        counts = f"{len(self.train)} train, {len(self.validation)} choose, {len(self.test)} are scored"
        return f"Split(fold {self.fold}{again}: {counts})"


@dataclass(frozen=True)
class SlideFeatures:
    """One slide's embeddings over all magnifications, as a feature store or shard holds them.

    Attributes:
        slide_id: File stem of the slide.
        features: Per magnification name, f16 [N, d].
        coords: Per magnification name, i32 [N, 2]: x, y of each tile's top-left corner in level-0 px. Empty where the
            source had none.
        parents: For each magnification but the coarsest, i32 [N]: the row in the next coarser magnification.
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
        features: [bag, tile, dim], zero where padded.
        masks: [bag, tile], true where a tile is real; None when every tile of every bag is.
        positions: [bag, tile, 2], column and row on the magnification's own grid; None where the source has no
            coordinates. Slides of one case are laid side by side, so positions do not collide.
        case_ids: The patient of each bag.
    """

    features: dict[str, Float[Tensor, "bag tile dim"]]
    masks: dict[str, Bool[Tensor, "bag tile"]] | None = None
    positions: dict[str, Int[Tensor, "bag tile 2"]] | None = None
    case_ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return next(iter(self.features.values())).shape[0]

    def name(self, bag: int) -> str:
        """What an error calls a bag: its patient, or else its number."""
        return self.case_ids[bag] if self.case_ids else f"number {bag}"

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BagBatch:
        """The batch on `device`, its features as `dtype` where one is given."""

        def move(tensors: Mapping[str, Tensor] | None, as_type: torch.dtype | None = None) -> Any:
            if tensors is None:
                return None
            return {k: t.to(device=device, dtype=as_type, non_blocking=True) for k, t in tensors.items()}

        return dataclasses.replace(
            self, features=move(self.features, dtype), masks=move(self.masks), positions=move(self.positions)
        )


@dataclass(frozen=True)
class Targets:
    """Outcomes of a batch.

    Attributes:
        label: [bag], the time bin of the follow-up time, 0 … n_bins − 1.
        event: [bag], true where the event was seen, false where censored.
        time_months: [bag], follow-up time.
    """

    label: Int[Tensor, " bag"]
    event: Bool[Tensor, " bag"]
    time_months: Float[Tensor, " bag"]

    def to(self, device: torch.device | str) -> Targets:
        """The targets on `device`."""
        return Targets(self.label.to(device), self.event.to(device), self.time_months.to(device))


@dataclass(frozen=True)
class SurvivalOutput:
    """What every model returns: a discrete-time survival distribution per bag (CrossFusion, section 3.5).

    Attributes:
        logits: [bag, bin].
        hazards: [bag, bin] in (0, 1): sigmoid of the logits, the chance of the event in a bin given survival to it.
        survival: [bag, bin] in (0, 1), not increasing: the chance of surviving past the right edge of each bin.
        risk: [bag], minus the sum of `survival`; higher is worse.
        instance_logits: [bag, bin], of each bin's critical tile, where a model trains an instance branch beside its bag
            branch (DSMIL); the loss is then the mean over both.
    """

    logits: Float[Tensor, "bag bin"]
    hazards: Float[Tensor, "bag bin"]
    survival: Float[Tensor, "bag bin"]
    risk: Float[Tensor, " bag"]
    instance_logits: Float[Tensor, "bag bin"] | None = None

    @classmethod
    def from_logits(cls, logits: Float[Tensor, "bag bin"]) -> SurvivalOutput:
        """Hazards, survival and risk of the given logits, in f32 at least: products of hazards do not bear f16."""
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        hazards = torch.sigmoid(logits)
        survival = torch.cumprod(1 - hazards, dim=1)
        return cls(logits, hazards, survival, -survival.sum(dim=1))


__all__ = [
    "BagBatch", "Cohort", "SlideFeatures", "Split", "SurvivalOutput", "Targets", "magnification_name",
    "magnification_value", "titled_table",
]  # fmt: skip

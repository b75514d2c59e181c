"""Predictions of a trained model, or of a fold ensemble, for the patients of a source or for one bag in memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cfusion.apply.sources import BagSource, Cases, ShardSource, bag_of_arrays
from cfusion.cohort.identifiers import Names
from cfusion.cohort.slide_owners import SlideOwners, known_owner
from cfusion.config import DataConfig, ParallelConfig
from cfusion.console import progress
from cfusion.data.loader import BagSet
from cfusion.data.partition import evaluation_slices
from cfusion.errors import DataError
from cfusion.run_folder import CARD, fold_models
from cfusion.survival.curves import YEARS, is_high_risk, step_values, survival_after_years
from cfusion.survival.predictions import curve_table
from cfusion.training.fitted import FittedModel, ModelCard, read_card
from cfusion.training.inference import predict_logits, prediction_frame
from cfusion.training.runtime import Runtime
from cfusion.training.seen import EmbeddingRegion, bag_vector, digest_case
from cfusion.training.world import join_world, launched
from cfusion.types import BagBatch, SurvivalOutput, magnification_name

logger = logging.getLogger(__name__)


def predict(
    model: FittedModel, data: DataConfig, cases: Sequence[str] | Mapping[str, Sequence[str]], *, micro_batch: int = 1
) -> pd.DataFrame:
    """Predict the risk and survival curve of each patient; at any number of processes each is computed once.

    Args:
        model: A trained model, as `fit` or `FittedModel.load` gives it.
        data: Location of the shards and how they are read.
        cases: Patients, or the slides of each patient. Slides of patients given only by name are found by their names
            (`cfusion.cohort.slide_owners`).
        micro_batch: Bags in one forward pass.

    Returns:
        One row per patient: `model, protocol, fold` (from the model's card), `case_id, risk, risk_cutoff` (of the
        model; NaN if it has none), `survival_1…K, edge_1…K`. `cfusion.score` takes it with the patients' cohort.

    Raises:
        DataError: The shards are of another encoder or width, or a patient has no slide in them.
    """
    source = ShardSource(data)
    source.embeddings.check(model.card)
    slides = cases if isinstance(cases, Mapping) else slides_by_name(cases, source.slide_ids)
    runtime = join_world(ParallelConfig(precision="f32", global_batch=launched()))
    bags = BagSet.open(
        source.dataset,
        slides,
        data,
        magnifications=model.card.magnifications,
        device=runtime.device,
        dtype=runtime.dtype,
    )
    model.module.to(device=runtime.device, dtype=runtime.dtype)
    frame = prediction_frame(predict_logits(runtime, model.module, bags, micro_batch), bags, model.bins)
    card = model.card
    cutoff = np.nan if card.risk_cutoff is None else card.risk_cutoff
    labels = {"model": card.model["name"], "protocol": card.protocol, "fold": card.fold}
    first = [*labels, "case_id", "risk", "risk_cutoff"]
    return frame.assign(**labels, risk_cutoff=cutoff)[[*first, *frame.columns[2:]]]


def slides_by_name(cases: Sequence[str], slide_ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the slides of patients by the slides' names, see `cfusion.cohort.slide_owners`.

    Raises:
        DataError: A patient has none.
    """
    known = Names(cases)
    grouped = SlideOwners(known.find).group(slide for slide in slide_ids if known_owner(slide, known.find) is not None)
    missing = [case for case in cases if case not in grouped]
    if missing:
        raise DataError(
            f"No slide in the shards is named after {len(missing)} of {len(cases)} patients: {', '.join(missing[:5])}.",
            "Give the slides of each patient as a mapping, or pack the missing slides.",
        )
    return {case: grouped[case] for case in cases}


@dataclass(frozen=True)
class FoldEnsemble:
    """The models of all folds of a cross-validation, which together predict for patients none of them has seen."""

    models: tuple[FittedModel, ...]

    @classmethod
    def load(cls, folder: Path, *, trust_code: str | None = None) -> FoldEnsemble:
        """Read every fold's model of the run at or below `folder`.

        Args:
            folder: The run's folder, or one above or below it.
            trust_code: Digest of code that came with the models and may run (see `FittedModel.load`).

        Raises:
            DataError: There is none, they belong to several runs, or they do not read the same embeddings.
            UntrustedCodeError: The models include code, and `trust_code` does not match it.
        """
        cls.cards(folder)
        return cls(tuple(FittedModel.load(path, trust_code=trust_code) for path in fold_models(folder)))

    @classmethod
    def cards(cls, folder: Path) -> tuple[ModelCard, ...]:
        """Read the cards of every fold's model of the run at or below `folder`; no code of a model is run.

        Raises:
            DataError: There is none, they belong to several runs, or they do not read the same embeddings.
        """
        cards = tuple(read_card(path) for path in fold_models(folder))
        if not cards:
            raise DataError(f"{folder}: holds no {CARD}.", "Give the folder of a finished run.")
        if len({(card.encoder, card.backbone_dim, card.magnifications) for card in cards}) > 1:
            raise DataError(f"{folder}: its models read different embeddings.", topic="encoder")
        return cards

    @property
    def cohorts(self) -> tuple[str, ...]:
        """Names of the cohorts that every model was trained on as one of several; empty for models of one cohort."""
        first, *others = (model.card.strata for model in self.models)
        return tuple(name for name in first if all(name in strata for strata in others))

    def of_cohort(self, name: str) -> FoldEnsemble:
        """Return the models for patients of one of their cohorts, with its time bins and cut-offs.

        Raises:
            ConfigError: A model was not trained on a cohort of this name as one of several.
        """
        return FoldEnsemble(tuple(model.of_cohort(name) for model in self.models))

    def of_chosen(self, cohort: str | None, *, warns: bool = True) -> FoldEnsemble:
        """Return the models for patients of a cohort; without one, warn if the months are a mean over cohorts.

        Raises:
            ConfigError: See `of_cohort`.
        """
        if cohort is not None:
            return self.of_cohort(cohort)
        if self.cohorts and warns:
            logger.warning(
                "The model was trained on several cohorts, each with its own time bins. Risks are comparable within a "
                "cohort; survival curves and the cut-off are a mean of %s. --cohort NAME chooses one.",
                ", ".join(self.cohorts),
            )
        return self

    @property
    def risk_cutoff(self) -> float | None:
        """Mean of the folds' cut-offs, because the risk is the mean of the folds' risks; see `is_high_risk`."""
        return mean_cutoff([model.card for model in self.models])

    def predict(self, source: BagSource, cases: Cases, runtime: Runtime) -> pd.DataFrame:
        """Predict the risk and survival curve of each patient; one rank reads each bag, once for all models.

        As in training, a patient's slides form one bag, or their curves and risks are averaged (`ModelCard.unit`). A
        patient of the training is predicted by the folds that have not seen the patient (`not_seen_by`).

        Args:
            source: The embeddings.
            cases: Slides of each patient.
            runtime: The processes; every rank gets all rows.

        Returns:
            One row per patient: `case_id, slides, risk` and `risk_sd` (mean and standard deviation over folds), `group`
            (high where the risk is at least `risk_cutoff`, otherwise low; empty if a fold has none), `risk_percentile`
            (percentage of the training patients with a lower risk) and `distance` (of the mean embedding from those of
            the training, above 1 is outside), both means over folds, and `unseen_folds` (number of folds that have not
            seen the patient; 0: all have, and all are used), these three only if the models have recorded them,
            `survival_1y, survival_3y, survival_5y` (NaN beyond the last time bin), `survival_1…K, edge_1…K` (mean over
            folds at each month where some model's time bin ends).

        Raises:
            StoreError: The source's embeddings are not those the models read.
        """
        card = self.models[0].card
        source.embeddings.check(card)
        by_slide = card.unit == "slide"
        apart = {slide: (slide,) for slides in cases.values() for slide in slides}
        bags = source.open(apart if by_slide else cases, card.magnifications, runtime)
        mine = evaluation_slices(bags.costs, runtime.world_size)[runtime.rank].tolist()
        for model in self.models:
            model.module.to(device=runtime.device, dtype=runtime.dtype)
        used = {case: self.not_seen_by(case)[0] for case in cases}
        by_bag = {bag: used[case] for case, slides in cases.items() for bag in (slides if by_slide else [case])}
        rows: list[tuple[str, tuple[list[np.ndarray], float]]] = []
        with progress("Bags", len(mine)) as bar, torch.inference_mode():
            for index, batch in zip(mine, bags.stream(mine), strict=True):
                bag = bags.case_ids[index]
                found = [self._survival(model, batch) for model in by_bag[bag].models], by_bag[bag]._distance(batch)
                rows.append((bag, found))
                bar.advance()
        gathered = dict(runtime.gather(rows))
        survival, distances = [], []
        for case, slides in cases.items():
            of_bags, far = zip(*(gathered[key] for key in (slides if by_slide else [case])), strict=True)
            survival.append([np.mean(curves, axis=0) for curves in zip(*of_bags, strict=True)])
            distances.append(float(np.mean(far)))
        table = self._table(cases, used, survival)
        place = list(table.columns).index("survival_1y")
        if any(model.seen is not None for model in self.models):
            table.insert(place, "unseen_folds", [len(self._unseen(case)) for case in cases])
        if not np.isnan(distances).all():
            table.insert(place, "distance", distances)
        return table

    def percentile(self, risks: np.ndarray) -> np.ndarray:
        """Return the percentage of training patients with a lower risk, mean over the models; NaN if one does not know.

        Args:
            risks: [case, model].
        """
        found = np.full(risks.shape, np.nan)
        for column, model in enumerate(self.models):
            if model.seen is not None:
                found[:, column] = model.seen.percentile(risks[:, column])
        return np.asarray(found.mean(axis=1))

    def not_seen_by(self, case: str) -> tuple[FoldEnsemble, str | None]:
        """Return the models that have not seen a patient in their training, and what a reader must know about it.

        If each has seen the patient, all are returned.
        """
        unseen = self._unseen(case)
        if len(unseen) == len(self.models):
            return self, None
        if unseen:
            folds = ", ".join(str(model.card.fold) for model in unseen)
            return FoldEnsemble(unseen), (
                f"This patient was in the training of other models: {len(unseen)} of {len(self.models)} models have "
                f"not seen the patient, and only they are used (fold{'s' * (len(unseen) > 1)} {folds})."
            )
        return self, (
            "Every model has seen this patient in its training: the risk is no prediction, and the scores also show "
            "what was learnt by heart."
        )

    def find_trained(self, name: str) -> str | None:
        """Return a name if it is that of a patient of the training, otherwise None; see `SlideOwners`."""
        return name if digest_case(name) in self.seen else None

    @cached_property
    def seen(self) -> frozenset[str]:
        """Digests of the patients that the models have seen (`digest_case`); empty for models that record none."""
        return frozenset[str]().union(*(model.seen.digests for model in self.models if model.seen is not None))

    def _unseen(self, case: str) -> tuple[FittedModel, ...]:
        """Return the models that have not seen a patient; those that do not record their patients count as such."""
        digest = digest_case(case)
        return tuple(model for model in self.models if model.seen is None or digest not in model.seen.digests)

    @property
    def regions(self) -> tuple[EmbeddingRegion, ...]:
        """Regions of the models' training embeddings, of those that have recorded one."""
        seen = [model.seen.region for model in self.models if model.seen is not None]
        return tuple(region for region in seen if region is not None)

    def _distance(self, batch: BagBatch) -> float:
        """Return the mean over the models of a bag's distance from their training; NaN if none has recorded it."""
        if not self.regions:
            return float("nan")
        vector = bag_vector(batch.features, self.models[0].card.magnifications)[None]
        return float(np.mean([region.distance(vector)[0] for region in self.regions]))

    @staticmethod
    def _survival(model: FittedModel, batch: BagBatch) -> np.ndarray:
        return SurvivalOutput.from_logits(model.module(batch).logits.double()).survival[0].cpu().numpy()

    def _table(
        self, cases: Cases, used: Mapping[str, FoldEnsemble], survival: Sequence[Sequence[np.ndarray]]
    ) -> pd.DataFrame:
        """Return a row per patient from the survival curves [bin] of each model that is used for the patient."""
        months = self.months
        risks = [np.array([-curve.sum() for curve in of_models]) for of_models in survival]
        curves = np.array([
            models._mean_curve(of_models, months) for models, of_models in zip(used.values(), survival, strict=True)
        ])  # fmt: skip
        frame = curve_table(list(cases), curves, months.tolist(), np.array([risk.mean() for risk in risks]))
        cutoffs = [models.risk_cutoff for models in used.values()]
        groups = [
            "" if cutoff is None else "high" if is_high_risk(risk, cutoff) else "low"
            for risk, cutoff in zip(frame["risk"], cutoffs, strict=True)
        ]
        frame.insert(1, "slides", [len(slides) for slides in cases.values()])
        frame.insert(3, "risk_sd", [risk.std() for risk in risks])
        frame.insert(4, "group", groups)
        years = pd.DataFrame([survival_after_years(months, curve) for curve in curves], columns=list(YEARS))
        for year in reversed(YEARS):
            frame.insert(5, f"survival_{year}y", years[year])
        percentiles = [
            float(models.percentile(risk[None])[0]) for models, risk in zip(used.values(), risks, strict=True)
        ]
        if not np.isnan(percentiles).any():
            frame.insert(5, "risk_percentile", percentiles)
        return frame

    @property
    def months(self) -> np.ndarray:
        """Every month at which some model's time bin ends, in order."""
        return np.unique(np.concatenate([m.bins.right_edges_months for m in self.models]))

    def _mean_curve(self, survival: Sequence[np.ndarray], months: np.ndarray) -> np.ndarray:
        """Return the mean over models of their survival curves [bin] at some months."""
        curves = [
            step_values(model.bins.right_edges_months, curve, months, before=1.0)
            for model, curve in zip(self.models, survival, strict=True)
        ]
        return np.mean(curves, axis=0)

    def predict_bag(
        self,
        features: Mapping[str, np.ndarray],
        positions: Mapping[str, Sequence[Sequence[int]]] | None = None,
        slide: str | None = None,
    ) -> pd.DataFrame:
        """Predict the risk and survival of one bag.

        Args:
            features: Per magnification name, f32 [tile, dim].
            positions: Per magnification name, [tile, 2], column and row of each tile on its magnification's grid, as
                `bag_positions` gives them; required by CrossFusion with `grid: spatial`.
            slide: Name of a slide or of the patient: a patient of the training (`cfusion.cohort.slide_owners`) is
                predicted by the folds that have not seen the patient. None: every fold predicts.

        Returns:
            One row per month at which some model's time bin ends: `months`, `survival` (mean over folds), and, the
            same in each row, `risk` (mean over folds), `risk_sd` (over folds) and `unseen_folds` (number of folds that
            have not seen the patient; 0: all have, and all are used).

        Raises:
            DataError: A feature or the risk is not finite, or the positions are not those of the tiles.
        """
        card = self.models[0].card
        names = [magnification_name(m) for m in card.magnifications]
        placed = None
        if positions:
            placed = {name: _checked_positions(positions, name, len(features[name])) for name in names}
        arrays = {name: _checked_features(features[name], name) for name in names}
        batch = bag_of_arrays(arrays, placed)
        patient = None if slide is None else SlideOwners(self.find_trained).patient(slide)
        used = self if patient is None else self.not_seen_by(patient)[0]
        unseen = len(self.models) if patient is None else len(self._unseen(patient))
        with torch.inference_mode():
            # Models of `fit` stay on the device that trained them.
            outputs = [m.module(batch.to(next(m.module.parameters()).device)) for m in used.models]
        survival = used._mean_curve([output.survival[0].double().cpu().numpy() for output in outputs], self.months)
        risks = np.array([output.risk.item() for output in outputs])
        if not np.isfinite(risks).all():
            raise DataError("The risk of this bag is not finite.", "Its features may be too large for the model.")
        same = {"risk": risks.mean(), "risk_sd": risks.std(), "unseen_folds": unseen}
        return pd.DataFrame({"months": self.months, "survival": survival, **same})


def mean_cutoff(cards: Sequence[ModelCard]) -> float | None:
    """Return the mean of the cut-offs of several models; None if one has none."""
    cutoffs = [card.risk_cutoff for card in cards if card.risk_cutoff is not None]
    return float(np.mean(cutoffs)) if len(cutoffs) == len(cards) else None


def _checked_features(features: np.ndarray, name: str) -> np.ndarray:
    """Return the features [tile, dim] of a magnification, in f32.

    Raises:
        DataError: A value is not finite.
    """
    with np.errstate(over="ignore"):  # a value too large for f32 becomes infinite and is refused below
        values = np.array(features, dtype=np.float32)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise DataError(
            f"features of {name}: row {int(np.argmin(finite))}, counted from 0, holds a value that is not finite.",
            "Extract the slide again.",
        )
    return values


def _checked_positions(positions: Mapping[str, Sequence[Sequence[int]]], name: str, tiles: int) -> np.ndarray:
    """Return the positions [tile, 2] of a magnification.

    Raises:
        DataError: They are not columns and rows of that many tiles.
    """
    table = np.asarray(positions.get(name, ()))
    if table.shape != (tiles, 2) or table.dtype.kind not in "iu" or table.min(initial=0) < 0:
        raise DataError(f"positions of {name}: expected {tiles} pairs of column and row, whole numbers from 0.")
    return table.astype(np.int64)

"""Predict the patients of shards, a feature store or slides."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.apply.inputs import Extraction, open_inputs
from cfusion.apply.loading import load_ensemble
from cfusion.cohort.identifiers import Names
from cfusion.cohort.read import read_cohort
from cfusion.cohort.slide_owners import SlideOwners, read_owners, wanted_slides
from cfusion.config import CohortConfig, ParallelConfig, validate
from cfusion.training.fitted import ModelCard
from cfusion.training.seen import outside_words
from cfusion.training.world import join_world, launched
from cfusion.types import Cohort

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """Risks and curves of patients.

    Attributes:
        table: A row per patient, as `FoldEnsemble.predict` returns it.
        slides_as_patients: Number of rows that are slides, each counted as a patient.
        failed: Slides that could not be read.
        is_main: Whether this process reports the result.
        cards: Cards of the fold models.
        seen: Digests of the patients that the models have seen (`digest_case`); empty for models that do not record
            them.
        training_bags: Number of bags that give the limit of `distance` in the table; 0 if there is no such column.
        cohorts: Cohorts of the clinical tables that were given, with their outcomes.
    """

    table: pd.DataFrame
    slides_as_patients: int
    failed: tuple[str, ...]
    is_main: bool
    cards: tuple[ModelCard, ...]
    seen: frozenset[str] = frozenset()
    training_bags: int = 0
    cohorts: tuple[Cohort, ...] = ()

    def in_training(self) -> str | None:
        """Say how many patients the models have seen in their training; None if none, or if no model records them."""
        if "unseen_folds" not in self.table:
            return None
        folds = self.table["unseen_folds"]
        by_all, some = int((folds == 0).sum()), int(folds.between(1, len(self.cards) - 1).sum())
        parts = [
            f"{some} are predicted only by the folds that have not seen them" if some else "",
            f"{by_all} have been seen by every fold, so their risk is no prediction" if by_all else "",
        ]
        words = "; ".join(part for part in parts if part)
        return f"{some + by_all} of {len(folds)} patients were in the model's training: {words}." if words else None

    def outside(self, rows: pd.DataFrame) -> str | None:
        """Say how many of some rows of the table are outside of the training; None if about as many as usual."""
        return outside_words(rows["distance"].to_numpy(), self.training_bags) if self.training_bags else None


def predict_inputs(
    given: Sequence[str],
    model: str,
    *,
    uri: str | None = None,
    trust_code: str | None = None,
    cases: Path | None = None,
    tables: Sequence[Path] = (),
    store: Path | None = None,
    cohort: str | None = None,
    settings: Mapping[str, Any],
) -> Prediction:
    """Predict the patients of shards, a store or slides; every process under torchrun gets all rows.

    Args:
        given: See `open_inputs`.
        model: See `load_ensemble`.
        uri: MLflow server; None: MLFLOW_TRACKING_URI.
        trust_code: Digest of the code in the model that may run.
        cases: Table of the patients of slides, and of the slides that are wanted; None: all slides, whose patients are
            found by `cfusion.cohort.slide_owners`, among those of `tables` and of the training.
        tables: Clinical tables of the patients, a cohort each, named after its file; see `cfusion.cohort.read`.
        store: Store that keeps the features of slides; None: they are not kept.
        cohort: One of the cohorts of a model of several, whose time bins and cut-off apply; None: their mean.
        settings: Settings of `PreprocessConfig` for slides, except those that the model fixes.

    Raises:
        ConfigError: The model was not trained on `cohort` as one of several.
        DataError: The model or the inputs cannot be used, a table is invalid, or a slide of `cases` is missing.
    """
    runtime = join_world(ParallelConfig(precision="f32", global_batch=launched()))
    with tempfile.TemporaryDirectory() as scratch:
        ensemble = load_ensemble(model, uri, trust_code).of_chosen(cohort, warns=runtime.is_main)
        cohorts = tuple(_cohort(table, ensemble.models[0].card.endpoint) for table in tables)
        where = Path(runtime.from_main(str(store or Path(scratch) / "features")))
        extraction = Extraction(where, {"sheets": False, **settings})
        inputs = open_inputs(given, ensemble.models[0].card, extraction, runtime)
        of_cases = {} if cases is None else read_owners(cases)
        owners = _owners(ensemble, cohorts, of_cases)
        chosen = inputs.slide_ids if cases is None else wanted_slides(cases, of_cases, inputs.slide_ids)
        unowned = owners.unowned(chosen)
        if unowned and runtime.is_main:
            logger.warning(
                "%d of %d slides name no known patient, such as %s: each counts as a patient. --cases TABLE groups "
                "them.",
                len(unowned), len(chosen), unowned[0],
            )  # fmt: skip
        table = ensemble.predict(inputs.source, owners.group(chosen), runtime)
        runtime.barrier()
    cards = tuple(fold.card for fold in ensemble.models)
    training_bags = min((region.bags for region in ensemble.regions), default=0)
    done = Prediction(
        table, len(unowned), inputs.failed, runtime.is_main, cards, ensemble.seen, training_bags, cohorts
    )  # fmt: skip
    if (words := done.in_training()) and runtime.is_main:
        logger.warning("%s The column unseen_folds counts the folds.", words)
    if (outside := done.outside(table)) and runtime.is_main:
        logger.warning("Read these predictions with care: %s", outside)
    return done


def _cohort(table: Path, endpoint: str) -> Cohort:
    """Read a clinical table of new patients."""
    values = {"name": table.stem, "table": str(table), "endpoint": endpoint}
    return read_cohort(validate(CohortConfig, values, "--table"))


def _owners(ensemble: FoldEnsemble, cohorts: Sequence[Cohort], of_cases: Mapping[str, str]) -> SlideOwners:
    """Return how patients of slides are found: in the table of cases, then in the clinical tables, then by training."""
    named = {str(slide): str(case) for cohort in cohorts for slide, case in cohort.slides["case_id"].items()}
    patients = Names([str(case) for cohort in cohorts for case in cohort.cases.index])
    return SlideOwners(lambda name: patients.find(name) or ensemble.find_trained(name), {**named, **of_cases})

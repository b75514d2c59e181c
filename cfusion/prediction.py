"""Predictions of a trained model, or of a fold ensemble, for bags in shards or for one bag in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cfusion.config import DataConfig, ParallelConfig
from cfusion.errors import DataError
from cfusion.training.fitted import FittedModel
from cfusion.training.inference import BagSet, open_shards, predict_logits, prediction_frame
from cfusion.training.runtime import Runtime
from cfusion.types import BagBatch, magnification_name


def predict(
    model: FittedModel, data: DataConfig, cases: Sequence[str] | Mapping[str, Sequence[str]], *, micro_batch: int = 1
) -> pd.DataFrame:
    """Risk and survival curve of each patient, computed once each at any number of processes.

    Args:
        model: A trained model, as `fit` or `FittedModel.load` gives it.
        data: Where the shards are and how they are read.
        cases: Patients, or their slides by patient. The slides of a patient given by name alone are those whose name
            is the patient's or begins with it and a hyphen, as TCGA's barcodes do.
        micro_batch: Bags in one forward pass.

    Returns:
        One row per patient: `case_id, risk, survival_1…K, edge_1…K`.

    Raises:
        DataError: The shards are of another encoder or width, or a patient has no slide in them.
    """
    dataset = open_shards(data)
    if (dataset.index.encoder, dataset.index.dim) != (model.card.encoder, model.card.backbone_dim):
        raise DataError(
            f"{data.shards}: holds embeddings of {dataset.index.encoder} ({dataset.index.dim} wide), but the model "
            f"reads {model.card.encoder} ({model.card.backbone_dim} wide).",
            "Embed the slides with the model's encoder.",
            topic="encoder",
        )
    slides = cases if isinstance(cases, Mapping) else slides_by_name(cases, dataset.slide_ids)
    runtime = Runtime.start(ParallelConfig(global_batch=Runtime.launched()))
    bags = BagSet.open(dataset, slides, data, runtime, magnifications=model.card.magnifications)
    model.module.to(device=runtime.device, dtype=runtime.dtype)
    return prediction_frame(predict_logits(runtime, model.module, bags, micro_batch), bags, model.bins)


def slides_by_name(cases: Sequence[str], slide_ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The slides whose name is the patient's, or begins with it and a hyphen.

    Raises:
        DataError: A patient has none.
    """
    found = {case: tuple(s for s in slide_ids if s == case or s.startswith(f"{case}-")) for case in cases}
    missing = [case for case, slides in found.items() if not slides]
    if missing:
        raise DataError(
            f"No slide in the shards is named after {len(missing)} of {len(found)} patients: {', '.join(missing[:5])}.",
            "Give the slides of each patient as a mapping, or pack the missing slides.",
        )
    return found


@dataclass(frozen=True)
class FoldEnsemble:
    """The models of all folds of a cross-validation, which together predict for patients none of them has seen."""

    models: tuple[FittedModel, ...]

    @classmethod
    def load(cls, folder: Path) -> FoldEnsemble:
        """Read every fold's model below `folder`.

        Raises:
            DataError: There is none, or they do not read the same embeddings.
        """
        models = tuple(FittedModel.load(path) for path in cls.folders(folder))
        if not models:
            raise DataError(f"{folder}: holds no model.json.", "Give the folder of a finished run.")
        if len({(m.card.encoder, m.card.backbone_dim, m.card.magnifications) for m in models}) > 1:
            raise DataError(f"{folder}: its models read different embeddings.", topic="encoder")
        return cls(models)

    @staticmethod
    def folders(folder: Path) -> list[Path]:
        """The folders of the fold models below `folder`, sorted."""
        return sorted(path.parent for path in folder.glob("**/model.json"))

    @property
    def risk_cutoff(self) -> float | None:
        """Mean of the folds' cut-offs, as its risk is the mean of theirs; above it is the high-risk group."""
        cutoffs = [model.card.risk_cutoff for model in self.models if model.card.risk_cutoff is not None]
        return float(np.mean(cutoffs)) if len(cutoffs) == len(self.models) else None

    def predict_bag(self, features: Mapping[str, np.ndarray]) -> pd.DataFrame:
        """Risk and survival of one bag.

        Args:
            features: Per magnification name, f32 [tile, dim].

        Returns:
            One row per month at which some model's time bin ends: `months`, `survival` (mean over folds), and, the
            same in each row, `risk` (mean over folds) and `risk_sd` (over folds).
        """
        card = self.models[0].card
        names = [magnification_name(m) for m in card.magnifications]
        batch = BagBatch({name: torch.as_tensor(np.array(features[name], dtype=np.float32))[None] for name in names})
        with torch.inference_mode():
            outputs = [m.module(batch) for m in self.models]
        months = np.unique(np.concatenate([m.bins.right_edges_months for m in self.models]))
        curves = [
            _step_curve(m.bins.right_edges_months, output.survival[0].double().numpy(), months)
            for m, output in zip(self.models, outputs, strict=True)
        ]
        risks = np.array([output.risk.item() for output in outputs])
        return pd.DataFrame(
            {"months": months, "survival": np.mean(curves, axis=0), "risk": risks.mean(), "risk_sd": risks.std()}
        )


def _step_curve(edges: Sequence[float], survival: np.ndarray, months: np.ndarray) -> np.ndarray:
    """A discrete survival curve at other times: it holds the value of the last bin that has ended, 1 before any."""
    return np.concatenate([[1.0], survival])[np.searchsorted(edges, months, side="right")]

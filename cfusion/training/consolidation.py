"""Turns a checkpoint, written by any number of processes, into one model with plain weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from cfusion.config import ModelConfig, validate
from cfusion.errors import CheckpointError, DataError
from cfusion.training.checkpoint import best_of
from cfusion.training.checkpoint_files import Stored, open_checkpoint
from cfusion.training.checkpoint_policy import kept_checkpoints
from cfusion.training.fitted import FittedModel, ModelCard, build, saved_code

logger = logging.getLogger(__name__)


def consolidate(
    folder: Path, weights: Literal["best", "last"] = "best", *, trust_code: str | None = None
) -> FittedModel:
    """Assemble the weights of the newest complete checkpoint of a training run.

    Args:
        folder: Checkpoints of the run, such as `RUN/checkpoints/fold_0`.
        weights: `best`: the best epoch so far; `last`: the last step, averaged if training averages.
        trust_code: Digest of the model's code file, if it has one (see `FittedModel.load`). Checkpoints do not hold
            the file: it is read from the path in `model.name`.

    Raises:
        CheckpointError: There is no checkpoint, none is complete, none has a best epoch, or its card is invalid.
        UntrustedCodeError: The model is in a user's file, and `trust_code` does not match it.
    """
    steps = kept_checkpoints(folder)
    if not steps:
        raise CheckpointError(
            f"{folder}: holds no checkpoints.", "Give the folder of one fold, such as RUN/checkpoints/fold_0."
        )
    problem = ""
    for step in steps:
        try:
            with open_checkpoint(step) as stored:
                return _model(folder, stored, weights, trust_code)
        except _NoBestError:
            raise
        except DataError as error:
            problem = problem or str(error)
            logger.warning("%s", error)
    raise CheckpointError(problem, "No checkpoint is complete.")


class _NoBestError(CheckpointError):
    """No epoch has been chosen as the best yet."""


def _model(folder: Path, stored: Stored, weights: str, trust_code: str | None) -> FittedModel:
    if weights == "last":
        averaged = any(key.startswith("average/") for key in stored.shapes)
        return _fitted(stored, "average/" if averaged else "model/", trust_code)
    best = best_of(folder, stored.numbers)
    if best is None:
        raise _NoBestError(f"{stored.folder}: no epoch has been chosen yet.", "Use --weights last.")
    with open_checkpoint(best) as chosen:
        return _fitted(chosen, "model/", trust_code)


def _fitted(stored: Stored, prefix: str, trust_code: str | None) -> FittedModel:
    try:
        card = TypeAdapter(ModelCard).validate_python(stored.numbers["card"])
    except ValidationError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{stored.folder}: has no valid model card ({reason}).") from error
    config = validate(ModelConfig, card.model, str(stored.folder))
    code = saved_code(stored.folder, card, trust_code, None)
    module = build(config, card.backbone_dim, len(card.edges_months) - 1, card.magnifications, code)
    tensors: dict[str, Tensor] = {
        key.removeprefix(prefix): stored.complete(key) for key in stored.shapes if key.startswith(prefix)
    }
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{stored.folder}: the weights do not fit their card ({error}).") from error
    return FittedModel(module.eval(), card, None if code is None else code.source)

"""Gated attention MIL with the weights of several models at once: their products over one bag are one wide product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cfusion.models.baselines import AMIL
from cfusion.types import BagBatch


def stacked(models: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the parameters of models of equal shapes, [model, …] each, without their history."""
    named = [dict(model.named_parameters()) for model in models]
    return {name: torch.stack([parameters[name].detach() for parameters in named]) for name in named[0]}


def wide_logits(model: AMIL, parameters: Mapping[str, Tensor], batch: BagBatch) -> Float[Tensor, "model 1 bin"]:
    """Return the logits of one bag, without padding, by each of the models.

    Args:
        model: One of them, which checks the bag.
        parameters: Their parameters, as `stacked` returns them.
        batch: The bag.

    Raises:
        DataError: As the model does.
    """
    (tiles,) = model.inputs(batch).values()
    embed, gate = parameters["embed.0.weight"], parameters["gate.weight"]
    count, width = embed.shape[:2]
    # The models read the same tiles, so this one is a single product of all their columns.
    hidden = F.linear(tiles[0], embed.flatten(0, 1), parameters["embed.0.bias"].flatten()).relu()
    hidden = hidden.view(-1, count, width).transpose(0, 1)
    content, gated = torch.baddbmm(parameters["gate.bias"][:, None], hidden, gate.mT).chunk(2, dim=2)
    scores = torch.baddbmm(
        parameters["score.bias"][:, None], content.tanh() * gated.sigmoid(), parameters["score.weight"].mT
    )
    pooled = scores.mT.softmax(dim=2) @ hidden
    return torch.baddbmm(parameters["head.bias"][:, None], pooled, parameters["head.weight"].mT)

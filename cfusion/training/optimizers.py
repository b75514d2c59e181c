"""Adam and AdamW of torch without the import of its compiler.

`torch.optim` wraps the methods of an optimizer for `torch.compile`, and the wrappers import the compiler at their first
call: 2 s of every start, more than a small run trains. The methods below are torch's own without these wrappers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cfusion.config import TrainConfig


def _bare(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method within its wrappers, or itself in a version of torch without them."""
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    return method


class _Adam(torch.optim.Adam):
    add_param_group = _bare(torch.optim.Optimizer.add_param_group)
    load_state_dict = _bare(torch.optim.Optimizer.load_state_dict)
    state_dict = _bare(torch.optim.Optimizer.state_dict)
    zero_grad = _bare(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(_bare(torch.optim.Adam.step))


class _AdamW(_Adam, torch.optim.AdamW):
    """Adam with decoupled decay; `step` is Adam's, as torch's own AdamW has it."""


def make_optimizer(model: torch.nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Create the optimizer of `train`; its learning rate is set from `learning_rate` before every step."""
    kind = _AdamW if train.optimizer == "adamw" else _Adam
    fused = True if train.fused_optimizer else None  # None: torch's choice
    return kind(model.parameters(), lr=train.lr, weight_decay=train.weight_decay, fused=fused)

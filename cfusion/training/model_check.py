"""Tests a model that is not the program's on a small synthetic bag before training starts.

The checks cover what training, prediction and serving rely on: the arguments, the output's type and shape, finite
values, and that padding does not change a bag's output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cfusion.config import Config
from cfusion.data.batches import join, pack
from cfusion.errors import ConfigError
from cfusion.extensions import OwnCode
from cfusion.models.bag import check_packs
from cfusion.models.registry import model_code
from cfusion.training.fitted import build
from cfusion.types import BagBatch, SurvivalOutput, magnification_name

_TILES = (2, 3)
"""Tiles of two synthetic bags at the coarsest magnification."""

_TOLERANCE = 1e-3
"""Largest difference of a logit, relative to 1 + its size, between a single bag and the same bag padded."""


def check_own_model(config: Config, dim: int) -> OwnCode | None:
    """Build the model of a run and test it, if its code is not the program's.

    Args:
        config: The run.
        dim: Width of the embeddings.

    Returns:
        The code; None for a model of the program, which is not tested.

    Raises:
        ConfigError: The model does not import, does not take the arguments, fails on a bag, or does not return a
            finite `SurvivalOutput`. The message names file and line.
    """
    code = model_code(config.model.name)
    if code is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _Trial(config, code, dim).run()
    return code


class _Trial:
    """A model and synthetic bags for it."""

    def __init__(self, config: Config, code: OwnCode, dim: int) -> None:
        self._config, self._code, self._dim = config, code, dim
        self._bins = config.evaluation.n_bins
        self._magnifications = sorted(config.data.magnifications)  # from coarse to fine

    def run(self) -> None:
        module = self._built()
        bags = [self._bag(tiles) for tiles in _TILES]
        module.train()
        self._trained(module, bags[0])
        module.eval()
        with torch.inference_mode():
            single = [self._output(module, bag).logits for bag in bags]
            train = self._config.train
            if train.micro_batch > 1 or self._config.data.token_budget is not None:
                self._check_padding(module, bags, torch.cat(single))

    def _built(self) -> nn.Module:
        config = self._config
        try:
            module = build(config.model, self._dim, self._bins, config.data.magnifications, self._code)
        except ConfigError:
            raise
        except Exception as error:
            raise self._refused(error, "cannot be built") from error
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise self._wrong(module, "has no parameter to train", "Make its layers attributes in __init__.")
        return module

    def _bag(self, tiles: int) -> BagBatch:
        features, positions = {}, {}
        for step, magnification in enumerate(self._magnifications):
            count, name = tiles * 4**step, magnification_name(magnification)
            features[name] = torch.randn(1, count, self._dim)
            positions[name] = torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.long)], dim=1)[None]
        return BagBatch(features, None, positions, ("made-up",))

    def _trained(self, module: nn.Module, bag: BagBatch) -> None:
        output = self._output(module, bag)
        try:
            output.logits.square().sum().backward()
        except Exception as error:
            raise self._refused(error, "cannot be trained") from error
        for name, parameter in module.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise self._wrong(module, f"has a gradient of {name} that is not finite")

    def _output(self, module: nn.Module, batch: BagBatch) -> SurvivalOutput:
        try:
            output = module(batch)
        except KeyError as error:
            offered = ", ".join(batch.features)
            raise self._refused(error, f"failed on a synthetic bag with {offered}") from error
        except Exception as error:
            raise self._refused(error, "failed on a synthetic bag") from error
        if not isinstance(output, SurvivalOutput):
            raise self._wrong(
                module,
                f"returned a {type(output).__name__}",
                "Return cfusion.types.SurvivalOutput.from_logits(…).",
            )
        shapes = {"logits": (len(batch), self._bins), "survival": (len(batch), self._bins), "risk": (len(batch),)}
        for name, expected in shapes.items():
            value = getattr(output, name)
            if tuple(value.shape) != expected:
                raise self._wrong(
                    module, f"returned {name} of shape {list(value.shape)}; expected {list(expected)}",
                    "Return SurvivalOutput.from_logits of logits [bag, n_bins].",
                )  # fmt: skip
            if not torch.isfinite(value).all():
                raise self._wrong(module, f"returned {name} that are not finite")
        return output

    def _check_padding(self, module: nn.Module, bags: Sequence[BagBatch], single: torch.Tensor) -> None:
        if self._config.train.packed:
            check_packs(module)
        together = self._output(module, (pack if self._config.train.packed else join)(bags)).logits
        worst = ((together - single).abs() / (1 + single.abs())).max().item()
        if worst > _TOLERANCE:
            raise self._wrong(
                module, f"returned different logits for a bag when it is padded (difference {worst:.2g})",
                "Ignore tiles whose BagBatch.masks entry is false, or set train.micro_batch=1 without "
                "data.token_budget.",
            )  # fmt: skip

    def _refused(self, error: Exception, what: str) -> ConfigError:
        return ConfigError(
            f"{self._code.where(error)}: {self._code.attribute} {what} ({type(error).__name__}: {error}).",
            "See `cfusion help own-model` for a model's arguments and return value.",
            topic="own-model",
        )

    def _wrong(self, module: nn.Module, what: str, remedy: str = "") -> ConfigError:
        place = f"{self._code.path}:{line}" if (line := _line(module, self._code)) else str(self._code.path)
        return ConfigError(f"{place}: {self._code.attribute} {what}.", remedy, topic="own-model")


def _line(module: nn.Module, code: OwnCode) -> int | None:
    """Return the line in the model's file where its forward pass starts, or else its class or function."""
    where = [vars(kind) for kind in type(module).__mro__]
    found = [members[name] for members in where for name in ("survival_of", "survival", "forward") if name in members]
    for function in [*found, code.load()]:
        inside = getattr(function, "__code__", None)
        if inside is not None and inside.co_filename == str(code.path):
            return int(inside.co_firstlineno)
    return None

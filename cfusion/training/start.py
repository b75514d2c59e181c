"""Starts a fold from a trained model: reads its weights, and refuses a model that does not fit or has seen too much.

Only the card, the weights and the digests of the patients are read. No code that came with the model is run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cfusion.config import Config
from cfusion.data.encoder_names import encoder_name
from cfusion.data.joined_shards import made_otherwise
from cfusion.data.shard_index import ShardIndex
from cfusion.errors import ConfigError, DataError
from cfusion.files import digest_file
from cfusion.models.bag import Prepared
from cfusion.run_folder import CARD, REGISTRY, SEEN, WEIGHTS, find_run, fold_models, is_done, is_run
from cfusion.training.fitted import ModelCard, read_card
from cfusion.training.seen import Seen, digest_case
from cfusion.types import Split, magnification_name

logger = logging.getLogger(__name__)

_SHOWN = 3


@dataclass(frozen=True, eq=False)
class StartModel:
    """A trained model that a fold starts from.

    Attributes:
        where: Its folder, for messages.
        card: Its card.
        tensors: Its weights by name.
        seen: The patients it was trained on; None if it does not record them.
        sha256: Digest of its weights.
    """

    where: str
    card: ModelCard
    tensors: dict[str, Tensor]
    seen: Seen | None
    sha256: str

    @classmethod
    def read(cls, folder: Path) -> StartModel:
        """Read a folder that `FittedModel.save` wrote.

        Raises:
            DataError: A file is missing or damaged.
        """
        card = read_card(folder)
        try:
            tensors = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            words = " ".join(str(error).split())[:200]
            raise DataError(f"{folder / WEIGHTS}: the weights do not load ({words}).", topic="start") from error
        seen = Seen.load(folder / SEEN) if (folder / SEEN).is_file() else None
        return cls(str(folder), card, tensors, seen, digest_file(folder / WEIGHTS))

    @property
    def records_patients(self) -> bool:
        """Whether all patients of its training are known, also those of the models that it started from."""
        return self.seen is not None and self.card.start.get("patients") != "unknown"

    @property
    def origin(self) -> dict[str, Any]:
        """What the card of a model that starts from it says of it."""
        return {
            "model": self.card.model["name"], "cohort": self.card.cohort, "fold": self.card.fold,
            "sha256": self.sha256, "patients": "recorded" if self.records_patients else "unknown",
        }  # fmt: skip

    def seen_with(self, own: Seen) -> Seen:
        """Return what a model that started from it has seen: also the patients of this one."""
        return own if self.seen is None else own.with_patients(self.seen.digests)

    def fill(self, network: nn.Module) -> None:
        """Give a network its weights. Buffers that hold times of the fold's own bins stay.

        Raises:
            ConfigError: The weights do not fit.
        """
        own = network.in_months if isinstance(network, Prepared) else ()
        self.check_shapes(network)
        with torch.no_grad():
            for name, tensor in network.state_dict(keep_vars=True).items():
                if name not in own:
                    tensor.copy_(self.tensors[name])

    def check_shapes(self, network: nn.Module) -> None:
        """Refuse weights that do not fit a network.

        Raises:
            ConfigError: A name is missing in one of them, or a shape differs; both shapes are named.
        """
        here = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        there = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        wrong = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        if wrong:
            shown = "; ".join(
                f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
                for name in wrong[:_SHOWN]
            )
            more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise ConfigError(
                f"train.start_from: the weights of {self.where} ({self.card.model['name']}) do not fit: {shown}{more}.",
                "Set `model` and evaluation.n_bins as in its model.json, or start from another model.",
                topic="start",
            )

    def check_inputs(self, config: Config, index: ShardIndex) -> None:
        """Refuse a model of other embeddings or magnifications.

        Raises:
            ConfigError: It reads others than the run.
        """
        card = self.card
        reads = [magnification_name(m) for m in card.magnifications]
        problem = made_otherwise(card.embeddings, index.provenance)
        if (encoder_name(card.encoder), card.backbone_dim) != (encoder_name(index.encoder), index.dim):
            problem = (
                f"embeddings of {index.encoder} ({index.dim} wide) here and of {card.encoder} ({card.backbone_dim} "
                "wide) there"
            )
        elif card.magnifications != config.data.magnifications:
            own = [magnification_name(m) for m in config.data.magnifications]
            problem = f"magnifications {', '.join(own)} here and {', '.join(reads)} there"
        if problem:
            raise ConfigError(
                f"train.start_from: {self.where} reads other data: {problem}.",
                "Start from a model of the same encoder and magnifications.",
                topic="start",
            )

    def check_unseen(self, split: Split, *, unchecked: bool) -> None:
        """Refuse a model that was trained on a patient whom a fold scores, or that does not record its patients.

        Args:
            split: The fold.
            unchecked: Only warn (`train.start_unchecked`).

        Raises:
            DataError: It was, or it does not.
        """
        digests = frozenset[str]() if self.seen is None else self.seen.digests
        known = sorted(case for case in split.test if digest_case(case) in digests)
        if known:
            problem = (
                f"was trained on {len(known)} of the {len(split.test)} patients that fold {split.fold} scores, such as "
                f"{known[0]}"
            )
        elif not self.records_patients:
            problem = "does not record all patients of its training, so they cannot be compared with those scored"
        else:
            return
        if not unchecked:
            raise DataError(
                f"train.start_from: {self.where} {problem}.",
                "Start from a model of other patients, or from a run on the same folds, whose model of the same fold "
                "is used. train.start_unchecked=true starts nevertheless, and every output says so.",
                topic="start",
            )
        logger.warning("train.start_from: %s %s; the scores of fold %d may be optimistic", self.where, problem,
                       split.fold)  # fmt: skip


def read_starts(place: str) -> tuple[StartModel, ...]:
    """Read the models at a folder: one, or those of the folds of a finished run.

    Args:
        place: `train.start_from`.

    Raises:
        ConfigError: It is the address of a registered model, which only a run can fetch.
        DataError: There is no model, the run is not finished, or a file is damaged.
    """
    if place.startswith(REGISTRY):
        raise ConfigError(
            f"train.start_from={place}: fit reads folders only.",
            "Use cross_validate or cfusion train, which fetch registered models, or give the folder of a run.",
            topic="start",
        )
    folder = Path(place)
    if (folder / CARD).is_file():
        return (StartModel.read(folder),)
    run = find_run(folder)
    if is_run(run) and folder == run and not is_done(run):
        raise DataError(
            f"train.start_from={place}: its run is not finished.",
            "Finish it, or give the folder of one of its folds.",
            topic="start",
        )
    models = fold_models(folder) if folder.is_dir() else []
    if not models:
        raise DataError(
            f"train.start_from={place}: holds no {CARD}.",
            "Give the folder of a trained model or of a finished run.",
            topic="start",
        )
    return tuple(StartModel.read(model) for model in models)


def start_of(starts: Sequence[StartModel], split: Split) -> StartModel | None:
    """Return the model that a fold starts from: the only one, or the one of the same number; None without any.

    A run on the same folds has not trained its model of a number on the patients that the fold of that number scores.

    Raises:
        ConfigError: None of several has the number, or more than one has.
    """
    if len(starts) < 2:
        return starts[0] if starts else None
    found = [start for start in starts if start.card.fold == split.fold]
    if len(found) == 1:
        return found[0]
    numbers = ", ".join(str(start.card.fold) for start in starts)
    raise ConfigError(
        f"train.start_from: {len(found)} of the {len(starts)} models are of fold {split.fold} (folds {numbers}); "
        "expected one.",
        "Give the folder of one model, or a run with the same folds and one repeat.",
        topic="start",
    )


def check_starts(
    config: Config, starts: Sequence[StartModel], splits: Sequence[Split], index: ShardIndex, network: nn.Module
) -> None:
    """Check before a training that each fold can start from its model.

    Raises:
        ConfigError, DataError: A model does not fit, or has seen scored patients.
    """
    for split in splits:
        start = start_of(starts, split)
        if start is not None:
            start.check_inputs(config, index)
            start.check_shapes(network)
            start.check_unseen(split, unchecked=config.train.start_unchecked)

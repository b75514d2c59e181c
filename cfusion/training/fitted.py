"""A trained model with everything needed to use it: weights, shape, time bins, and the embeddings it expects."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cfusion.config import ModelConfig, validate
from cfusion.errors import ConfigError, DataError, nearest
from cfusion.extensions import OwnCode, check_trusted, file_code, names_file, package_code
from cfusion.files import atomic_path, check_format, read_json, write_json
from cfusion.models import MODELS, build_model
from cfusion.run_folder import CARD, SEEN, WEIGHTS
from cfusion.survival.bins import TimeBins
from cfusion.training.seen import Seen
from cfusion.types import magnification_name, magnification_words

logger = logging.getLogger(__name__)

SOURCE = "model.py"
"""File in a model's folder with the model's code, if it is not the program's."""


@dataclass(frozen=True)
class StratumCard:
    """What a model of several cohorts has for each of them.

    Attributes:
        edges_months: Edges of the K time bins of the cohort, K + 1 values.
        risk_cutoff: Median risk of its training patients; None if the training did not finish.
    """

    edges_months: tuple[float, ...]
    risk_cutoff: float | None = None


@dataclass(frozen=True)
class ModelCard:
    """Description of a model and of its inputs.

    Attributes:
        model: The `model` section it was built from.
        backbone_dim: Width of the embeddings it reads.
        magnifications: Magnifications it reads, finest first.
        edges_months: Edges of its K time bins, K + 1 values; of a model of several cohorts, the mean of theirs, a
            stand-in for a patient of none of them.
        encoder: Encoder of the embeddings, as named in the shards.
        cohort: Cohort it was trained on.
        endpoint: Definition of its event.
        fold: Number of its fold.
        risk_cutoff: Median risk of its training patients; at or above it is the high-risk group. None if
            its training did not finish.
        embeddings: How the embeddings were made, from the shards: weight digest, transform, resample filter, …
        unit: What a bag was in training; if slides, a patient's risks are averaged.
        protocol: How its epoch was chosen, as in `evaluation.protocol`.
        code: Code that is not the program's, as recorded by `OwnCode.identity`; None for a model of the program.
        notes: What a reader of its scores must know about its training, see `Config.notes`.
        strata: Time bins and cut-off of each cohort, by its name, of a model of several; empty otherwise.
        start: The model that its training started from, see `StartModel.origin`; empty if from drawn weights.
    """

    model: dict[str, Any]
    backbone_dim: int
    magnifications: tuple[float, ...]
    edges_months: tuple[float, ...]
    encoder: str
    cohort: str
    endpoint: str
    fold: int
    risk_cutoff: float | None
    embeddings: dict[str, Any] = field(default_factory=dict)
    unit: Literal["case", "slide"] = "case"
    protocol: str = "unknown"
    code: dict[str, str] | None = None
    notes: tuple[str, ...] = ()
    strata: dict[str, StratumCard] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)

    def of_cohort(self, name: str) -> ModelCard:
        """Return the card for patients of one of its cohorts, whose time bins and cut-off it then has.

        Raises:
            ConfigError: The model was not trained on a cohort of this name as one of several.
        """
        if name not in self.strata:
            known = ", ".join(self.strata) or f"only {self.cohort}"
            raise ConfigError(
                f"{name}: the model was not trained on this cohort; it has {known}.",
                nearest(name, self.strata) if self.strata else "Leave the cohort out.",
            )
        found = self.strata[name]
        return replace(self, edges_months=found.edges_months, risk_cutoff=found.risk_cutoff, strata={})

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Return the settings of `PreprocessConfig` that turn a slide into the embeddings it reads."""
        made: dict[str, Any] = {"encoders": (self.encoder,), "magnifications": self.magnifications}
        recorded = ("resolution", "resample", "min_tissue")
        return {**made, **{key: self.embeddings[key] for key in recorded if key in self.embeddings}}


_CARD = TypeAdapter(ModelCard)
_OPTIONAL = ("code", "notes", "strata", "start")
"""Attributes of a card that are written only if there is something to write."""

MODEL_FORMAT = 1
"""Format of a model's folder, as its card carries it; what 0.1.0 wrote carries none and is read as 1."""


@dataclass(frozen=True, repr=False)
class FittedModel:
    """A module and its card.

    Attributes:
        module: The network.
        card: Its description.
        source: The user's file with its class, if there is one.
        seen: The patients of its training; None for models from before this was recorded, and for those of unfinished
            trainings.
    """

    module: nn.Module
    card: ModelCard
    source: bytes | None = None
    seen: Seen | None = None

    def __repr__(self) -> str:
        card = self.card
        names = ", ".join(magnification_words(magnification_name(m)) for m in card.magnifications)
        return f"FittedModel({card.model['name']} of {card.cohort}, fold {card.fold}: reads {card.encoder} at {names})"

    def of_cohort(self, name: str) -> FittedModel:
        """Return the model for patients of one of the cohorts it was trained on; see `ModelCard.of_cohort`."""
        return replace(self, card=self.card.of_cohort(name))

    @property
    def bins(self) -> TimeBins:
        """Return the time bins of its survival curve."""
        return TimeBins(self.card.edges_months)

    def save(self, folder: Path) -> None:
        """Write `model.safetensors`, `model.json`, `training.npz` and, for a user's file, `model.py`, atomically.

        Raises:
            DataError: They cannot be written, for example on a full disk; nothing is left of them. Or the folder exists
                and has other content than a model.
        """
        if folder.is_dir() and any(folder.iterdir()) and not (folder / CARD).is_file():
            raise DataError(f"{folder}: exists and holds no model, so it is not replaced.", "Give another folder.")
        tensors = {name: tensor.contiguous() for name, tensor in self.module.state_dict().items()}
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            try:
                save_file(tensors, temporary / WEIGHTS)
            except SafetensorError as error:
                raise DataError(f"{folder}: the model cannot be written ({error}).", "Free disk space.") from error
            card = {"format": MODEL_FORMAT, **asdict(self.card)}
            write_json(temporary / CARD, {k: card[k] for k in card if card[k] or k not in _OPTIONAL})
            if self.source is not None:
                (temporary / SOURCE).write_bytes(self.source)
            if self.seen is not None:
                self.seen.save(temporary / SEEN)

    @classmethod
    def load(cls, folder: Path, *, trust_code: str | None = None) -> FittedModel:
        """Load a model written by `save`, in evaluation mode.

        Args:
            folder: The model's folder.
            trust_code: Run the code that came with the model if this is its SHA-256 or the first 12 or more digits of
                it. Models of the program or of an installed package do not need it.

        Raises:
            DataError: A file is missing or damaged, or the weights do not fit the card.
            UntrustedCodeError: The model comes with its code, and `trust_code` does not match it.
            ConfigError: The package with the model's class is not installed.
        """
        card = read_card(folder)
        config = validate(ModelConfig, card.model, str(folder / CARD))
        code = saved_code(folder, card, trust_code, folder / SOURCE)
        module = build(config, card.backbone_dim, len(card.edges_months) - 1, card.magnifications, code)
        try:
            module.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise DataError(f"{folder}: the weights do not load ({' '.join(str(error).split())[:200]}).") from error
        seen = Seen.load(folder / SEEN) if (folder / SEEN).is_file() else None
        return cls(module.eval(), card, None if code is None else code.source, seen)


def read_card(folder: Path) -> ModelCard:
    """Read the card of the model in a folder without running any of its code.

    Raises:
        DataError: It is missing or damaged, or a newer program wrote it.
    """
    try:
        values = read_json(folder / CARD)
        check_format(folder / CARD, values if isinstance(values, dict) else {}, MODEL_FORMAT)
        return _CARD.validate_python(values)
    except ValidationError as error:
        raise DataError(f"{folder / CARD}: is not a model card ({' '.join(str(error).split())}).") from error


def saved_code(where: Path, card: ModelCard, trust_code: str | None, copy: Path | None) -> OwnCode | None:
    """Return the code of a saved model without running it; None for a model of the program.

    Args:
        where: File or folder of the card, for messages.
        card: The card.
        trust_code: See `FittedModel.load`.
        copy: The model's file as saved with the card; None: the file that the model's name points to.

    Raises:
        DataError: The card records no code, or the file is missing or was edited.
        UntrustedCodeError: `trust_code` does not match the file.
        ConfigError: The package with the model's class is not installed.
    """
    name = str(card.model.get("name"))
    if card.code is None:
        if name not in MODELS:
            raise DataError(f"{where}: names the model {name}, which is not one of the program, and records no code.")
        return None
    if "distribution" in card.code:
        return _installed_code(name, card.code, where)
    if not names_file(name):
        raise DataError(f"{where}: names the model {name}; expected FILE.py:CLASS, since it records code.")
    if copy is not None and not copy.is_file():
        raise DataError(f"{copy}: is missing, the code of {name}.", "Copy the model's complete folder.")
    code = file_code(name, copy)
    check_trusted(code.path, code.digest, trust_code)
    if code.digest != card.code.get("sha256"):
        raise DataError(
            f"{code.path}: was edited after the model was saved: SHA-256 {code.digest}, recorded "
            f"{card.code.get('sha256')}.",
            "Restore the file, or train the model again.",
        )
    return code


def _installed_code(name: str, recorded: Mapping[str, str], where: Path) -> OwnCode:
    """Return the code of a saved model whose class is in an installed package.

    Raises:
        ConfigError: The package is not installed.
    """
    wanted = f"{recorded['distribution']} {recorded.get('version')}"
    code = package_code("cfusion.models", name)
    if code is None or code.package is None or code.package[0] != recorded["distribution"]:
        found = "none" if code is None or code.package is None else code.package[0]
        raise ConfigError(
            f"{where}: the model {name} is in the package {wanted}, which is not installed (found: {found}).",
            f"Install it: pip install '{recorded['distribution']}=={recorded.get('version')}'.",
            topic="own-model",
        )
    if code.identity != recorded:
        logger.warning("%s: was trained with %s; %s is installed.", where, wanted, " ".join(code.package))
    return code


def build(
    model: ModelConfig,
    backbone_dim: int,
    n_bins: int,
    magnifications: tuple[float, ...],
    code: OwnCode | None = None,
) -> nn.Module:
    """Build the network of a `model` section; `code` is its class if not the program's (None: found by its name)."""
    return build_model(
        model.name,
        backbone_dim=backbone_dim,
        n_bins=n_bins,
        embed_dim=model.embed_dim,
        num_heads=model.num_heads,
        num_layers=model.num_layers,
        magnifications=magnifications,
        source=model.source,
        code=code,
        **model.options,
    )

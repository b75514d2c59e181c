"""A trained model with all that is needed to use it: weights, shape, time bins, and the embeddings it reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cfusion.config import ModelConfig, validate
from cfusion.errors import DataError
from cfusion.files import atomic_path, write_json
from cfusion.models import build_model
from cfusion.survival.bins import TimeBins


@dataclass(frozen=True)
class ModelCard:
    """What a model is and what it may be given.

    Attributes:
        model: The `model` section it was built from.
        backbone_dim: Width of the embeddings it reads.
        magnifications: Those it reads, finest first.
        edges_months: Edges of its time bins, K + 1 of them.
        encoder: Encoder of the embeddings, as the shards name it.
        cohort: Cohort it was trained on.
        endpoint: What its event is.
        fold: Fold it belongs to.
        risk_cutoff: Median risk of its training patients; above it is the high-risk group. None where its training
            did not come to its end.
        embeddings: How the embeddings were made, as the shards tell it: weight digest, transform, resample filter, …
        unit: What a bag of its training was; of slides, a patient's risks are averaged.
        protocol: How its epoch was chosen, as `evaluation.protocol` names it.
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

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Settings of `PreprocessConfig` that make of a slide the embeddings it reads."""
        made: dict[str, Any] = {"encoders": (self.encoder,), "magnifications": self.magnifications}
        told = ("resolution", "resample", "min_tissue")
        return {**made, **{key: self.embeddings[key] for key in told if key in self.embeddings}}


_CARD = TypeAdapter(ModelCard)


@dataclass(frozen=True, repr=False)
class FittedModel:
    """A module and its card."""

    module: nn.Module
    card: ModelCard

    def __repr__(self) -> str:
        card = self.card
        names = ", ".join(f"{m:g}x" for m in card.magnifications)
        return f"FittedModel({card.model['name']} of {card.cohort}, fold {card.fold}: reads {card.encoder} at {names})"

    @property
    def bins(self) -> TimeBins:
        """The time bins of its survival curve."""
        return TimeBins(self.card.edges_months)

    def save(self, folder: Path) -> None:
        """Write `model.safetensors` and `model.json`, atomically.

        Raises:
            DataError: They cannot be written, as on a full disk; nothing is left of them.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self.module.state_dict().items()}
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            try:
                save_file(tensors, temporary / "model.safetensors")
            except SafetensorError as error:
                raise DataError(f"{folder}: the model cannot be written ({error}).", "Make room there.") from error
            write_json(temporary / "model.json", asdict(self.card))

    @classmethod
    def load(cls, folder: Path) -> FittedModel:
        """Read what `save` wrote, in evaluation mode.

        Raises:
            DataError: A file is missing or damaged, or the weights do not fit the card.
        """
        try:
            card = _CARD.validate_json((folder / "model.json").read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise DataError(
                f"{folder / 'model.json'}: is not a model card ({' '.join(str(error).split())})."
            ) from error
        config = validate(ModelConfig, card.model, str(folder / "model.json"))
        module = build(config, card.backbone_dim, len(card.edges_months) - 1, card.magnifications)
        try:
            module.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise DataError(f"{folder}: the weights do not load ({' '.join(str(error).split())[:200]}).") from error
        return cls(module.eval(), card)


def build(model: ModelConfig, backbone_dim: int, n_bins: int, magnifications: tuple[float, ...]) -> nn.Module:
    """The network of a `model` section."""
    return build_model(
        model.name,
        backbone_dim=backbone_dim,
        n_bins=n_bins,
        embed_dim=model.embed_dim,
        num_heads=model.num_heads,
        num_layers=model.num_layers,
        magnifications=magnifications,
        source=model.source,
        **model.options,
    )

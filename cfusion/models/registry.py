"""Build models by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from cfusion.errors import ConfigError, nearest
from cfusion.extensions import OwnCode, file_code, names_file, package_code, package_names
from cfusion.models.abmil import ABMIL
from cfusion.models.baselines import AMIL, DSMIL, MeanMIL
from cfusion.models.crossfusion import CrossFusion
from cfusion.models.csmil import CSMIL
from cfusion.models.deepgraphconv import DeepGraphConv
from cfusion.models.hipt import HIPT
from cfusion.models.mustmil import MuSTMIL
from cfusion.models.panther import PANTHER
from cfusion.models.patchgcn import PatchGCN
from cfusion.models.protosurv import ProtoSurv
from cfusion.models.scmil import SCMIL
from cfusion.models.transmil import TransMIL
from cfusion.models.zoommil import ZoomMIL
from cfusion.types import magnification_name

Builder = Callable[..., nn.Module]

PUBLISHED_ATTENTION_DROPOUT = 0.2
"""Of the self-attention weights, in the published program."""


def build_model(
    name: str,
    *,
    backbone_dim: int,
    n_bins: int = 4,
    embed_dim: int = 512,
    num_heads: int = 4,
    num_layers: int = 1,
    magnifications: Sequence[float] = (20, 10, 5),
    source: float = 10,
    published: bool = False,
    code: OwnCode | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model with fresh weights.

    The default trains without dropout of attention weights; other dropouts are the paper's (.3 in CrossFusion's
    feed-forwards and convolution, .1 in TransMIL's attention output). All are off in evaluation.

    Args:
        name: A key of `MODELS`, `FILE.py:CLASS`, or an entry point `cfusion.models` of an installed package.
        backbone_dim: Width of the tile embeddings.
        n_bins: Time bins of the hazard.
        embed_dim: Width of the tokens.
        num_heads: Attention heads of CrossFusion; must divide `embed_dim`.
        num_layers: Blocks on each side of every position encoding of CrossFusion.
        magnifications: Those the data offer. CrossFusion and ZoomMIL read all, the others the finest.
        source: Magnification whose tokens set CrossFusion's grid; the others are its context.
        published: Train as the published program does: attention dropout .2, DSMIL's instance stream untrained.
        code: The model's code where it is not the program's; None: found by its name.
        options: Of one model. CrossFusion and its variants: `grid` (`file` or `spatial`: tiles on a square in the order
            of their file, or where they lie in the tissue), `windows` (sizes of the convolutions, [7, 5, 3]),
            `position` (`ppeg` or `none`: position encoding), `dropout`, `attention_dropout`. TransMIL: `dropout`.
            The rest: see their classes.

    Returns:
        A module that takes a `BagBatch`, or [bag, tile, dim] tensors from coarse to fine, and returns `SurvivalOutput`.

    Raises:
        ConfigError: No such model, no such option, values that do not fit together, or code that does not import.
    """
    code = code or model_code(name)
    builder = MODELS[name] if code is None else code.load()
    sizes = {
        "backbone_dim": backbone_dim, "n_bins": n_bins, "embed_dim": embed_dim, "num_heads": num_heads,
        "num_layers": num_layers,
    }  # fmt: skip
    for size, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{size}={value}: expected at least 1.")
    shape = {**sizes, "magnifications": tuple(magnifications), "source": source, "published": published}
    module: object = builder(**_arguments(name, builder, shape, options))
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"model.name={name}: gives a {type(module).__name__}.", "Return a torch.nn.Module.", topic="own-model"
        )
    return module


def _arguments(name: str, builder: Builder, shape: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments of `shape` that the builder takes, with its options."""
    parameters = inspect.signature(builder).parameters
    by_keyword = [p for p in parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = [p.name for p in by_keyword if p.name not in shape]
    for option in options:
        if option not in known:
            raise ConfigError(f"model.options.{option}: {name} has no such option.", nearest(option, known))
    for parameter in by_keyword:
        if parameter.default is parameter.empty and parameter.name not in {*shape, *options}:
            raise ConfigError(
                f"model.name={name}: its argument {parameter.name} has no value.",
                f"Set model.options.{parameter.name}, or give the argument a default. The program gives "
                f"{', '.join(shape)}.",
                topic="own-model",
            )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {**{k: v for k, v in shape.items() if takes_all or k in parameters}, **options}


def model_code(name: str) -> OwnCode | None:
    """Find the code of a model that is not the program's; None for a key of `MODELS`.

    Raises:
        ConfigError: No such model, or its file or package cannot be read.
    """
    if name in MODELS:
        return None
    if names_file(name):
        return file_code(name)
    code = package_code("cfusion.models", name)
    if code is None:
        hint = nearest(name, [*MODELS, *package_names("cfusion.models")])
        if ":" in name or name.endswith(".py"):
            hint = "A model in a file is named FILE.py:CLASS."
        raise ConfigError(f"model.name={name!r}: no such model.", hint)
    return code


def _crossfusion(mixer: Literal["conv", "concat"], finest_only: bool = False) -> Builder:
    def build(
        *,
        magnifications: Sequence[float],
        source: float,
        published: bool,
        grid: str = "file",
        windows: object = None,
        position: str = "ppeg",
        dropout: float = 0.3,
        attention_dropout: float | None = None,
        **shape: Any,
    ) -> nn.Module:
        if attention_dropout is None:
            attention_dropout = PUBLISHED_ATTENTION_DROPOUT if published else 0.0
        reads = (max(magnifications),) if finest_only else magnifications
        return CrossFusion(
            reads=reads, offered=magnifications, source=reads[0] if finest_only else source, mixer=mixer, grid=grid,
            windows=windows, position=position, dropout=dropout, attention_dropout=attention_dropout, **shape,
        )  # fmt: skip

    return build


MODELS: dict[str, Builder] = {
    "crossfusion": _crossfusion("conv"),
    "crossfusion_concat": _crossfusion("concat"),
    "crossfusion_single": _crossfusion("conv", finest_only=True),
    "amil": AMIL,
    "dsmil": DSMIL,
    "transmil": TransMIL,
    "mean_mil": MeanMIL,
    "abmil": ABMIL,
    "panther": PANTHER,
    "mustmil": MuSTMIL,
    "csmil": CSMIL,
    "scmil": SCMIL,
    "protosurv": ProtoSurv,
    "patchgcn": PatchGCN,
    "deepgraphconv": DeepGraphConv,
    "hipt": HIPT,
    "zoommil": ZoomMIL,
}
"""Builders of the program's own models by name. A builder is called by keywords with those of `build_model`'s shape
arguments that it names; its other parameters are the model's options."""

READ_ONE = frozenset(MODELS) - {"crossfusion", "crossfusion_concat", "mustmil", "csmil", "zoommil"}
"""Models that read only the finest magnification."""

SPATIAL_GRAPHS: dict[str, tuple[str, int]] = {
    "patchgcn": ("spatial", 8), "deepgraphconv": ("latent", 8), "protosurv": ("spatial", 4),
}  # fmt: skip
"""Models that can read a graph of nearest tiles, with their defaults of the options `edges` and `neighbours`."""


_PLACELESS = frozenset({"amil", "dsmil", "transmil", "mean_mil", "abmil", "panther"})
_GRIDS = frozenset({"crossfusion", "crossfusion_concat", "crossfusion_single"})


def reads_positions(name: str, options: Mapping[str, Any]) -> bool:
    """Return whether a model may read the positions of tiles, so that loaders can leave them out where none does.

    Args:
        name: As for `build_model`; a model that is not the program's may read them.
        options: The model's options.
    """
    return name not in _PLACELESS and (name not in _GRIDS or options.get("grid", "file") != "file")


def spatial_graph(name: str, magnifications: Sequence[float], options: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of neighbours per magnification name that a model reads, so that loaders can find them.

    Args:
        name: As for `build_model`.
        magnifications: Magnifications that the data offer.
        options: The model's options.
    """
    edges, neighbours = SPATIAL_GRAPHS.get(name, ("latent", 0))
    k = options.get("neighbours", neighbours)
    # A number that is none is refused when the model is built.
    if options.get("edges", edges) != "spatial" or not isinstance(k, int):
        return {}
    return {magnification_name(max(magnifications)): k}

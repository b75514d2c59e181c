"""Encoders turn tiles into embeddings. The name determines everything except the device."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from cfusion.errors import ConfigError
from cfusion.extensions import package_code, package_names
from preprocess.encoders.cards import CARDS
from preprocess.settings import PreprocessConfig

logger = logging.getLogger(__name__)

DEFAULT_TILES = 64
"""Tiles in a batch where there is no GPU whose memory could decide."""

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
"""Encoder names that are valid as a folder of the store."""


class Encoder(Protocol):
    """Turns tiles into embeddings.

    Attributes:
        name: Name in the registry.
        dim: Width of an embedding.
        identity: What the embeddings depend on, as JSON values: version, weight digest, transform, precision.
    """

    name: str
    dim: int
    identity: dict[str, Any]

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """Return embeddings f32 [n, dim] of tiles u8 [n, 256, 256, 3]."""
        ...


class StainTexture:
    """The untrained default: fixed statistics of stain and texture; no weights, nothing to download."""

    name = "stain-texture"

    def __init__(self) -> None:
        from preprocess import descriptor

        self._describe = descriptor.describe_tiles
        self.dim: int = descriptor.DIM
        self.identity: dict[str, Any] = {
            "version": str(descriptor.VERSION), "weights": "none (untrained)", "transform": "none", "precision": "f32",
        }  # fmt: skip

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """See `Encoder.encode`."""
        return self._describe(tiles)


def encoder_names() -> list[str]:
    """List all known names, those of installed packages last; any `timm:NAME` and `hf:OWNER/NAME` also works."""
    own = [StainTexture.name, *CARDS]
    return [*own, *(name for name in package_names("cfusion.encoders") if name not in own)]


def load_encoder(name: str, config: PreprocessConfig, device: str = "cpu") -> Encoder:
    """Load an encoder by name, with its weights, on `device`.

    Raises:
        ConfigError: No encoder has this name.
        DataError: Its weights are unavailable; the message gives licence, gate and remedy.
        MissingExtraError: timm is not installed.
    """
    if name == StainTexture.name:
        return StainTexture()
    if name not in CARDS and not name.startswith(("timm:", "hf:")):
        code = package_code("cfusion.encoders", name) if _PLAIN.fullmatch(name) else None
        if code is None:
            raise ConfigError(
                f"encoder {name!r} is unknown.",
                f"Known: {', '.join(encoder_names())}; or timm:NAME, or hf:OWNER/NAME.",
            )
        from preprocess.encoders.installed_encoders import PackagedEncoder

        return PackagedEncoder(code, config, device)
    from preprocess.encoders.networks import load_network

    return load_network(name, config, device)


def load_slots(config: PreprocessConfig) -> list[list[Encoder]]:
    """Load the encoders of `config` once for each device that encodes in parallel.

    With `upload_ahead`, a GPU's encoders are in two slots, so that two threads call them. If none of them is a network,
    they run in `config.threads` threads, because each uses one core.
    """
    if len(set(config.encoders)) != len(config.encoders) or not config.encoders:
        raise ConfigError(f"encoders {list(config.encoders)}: expected one or more names, each given once.")
    networks = [name for name in config.encoders if name != StainTexture.name]
    if len(networks) > 1 and config.weights is not None and config.weights.is_file():
        raise ConfigError(
            f"weights={config.weights}: one checkpoint for the encoders {', '.join(networks)}.",
            "Give a folder with one checkpoint for each, ENCODER.safetensors, or one encoder.",
        )
    if set(config.encoders) == {StainTexture.name}:
        return [[StainTexture()]] * config.threads
    slots: list[list[Encoder]] = []
    devices = _devices(config.devices)
    _set_f32(config, devices)
    for device in devices:
        loaded = [load_encoder(name, config, device) for name in config.encoders]
        slots += [loaded] * (2 if config.upload_ahead and device != "cpu" else 1)
    if config.tf32:
        _choose_tf32([encoder for slot in slots for encoder in slot])
    return slots


def _set_f32(config: PreprocessConfig, devices: Sequence[str]) -> None:
    """Make f32 mean single precision on a GPU.

    Raises:
        ConfigError: `tf32` is asked for without a GPU.
    """
    if all(device == "cpu" for device in devices):
        if config.tf32:
            raise ConfigError("--tf32 needs a GPU; the encoders run on a CPU.", "Leave it out.")
        return
    from cfusion.gpu_settings import let_segments_grow, set_tf32

    let_segments_grow()
    set_tf32(False)


def _choose_tf32(encoders: Sequence[Encoder]) -> None:
    """Use TF32 if it agrees with single precision for all encoders in f32, and record it; else say why not."""
    from cfusion.gpu_settings import set_tf32
    from preprocess.encoders.networks import LEAST_COSINE

    measured: dict[int, Any] = {id(e): e for e in encoders if getattr(e, "in_f32", False)}
    refused = [encoder.name for encoder in measured.values() if not encoder.agrees_in_tf32()]
    if refused:
        logger.warning(
            "--tf32 is not used: the embeddings of %s differ from single precision (cosine below %g).",
            ", ".join(dict.fromkeys(refused)), LEAST_COSINE,
        )  # fmt: skip
        return
    for encoder in measured.values():
        encoder.identity["precision"] = "tf32"
    set_tf32(bool(measured))


def tiles_per_batch(config: PreprocessConfig, slots: Sequence[Sequence[Encoder]]) -> int:
    """Return the size of a batch; `auto` measures what fits every GPU, by the encoder that needs most memory."""
    if config.batch_size != "auto":
        return config.batch_size
    encoders: dict[int, Any] = {id(encoder): encoder for slot in slots for encoder in slot}
    measured = [encoder.tiles_that_fit() for encoder in encoders.values() if hasattr(encoder, "tiles_that_fit")]
    fitting = [tiles for tiles in measured if tiles is not None]
    if not fitting:
        return DEFAULT_TILES
    tiles = max(1, min(fitting) // (2 if config.upload_ahead else 1))
    logger.info("--batch-size auto: %d tiles", tiles)
    return tiles


def _devices(wanted: Sequence[str]) -> Sequence[str]:
    import torch

    present = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in wanted:
        if device != "cpu" and device not in present:
            raise ConfigError(f"device {device!r} is unavailable.", f"Available: {', '.join(['cpu', *present])}.")
    return wanted or present or ["cpu"]

"""Encoders: what turns a tile into an embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from cfusion.errors import ConfigError


class Encoder(Protocol):
    """Turns tiles into embeddings.

    Attributes:
        name: Name in the registry.
        dim: Width of an embedding.
        identity: What the embeddings depend on: version, weight digest, transform, precision. JSON values.
    """

    name: str
    dim: int
    identity: dict[str, Any]

    def encode(self, tiles: np.ndarray, mpp: float) -> np.ndarray:
        """Embeddings f32 [n, dim] of tiles u8 [n, 256, 256, 3] at `mpp` µm/px."""
        ...


class StainTexture:
    """The untrained default: fixed statistics of stain and texture, no weights, nothing to download."""

    name = "stain-texture"

    def __init__(self) -> None:
        from preprocess import descriptor

        self._describe = descriptor.describe
        self.dim: int = descriptor.DIM
        self.identity: dict[str, Any] = {"version": str(descriptor.VERSION), "weights": "none", "transform": "none"}

    def encode(self, tiles: np.ndarray, mpp: float) -> np.ndarray:
        """See `Encoder.encode`."""
        return self._describe(tiles)


ENCODERS: dict[str, Callable[[], Encoder]] = {"stain-texture": StainTexture}
"""Loaders by name."""


def load_encoder(name: str) -> Encoder:
    """The encoder of this name, ready to encode.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in ENCODERS:
        raise ConfigError(f"encoder {name!r} is not known.", f"Known: {', '.join(ENCODERS)}.")
    return ENCODERS[name]()

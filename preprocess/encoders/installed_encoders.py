"""Encoders of installed packages (entry points `cfusion.encoders`), checked on synthetic tiles before use."""

from __future__ import annotations

from typing import Any

import numpy as np

from cfusion.errors import ConfigError
from cfusion.extensions import OwnCode
from preprocess.settings import PreprocessConfig

REQUIRED = ("weights", "transform", "precision")
"""Keys that an encoder's `identity` must contain."""


class PackagedEncoder:
    """An encoder of an installed package. See `preprocess.encoders.Encoder`.

    The distribution's name and version are recorded as the version of the embeddings, with the digest of its module,
    so that a model refuses embeddings of another version.

    Args:
        code: The entry point's factory, called with the settings and the device.
        config: Settings of preprocessing.
        device: Device to run on.

    Raises:
        ConfigError: The factory fails, or returns something other than an encoder.
    """

    def __init__(self, code: OwnCode, config: PreprocessConfig, device: str) -> None:
        self._code = code
        self.name = code.name
        try:
            self._encoder: Any = code.load()(config, device)
            self.dim, identity = int(self._encoder.dim), dict(self._encoder.identity)
        except ConfigError:
            raise
        except Exception as error:
            raise self._wrong(code.where(error), f"the factory failed ({type(error).__name__}: {error})") from error
        missing = [key for key in REQUIRED if not isinstance(identity.get(key), str)]
        if missing:
            raise self._wrong(str(code.path), f"its identity has no text for {', '.join(missing)}")
        version = " ".join(code.package or ())
        self.identity: dict[str, Any] = {**identity, "version": version, "code_sha256": code.digest}
        self._try()

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """See `Encoder.encode`."""
        return np.asarray(self._encoder.encode(tiles))

    def _try(self) -> None:
        tiles = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
        try:
            found = self.encode(tiles)
        except Exception as error:
            what = f"failed on two synthetic tiles ({type(error).__name__}: {error})"
            raise self._wrong(self._code.where(error), what) from error
        if found.shape != (len(tiles), self.dim) or found.dtype != np.float32:
            raise self._wrong(
                str(self._code.path),
                f"returned {found.dtype} {list(found.shape)}; expected float32 {[len(tiles), self.dim]}",
            )
        if not np.isfinite(found).all():
            raise self._wrong(str(self._code.path), "returned values that are not finite")

    def _wrong(self, where: str, what: str) -> ConfigError:
        package = " ".join(self._code.package or ())
        return ConfigError(
            f"encoder {self.name} of {package}: {where}: {what}.",
            "The page “Add an encoder” lists what an encoder must provide.",
            topic="own-model",
        )

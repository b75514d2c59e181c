"""`stain-texture`: a fixed descriptor of a tile, with nothing learnt and nothing to download.

Amount and spread of the two dyes, energy of each octave, and how much the gradients of each scale agree in direction.
It stands in for a pathology encoder where none is at hand; it is no substitute for one.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, UInt8

from cfusion.errors import DataError

NAME = "stain-texture"
VERSION = "1"
TILE_PX = 256
_OCTAVES = 7
_ORIENTED = 6

# Optical densities of haematoxylin, eosin and their residual (Ruifrok and Johnston 2001, table of the ImageJ plugin).
_DYES = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
_UNMIX = np.linalg.inv(_DYES / np.linalg.norm(_DYES, axis=1, keepdims=True))[:, :2].T.astype(np.float32)
_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)

_COLOUR = 11
DIM = _COLOUR + 2 * _OCTAVES + 2 * 2 * _ORIENTED + 5
"""Numbers per tile."""


def describe(tiles: UInt8[np.ndarray, "tile 256 256 3"]) -> Float32[np.ndarray, "tile dim"]:
    """Describe RGB tiles.

    Each tile is described alone, in f32, on one thread: its numbers depend neither on its companions nor on the
    machine's number of cores.

    Returns:
        [tile, DIM], of order one.

    Raises:
        DataError: The tiles are not u8 [n, 256, 256, 3].
    """
    if tiles.dtype != np.uint8 or tiles.shape[1:] != (TILE_PX, TILE_PX, 3):
        raise DataError(f"{NAME}: expected tiles u8 [n, 256, 256, 3], found {tiles.dtype} {list(tiles.shape)}.")
    rows = np.empty((len(tiles), DIM), np.float32)
    for row, tile in zip(rows, tiles, strict=True):
        row[:] = _describe_tile(tile)
    return rows


def _describe_tile(tile: UInt8[np.ndarray, "256 256 3"]) -> Float[np.ndarray, " dim"]:
    density = np.ascontiguousarray(_DENSITY.take(tile.reshape(-1, 3), mode="clip").T)
    dyes = (_UNMIX @ density).reshape(2, TILE_PX, TILE_PX)
    pyramid = [dyes]
    while len(pyramid) <= _OCTAVES:
        pyramid.append(_halve(pyramid[-1]))
    squares = np.array([np.square(level, dtype=np.float32).mean(axis=(1, 2)) for level in pyramid])
    octaves = np.maximum(squares[:-1] - squares[1:], 0)
    oriented = [_orientation(level) for level in pyramid[:_ORIENTED]]
    return np.concatenate(
        [
            _colour(density, dyes),
            _log_energy(octaves).ravel(),
            *(np.concatenate([2 * coherence, _log_energy(energy)]) for coherence, energy in oriented),
            [_correlation(level) for level in pyramid[:5]],
        ]
    )


def _halve(planes: Float[np.ndarray, "dye y x"]) -> Float[np.ndarray, "dye y2 x2"]:
    rows = planes[:, 0::2] + planes[:, 1::2]
    return (rows[:, :, 0::2] + rows[:, :, 1::2]) * np.float32(0.25)


def _log_energy(energy: np.ndarray) -> np.ndarray:
    """Energies of squared density, from 1e-5 upwards, on a logarithmic scale of order one."""
    return np.log10(energy + 1e-5) + 2.5


def _colour(density: Float[np.ndarray, "3 pixel"], dyes: Float[np.ndarray, "2 y x"]) -> Float[np.ndarray, "11"]:
    dense = (dyes[0] > 0.5).astype(np.float32)
    share = dense.mean()
    return np.concatenate(
        [
            density.mean(axis=1),
            dyes.mean(axis=(1, 2)),
            2 * dyes.std(axis=(1, 2)),
            (dyes * dense).mean(axis=(1, 2)) / (share + 1e-3),
            [4 * share, np.mean(density[0] + density[1] + density[2] > 0.3)],
        ]
    )


def _orientation(planes: Float[np.ndarray, "dye y x"]) -> tuple[Float[np.ndarray, " dye"], Float[np.ndarray, " dye"]]:
    """Coherence of the tile's structure tensor, 0 (no direction) … 1 (one direction), and its trace."""
    dx = planes[:, :-1, 1:] - planes[:, :-1, :-1]
    dy = planes[:, 1:, :-1] - planes[:, :-1, :-1]
    xx, yy, xy = (np.mean(a * b, axis=(1, 2)) for a, b in ((dx, dx), (dy, dy), (dx, dy)))
    trace = xx + yy
    return np.hypot(xx - yy, 2 * xy) / (trace + 1e-6), trace


def _correlation(planes: Float[np.ndarray, "2 y x"]) -> float:
    hematoxylin, eosin = (plane - plane.mean() for plane in planes)
    spread = np.sqrt(np.mean(hematoxylin**2) * np.mean(eosin**2))
    return float(np.mean(hematoxylin * eosin) / (spread + 1e-4))


__all__ = ["DIM", "NAME", "TILE_PX", "VERSION", "describe"]

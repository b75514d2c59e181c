"""`stain-texture`: a fixed tile descriptor that is not trained and needs no download.

It describes the amount and spread of the two dyes, the energy of each octave, and how strongly the gradients of each
scale agree in direction. It stands in when no pathology encoder is available, but does not replace one.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, UInt8

from cfusion.errors import DataError

NAME = "stain-texture"
VERSION = "2"
TILE_PX = 256
_BLOCK = 8
_GLASS = 0.25
_DENSE = 0.5
_OCTAVES = 7
_ORIENTED = 5
_CORRELATED = 6

# Optical densities of haematoxylin, eosin and their residual (Ruifrok and Johnston 2001, table of the ImageJ plugin).
_DYES = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
_UNMIX = np.linalg.inv(_DYES / np.linalg.norm(_DYES, axis=1, keepdims=True))[:, :2].T.astype(np.float32)
_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)

_COLOUR = 9 + 2
DIM = _COLOUR + 2 * _OCTAVES + 2 * 2 * _ORIENTED + _CORRELATED
"""Numbers per tile."""
_CENTRE = np.array([
    0.205, 0.493, 0.246, 0.203, 0.232, 0.982, 0.245, 0.486, 0.897, 0.600, 0.177,
    0.396, -0.877, 0.512, -0.771, 0.713, -0.691, 0.769, -0.687, 0.581, -0.676, 0.368, -0.591, 0.255, -0.457,
    0.124, 0.109, 1.119, -0.237, 0.130, 0.144, 1.309, -0.208,
    0.159, 0.262, 1.332, -0.281, 0.341, 0.518, 1.109, -0.373,
    0.755, 0.837, 0.900, -0.386,
    0.008, -0.019, -0.033, -0.068, -0.141, -0.222,
])  # fmt: skip
_SPREAD = np.array([
    0.039, 0.084, 0.051, 0.057, 0.050, 0.142, 0.022, 0.144, 0.160, 0.120, 0.064,
    0.213, 0.173, 0.208, 0.105, 0.185, 0.088, 0.220, 0.131, 0.217, 0.261, 0.226, 0.417, 0.334, 0.513,
    0.089, 0.062, 0.182, 0.086, 0.089, 0.089, 0.157, 0.095,
    0.109, 0.167, 0.205, 0.115, 0.197, 0.265, 0.184, 0.177,
    0.336, 0.352, 0.226, 0.317,
    0.242, 0.252, 0.266, 0.295, 0.356, 0.453,
])  # fmt: skip
"""Means and standard deviations over tiles of both phantom cohorts, identical for the three magnifications."""


def describe_tiles(tiles: UInt8[np.ndarray, "tile 256 256 3"]) -> Float32[np.ndarray, "tile dim"]:
    """Describe RGB tiles.

    Each tile is described separately, in f32, on one thread: its numbers depend neither on the other tiles nor on the
    machine's number of cores.

    Returns:
        [tile, DIM]: means of the densities in red, green and blue, of both dyes, of both where haematoxylin is
        dense,
        shares of dense pixels and of tissue, spreads of both dyes; energies of both dyes in 7 octaves, finest first;
        coherence and energy of the gradients of both dyes at 5 scales, from 2 px on; correlation of the dyes at 6
        scales. Centred and scaled to order one by constants.

    Raises:
        DataError: The tiles are not u8 [n, 256, 256, 3].
    """
    if tiles.dtype != np.uint8 or tiles.shape[1:] != (TILE_PX, TILE_PX, 3):
        raise DataError(f"{NAME}: expected tiles u8 [n, 256, 256, 3], found {tiles.dtype} {list(tiles.shape)}.")
    rows = np.empty((len(tiles), DIM), np.float32)
    for first in range(0, len(tiles), _BLOCK):
        block = slice(first, first + _BLOCK)
        rows[block] = (_measure(tiles[block]) - _CENTRE) / _SPREAD
    return rows


def _measure(tiles: UInt8[np.ndarray, "tile 256 256 3"]) -> Float[np.ndarray, "tile dim"]:
    colours, finest, halves = zip(*(_measure_full(tile) for tile in tiles), strict=True)
    pyramid = [np.stack(halves)]
    while len(pyramid) < _OCTAVES:
        pyramid.append(_halve(pyramid[-1]))
    moments = np.stack([np.stack(finest), *(_moments(level[:, 0], level[:, 1]) for level in pyramid)], axis=1)
    squares = moments[..., [0, 2]]
    octaves = np.maximum(squares[:, :-1] - squares[:, 1:], 0)
    oriented = [_orientation(level[:, :2], level[:, 2:]) for level in pyramid[:_ORIENTED]]
    spread = np.sqrt(squares[:, :_CORRELATED].prod(axis=2))
    return np.concatenate(
        [
            np.stack(colours),
            2 * np.sqrt(squares[:, 0]),
            _log_energy(octaves).reshape(len(tiles), -1),
            *(numbers for coherence, energy in oriented for numbers in (2 * coherence, _log_energy(energy))),
            moments[:, :_CORRELATED, 1] / (spread + 1e-4),
        ],
        axis=1,
    )


def _measure_full(
    tile: UInt8[np.ndarray, "256 256 3"],
) -> tuple[Float[np.ndarray, "9"], Float[np.ndarray, "3"], Float[np.ndarray, "3 128 128"]]:
    """Compute colour and moments at full resolution, and haematoxylin, eosin and tissue at half of it."""
    density = np.ascontiguousarray(_DENSITY.take(tile.reshape(-1, 3), mode="clip").T)
    planes = np.empty((3, TILE_PX, TILE_PX), np.float32)
    np.matmul(_UNMIX, density, out=planes[:2].reshape(2, -1))
    np.greater(density[0] + density[1] + density[2], _GLASS, out=planes[2].reshape(-1), casting="unsafe")
    colour = _colour(density, planes)
    planes[:2] -= planes[:2].mean(axis=(1, 2), keepdims=True)
    return colour, _moments(planes[0], planes[1]), _halve(planes)


def _moments(a: Float[np.ndarray, "*tile y x"], b: Float[np.ndarray, "*tile y x"]) -> Float[np.ndarray, "*tile 3"]:
    """Compute the means of a², ab and b², summing each tile in the same order whatever the batch."""
    products = ((p * q).reshape(*p.shape[:-2], -1) for p, q in ((a, a), (a, b), (b, b)))
    return np.stack([product.mean(axis=-1) for product in products], axis=-1)


def _halve(planes: Float[np.ndarray, "*plane y x"]) -> Float[np.ndarray, "*plane y2 x2"]:
    rows = planes[..., 0::2, :] + planes[..., 1::2, :]
    return (rows[..., 0::2] + rows[..., 1::2]) * np.float32(0.25)


def _log_energy(energy: np.ndarray) -> np.ndarray:
    """Return the energies of squared density, from 1e-5 upwards, on a logarithmic scale of order one."""
    return np.log10(energy + 1e-5) + 2.5


def _colour(density: Float[np.ndarray, "3 pixel"], planes: Float[np.ndarray, "3 y x"]) -> Float[np.ndarray, "9"]:
    """Compute mean densities, mean dyes, dyes in dense haematoxylin, and shares of dense pixels and tissue."""
    dense = (planes[0] > _DENSE).astype(np.float32)
    share = dense.mean()
    in_dense = np.einsum("dyx,yx->d", planes[:2], dense) / dense.size / (share + 1e-3)
    return np.concatenate([density.mean(axis=1), planes[:2].mean(axis=(1, 2)), in_dense, [4 * share, planes[2].mean()]])


def _orientation(
    dyes: Float[np.ndarray, "tile dye y x"], tissue: Float[np.ndarray, "tile 1 y x"]
) -> tuple[Float[np.ndarray, "tile dye"], Float[np.ndarray, "tile dye"]]:
    """Compute coherence, 0 (no direction) … 1 (one direction), and trace of the structure tensor over tissue.

    Gradients are the two diagonal differences of 2 × 2 pixels, which share no pixel, so that noise has no direction.
    The border between tissue and glass is excluded: it is the strongest edge of a tile but carries no information
    about the tissue.
    """
    inside = tissue > 0.9
    inside = inside[..., :-1, :-1] & inside[..., :-1, 1:] & inside[..., 1:, :-1] & inside[..., 1:, 1:]
    falling = (dyes[..., 1:, 1:] - dyes[..., :-1, :-1]) * inside
    rising = (dyes[..., :-1, 1:] - dyes[..., 1:, :-1]) * inside
    aa, ab, bb = np.moveaxis(_moments(falling, rising), -1, 0)
    share = inside.mean(axis=(2, 3)) + 1e-4
    trace = (aa + bb) / share / 2
    return np.hypot(aa - bb, 2 * ab) / share / (2 * trace + 1e-5), trace


__all__ = ["DIM", "NAME", "TILE_PX", "VERSION", "describe_tiles"]

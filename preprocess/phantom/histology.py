"""Synthetic tissue that looks like H&E and hides two measurable signals, one at 5x and one at 20x.

Glands are oblong and identical; patients differ in whether neighbouring glands are parallel or point in all
directions. A 5x tile shows about eight glands. A 20x tile shows a part of one, which looks the same in every
patient.
Nuclei contain chromatin grains, one pixel large, whose sum over every 2 × 2 block is zero: the first area average,
from 20x to 10x, removes them completely.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int8, UInt8, UInt16
from PIL import Image
from scipy.ndimage import gaussian_filter

FIELD_STEP_PX = 8
"""Shapes are computed on a grid of this step and interpolated."""
_GLAND_PITCH_PX = 405.0
_GLAND_RADII_PX = (177.0, 78.0)
_WAVINESS_PX = 12.0
_BASAL_DEPTH, _LUMEN_DEPTH = 0.6, 0.72

# Palette: every pixel is drawn as one byte that combines kind of tissue and tone, and is coloured last.
_GLASS, _STROMA, _CYTOPLASM, _NUCLEUS, _END = 0, 16, 80, 120, 256
_NUCLEUS_MEAN = 188
_GRAIN_MIN, _GRAIN_MAX = 5, 38


@dataclass(frozen=True)
class Stain:
    """Colours of a laboratory: optical density of each dye in red, green, blue at unit concentration."""

    hematoxylin: tuple[float, float, float] = (0.65, 0.70, 0.29)
    eosin: tuple[float, float, float] = (0.08, 0.95, 0.30)


@dataclass(frozen=True)
class Atlas:
    """Data shared by all slides of a size: nuclei and textures on a torus, which each slide reads at its own offset."""

    round_ids: UInt16[np.ndarray, "y x"]
    round_centres: Float[np.ndarray, "nucleus 2"]
    spindle_ids: UInt16[np.ndarray, "y x"]
    spindle_centres: Float[np.ndarray, "nucleus 2"]
    nucleus_tone: UInt8[np.ndarray, "y x"]
    grain: Int8[np.ndarray, "y x"]
    fibres: UInt8[np.ndarray, "y x"]
    cytoplasm: UInt8[np.ndarray, "y x"]
    waviness: Float[np.ndarray, "3 y x"]


@functools.lru_cache(maxsize=2)
def atlas(height_px: int, width_px: int) -> Atlas:
    """Build the planes for slides of `height_px` × `width_px` at 20x; both must be multiples of `FIELD_STEP_PX`."""
    rng = np.random.default_rng([height_px, width_px])
    shape = (height_px, width_px)
    round_ids, round_centres = _scatter(shape, 25.0, (9.0, 7.0), rng)
    spindle_ids, spindle_centres = _scatter(shape, 56.0, (13.0, 4.0), rng)
    tone = _noise(shape, 1.5, rng) * 5 + rng.normal(0, 6, round_ids.max() + 1).astype(np.float32)[round_ids]
    swirl = np.cos(_noise(shape, 14.0, rng) * 9) * 10 + _noise(shape, 1.2, rng) * 5 + _noise(shape, 5.0, rng) * 4
    soft = _noise(shape, 1.5, rng) * 3 + _noise(shape, 7.0, rng) * 3
    coarse = (height_px // FIELD_STEP_PX, width_px // FIELD_STEP_PX)
    sigmas = (4.5, 4.5, 14.0)
    return Atlas(
        round_ids,
        round_centres,
        spindle_ids,
        spindle_centres,
        _tone(tone, _NUCLEUS_MEAN, 20),
        _grains(shape, rng) * _complete_blocks(round_ids, spindle_ids),
        _tone(swirl, _STROMA + 32, 31),
        _tone(soft, _CYTOPLASM + 24, 15),
        np.stack([_noise(coarse, sigma, rng) for sigma in sigmas]),
    )


def _tone(values: Float[np.ndarray, "y x"], centre: int, spread: int) -> UInt8[np.ndarray, "y x"]:
    return (centre + np.clip(np.rint(values), -spread, spread)).astype(np.uint8)


def _noise(shape: tuple[int, int], sigma: float, rng: np.random.Generator) -> Float[np.ndarray, "y x"]:
    """Draw smooth periodic noise of mean 0 and standard deviation 1."""
    noise = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap", truncate=3.0)
    return (noise - noise.mean()) / noise.std()


def _grains(shape: tuple[int, int], rng: np.random.Generator) -> Int8[np.ndarray, "y x"]:
    """Draw ±1 so that each aligned 2 × 2 block is a random one of the six arrangements that sum to zero."""
    kinds = np.array(
        [[1, 1, -1, -1], [-1, -1, 1, 1], [1, -1, 1, -1], [-1, 1, -1, 1], [1, -1, -1, 1], [-1, 1, 1, -1]], np.int8
    )
    blocks = kinds[rng.integers(0, 6, (shape[0] // 2, shape[1] // 2))].reshape(shape[0] // 2, shape[1] // 2, 2, 2)
    return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3).reshape(shape))


def _complete_blocks(
    round_ids: UInt16[np.ndarray, "y x"], spindle_ids: UInt16[np.ndarray, "y x"]
) -> Bool[np.ndarray, "y x"]:
    """Find the 2 × 2 blocks inside one round nucleus and off every spindle: each is shown completely or not at all."""
    corners = [round_ids[dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)]
    complete = (corners[0] > 0) & np.logical_and.reduce([corner == corners[0] for corner in corners[1:]])
    for dy, dx in np.ndindex(2, 2):
        complete &= spindle_ids[dy::2, dx::2] == 0
    return complete.repeat(2, axis=0).repeat(2, axis=1)


def _scatter(
    shape: tuple[int, int], pitch_px: float, radii_px: tuple[float, float], rng: np.random.Generator
) -> tuple[UInt16[np.ndarray, "y x"], Float[np.ndarray, "nucleus 2"]]:
    """Lay elliptic nuclei on a jittered hexagonal lattice of the torus; return nucleus numbers, 0 for none."""
    rows, columns = 2 * round(shape[0] / pitch_px / 1.732), round(shape[1] / pitch_px)
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    x += 0.5 * (np.arange(rows) % 2)[:, None]
    centres = np.stack([y.ravel() * shape[0] / rows, x.ravel() * shape[1] / columns], 1)
    centres = (centres + rng.normal(0, pitch_px * 0.13, centres.shape)) % shape
    ids = np.zeros(shape, np.uint16)
    reach = int(max(radii_px) * 1.3) + 1
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    for number, (cy, cx) in enumerate(centres, start=1):
        angle, scale = rng.uniform(0, np.pi), rng.uniform(0.8, 1.2)
        fy, fx = dy - cy % 1, dx - cx % 1
        along, across = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
        inside = (along / radii_px[0]) ** 2 + (across / radii_px[1]) ** 2 < scale**2
        ids[(int(cy) + dy[inside]) % shape[0], (int(cx) + dx[inside]) % shape[1]] = number
    return ids, centres


def gland_field(
    planes: Atlas, architecture: float, rng: np.random.Generator
) -> tuple[Float32[np.ndarray, "y x"], Float32[np.ndarray, "y x"]]:
    """Compute the glands' depth and the distance from the tissue's border, on the coarse grid.

    Args:
        planes: Shared planes of the slide's size.
        architecture: 0 (glands point in all directions) … 1 (in one); the length of the mean of exp(2iφ).
        rng: The slide's generator.

    Returns:
        Depth, 1 in a gland's middle, 0 at its edge, −1 far from any; border, negative in the tissue.
    """
    shifts = [tuple(rng.integers(0, planes.waviness.shape[1:])) for _ in range(3)]
    wave_y, wave_x, wave_border = (np.roll(p, s, (0, 1)) for p, s in zip(planes.waviness, shifts, strict=True))
    y, x = (g.astype(np.float32) for g in np.mgrid[: wave_y.shape[0], : wave_y.shape[1]])
    half_y, half_x = wave_y.shape[0] / 2, wave_y.shape[1] / 2
    border = np.abs(y / half_y - 1) ** 4 + np.abs(x / half_x - 1) ** 4 - 0.9 + 0.16 * wave_border
    y, x = FIELD_STEP_PX * y + _WAVINESS_PX * wave_y, FIELD_STEP_PX * x + _WAVINESS_PX * wave_x
    centres = _lattice(y.shape, rng)
    angles = rng.uniform(0, np.pi) + _spread(architecture) * _half_circle(len(centres), rng)
    sizes = rng.uniform(0.88, 1.12, len(centres))
    depth = np.full_like(y, -1)
    for (row, column), angle, size in zip(centres, rng.permutation(angles), sizes, strict=True):
        reach = int(_GLAND_RADII_PX[0] * 1.5 / FIELD_STEP_PX) + 1
        window = np.s_[max(row - reach, 0) : row + reach, max(column - reach, 0) : column + reach]
        dy, dx = y[window] - row * FIELD_STEP_PX, x[window] - column * FIELD_STEP_PX
        along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        radius = np.hypot(along / (size * _GLAND_RADII_PX[0]), across / (size * _GLAND_RADII_PX[1]))
        depth[window] = np.maximum(depth[window], 1 - radius)
    return depth, border


def _lattice(shape: tuple[int, ...], rng: np.random.Generator) -> Int[np.ndarray, "gland 2"]:
    """Place the glands on a jittered hexagonal lattice at a random angle, which prefers no direction."""
    pitch = _GLAND_PITCH_PX / FIELD_STEP_PX
    number = np.arange(-int(max(shape) / pitch), int(max(shape) / pitch) + 1)
    rows, columns = (g.ravel() for g in np.meshgrid(number, number, indexing="ij"))
    points = pitch * np.stack([rows * np.sqrt(3) / 2, columns + 0.5 * (rows % 2)], 1)
    angle = rng.uniform(0, np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = np.rint(points @ turn + np.array(shape) / 2 + rng.normal(0, 0.05 * pitch, points.shape)).astype(int)
    return points[((points > -pitch / 2) & (points < np.array(shape) + pitch / 2)).all(axis=1)]


def _half_circle(count: int, rng: np.random.Generator) -> Float[np.ndarray, " gland"]:
    """Spread directions evenly over (−π/2, π/2), jittered within their strata."""
    return ((np.arange(count) + rng.uniform(0, 1, count)) / count - 0.5) * np.pi


def _spread(coherence: float) -> float:
    """Find the share s of the half circle for which |mean exp(2iφ)| = sin(πs) / (πs) = coherence."""
    shares = np.linspace(0, 1, 501)
    return float(np.interp(-coherence, -np.sinc(shares), shares))


def draw_tissue(
    height_px: int, width_px: int, architecture: float, nuclei: float, stain: Stain, rng: np.random.Generator
) -> UInt8[np.ndarray, "y x 3"]:
    """Draw one slide at 20x.

    Args:
        height_px: Height, a multiple of `FIELD_STEP_PX`.
        width_px: Width, likewise.
        architecture: 0 (glands in all directions) … 1 (parallel); shows at 5x.
        nuclei: 0 (fine chromatin) … 1 (coarse); shows at 20x.
        stain: Colours.
        rng: The slide's generator; equal states give equal pixels.
    """
    planes = atlas(height_px, width_px)
    depth, border = gland_field(planes, architecture, rng)
    offset = tuple(2 * rng.integers(0, (height_px // 2, width_px // 2)))

    def roll(plane: np.ndarray) -> np.ndarray:
        return np.roll(plane, offset, (0, 1))

    glands, outside = (_enlarge(field, width_px, height_px) for field in (depth, 4 * border))
    index = np.where(glands >= 128, roll(planes.cytoplasm), roll(planes.fibres))
    np.copyto(index, np.uint8(_CYTOPLASM + 2), where=glands >= 128 + 127 * _LUMEN_DEPTH)
    np.copyto(index, np.uint8(_GLASS), where=outside >= 128)
    depth_round, border_round = _at_centres(planes.round_centres, offset, depth, border)
    depth_spindle, border_spindle = _at_centres(planes.spindle_centres, offset, depth, border)
    kept_round = (depth_round > 0) & (depth_round < _BASAL_DEPTH) & (border_round < 0)
    kept_spindle = (depth_spindle < 0) & (border_spindle < 0)
    shown = np.r_[False, kept_round][planes.round_ids] | np.r_[False, kept_spindle][planes.spindle_ids]
    amplitude = round(_GRAIN_MIN + (_GRAIN_MAX - _GRAIN_MIN) * nuclei)
    chromatin = planes.nucleus_tone + (planes.grain * np.int8(amplitude)).view(np.uint8)
    np.copyto(index, roll(chromatin), where=roll(shown))
    return _colour(index, _palette(stain, rng))


def _enlarge(field: Float32[np.ndarray, "y x"], width_px: int, height_px: int) -> UInt8[np.ndarray, "y x"]:
    """Interpolate the coarse field to full size as bytes, −1 … 1 as 1 … 255."""
    coarse = np.clip(np.rint(128 + 127 * field), 1, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width_px, height_px), Image.Resampling.BICUBIC))


def _at_centres(
    centres: np.ndarray, offset: tuple[int, ...], *fields: Float[np.ndarray, "y x"]
) -> tuple[Float[np.ndarray, " nucleus"], ...]:
    """Sample coarse fields at the nuclei's centres, moved by `offset` on the torus."""
    y, x = ((centres + offset) // FIELD_STEP_PX).astype(int).T
    height, width = fields[0].shape
    return tuple(field[y % height, x % width] for field in fields)


def _palette(stain: Stain, rng: np.random.Generator) -> UInt8[np.ndarray, "256 3"]:
    """Build the colours of the 256 bytes, linear in light per kind of tissue so that grains keep the mean colour."""
    dyes = np.array([stain.hematoxylin, stain.eosin]) * rng.normal(1, 0.03, (2, 1))

    def light(hematoxylin: float, eosin: float) -> np.ndarray:
        return 244 * np.exp(-np.array([hematoxylin, eosin]) @ dyes)

    ramps = [
        (_GLASS, _STROMA, light(0, 0), light(0, 0)),
        (_STROMA, _CYTOPLASM, light(0.08, 0.62), light(0.05, 0.22)),
        (_CYTOPLASM, _NUCLEUS, light(0.02, 0.10), light(0.34, 0.42)),
        (_NUCLEUS, _END, light(2.1, 0.75), light(0.62, 0.22)),
    ]
    palette = np.empty((256, 3))
    for first, last, start, end in ramps:
        palette[first:last] = np.linspace(start, end, last - first)
    return np.rint(palette).astype(np.uint8)


def _colour(index: UInt8[np.ndarray, "y x"], palette: UInt8[np.ndarray, "256 3"]) -> UInt8[np.ndarray, "y x 3"]:
    image = Image.fromarray(index)
    image.putpalette(palette.tobytes())
    return np.asarray(image.convert("RGB"))


__all__ = ["FIELD_STEP_PX", "Atlas", "Stain", "atlas", "draw_tissue", "gland_field"]

"""Pictures of slides with known tissue, in many stains and on many kinds of glass, for `benchmarks.tissue`.

Each starts from a slide stained with haematoxylin and eosin: real ones where they are available, and phantoms. Its
tissue is what absorbs light. Then it is stained again: the amounts of the two dyes are estimated from the optical
density, and the picture is computed from them with other dyes, more or less of each, or on other glass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from preprocess.overview import read_overview
from preprocess.phantom.draw import PHANTOMS
from preprocess.phantom.histology import draw_tissue
from preprocess.slides import Overview, open_slide

UM_PX = 8.0
"""µm per pixel of all pictures, that of the overview in which tissue is detected."""

GLASS = (243, 242, 244)
MARGIN_PX = 30
WHITE = 255
"""Value, in every channel, of what a scanner left out."""

Vector = tuple[float, float, float]

HAEMATOXYLIN, EOSIN, DAB = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78)
"""Optical density of dyes in red, green and blue (Ruifrok and Johnston 2001)."""

BLUES = {
    "violet": HAEMATOXYLIN,
    "violet-blue": (0.70, 0.66, 0.25),
    "blue": (0.75, 0.61, 0.25),
    "greenish blue": (0.81, 0.55, 0.19),
}  # fmt: skip
"""Hues of haematoxylin, by its maker, its age and the bath after it."""

LIGHT_GREEN, ANILINE_BLUE, FUCHSIN = (0.95, 0.10, 0.40), (0.85, 0.45, 0.10), (0.10, 0.75, 0.45)
FAST_RED, TOLUIDINE = (0.15, 0.75, 0.60), (0.80, 0.55, 0.20)

Restain = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Picture, amount of haematoxylin, amount of eosin → picture."""


@dataclass(frozen=True)
class Source:
    """A slide in haematoxylin and eosin.

    Attributes:
        name: Name of the slide.
        rgb: u8 [h, w, 3].
        true: Its tissue, bool [h, w].
    """

    name: str
    rgb: np.ndarray
    true: np.ndarray


@dataclass(frozen=True)
class Case:
    """A picture to find tissue in.

    Attributes:
        kind: Group of cases that are counted together.
        name: What was done to which slide.
        rgb: u8 [h, w, 3].
        true: Its tissue, bool [h, w].
    """

    kind: str
    name: str
    rgb: np.ndarray
    true: np.ndarray

    @property
    def overview(self) -> Overview:
        """The picture as the overview of a slide that has pixels everywhere."""
        yes = np.ones(self.true.shape, bool)
        return Overview(self.rgb, yes, ~yes, (16.0, 16.0))


def density(rgb: np.ndarray) -> np.ndarray:
    """Optical density of each channel, f64 [h, w, 3]."""
    return -np.log10((rgb.astype(float) + 1) / 256)


def coloured(*stains: tuple[np.ndarray, Vector]) -> np.ndarray:
    """A picture, f64 [h, w, 3], of amounts [h, w] of dyes, each with a direction in optical density."""
    total = sum(amount[..., None] * np.array(v) / np.linalg.norm(v) for amount, v in stains)
    return np.clip(256 * 10**-total - 1, 0, 255)


def unmixed(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Amounts of haematoxylin and eosin, [h, w] each."""
    vectors = np.array([HAEMATOXYLIN, EOSIN, DAB])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    amounts = np.clip(density(rgb) @ np.linalg.inv(vectors), 0, None)
    return amounts[..., 0], amounts[..., 1]


def absorbing(rgb: np.ndarray) -> np.ndarray:
    """What absorbs light, bool [h, w], after smoothing and without single pixels."""
    dense = density(rgb) - density(np.percentile(rgb.reshape(-1, 3), 97, axis=0).clip(200))
    found = ndimage.gaussian_filter(dense.sum(axis=2), 1) > 0.12
    return ndimage.binary_opening(ndimage.binary_closing(found))


def real_sources(folder: Path) -> list[Source]:
    """The slides of a folder; none if there is no such folder."""
    found = []
    for path in sorted(folder.glob("*.svs")):
        slide = open_slide(path, default_mpp=0.5)
        rgb = read_overview(slide, UM_PX).rgb
        slide.close()
        found.append(Source(path.stem, rgb, absorbing(rgb)))
    return found


def drawn_sources(side_px: int) -> list[Source]:
    """A phantom of each laboratory, `side_px` px at 20x on a side."""
    found = []
    for spec in PHANTOMS:
        rng = np.random.default_rng(spec.seed)
        drawn = draw_tissue(side_px, side_px, 0.5, 0.5, spec.stain, rng)
        small = np.asarray(Image.fromarray(drawn).reduce(round(UM_PX / 0.5)))
        rgb = np.clip(np.rint(small + rng.normal(0, 1, small.shape)), 0, 254).astype(np.uint8)
        found.append(Source(spec.name, rgb, absorbing(rgb)))
    return found


def surrounded(source: Source) -> Iterator[tuple[str, Source, np.ndarray]]:
    """The slide as it is, with more glass, and with white that was not scanned; and where that white is."""
    white = (source.rgb == WHITE).all(axis=2)
    yield "as it is", source, white
    rgb = np.pad(source.rgb, ((MARGIN_PX, MARGIN_PX), (MARGIN_PX, MARGIN_PX), (0, 0)))
    true, white = (np.pad(mask, MARGIN_PX) for mask in (source.true, white))
    margin = np.pad(np.zeros(source.true.shape, bool), MARGIN_PX, constant_values=True)
    noise = np.random.default_rng(0).normal(0, 0.7, rgb.shape)
    glass = np.rint(np.array(GLASS) + noise).astype(np.uint8)
    yield "more glass", Source(source.name, np.where(margin[..., None], glass, rgb), true), white
    yield "white around", Source(source.name, np.where(margin[..., None], np.uint8(WHITE), rgb), true), white | margin


def restains() -> dict[str, dict[str, Restain]]:
    """What is done to a slide, by kind and name."""

    def dyes(h: float, first: Vector, e: float, second: Vector) -> Restain:
        return lambda _, nuclei, rest: coloured((h * nuclei, first), (e * rest, second))

    def darker(factor: float) -> Restain:
        return lambda rgb, *_: 256 * 10 ** -(factor * density(rgb)) - 1

    def on_glass(*colour: int) -> Restain:
        return lambda rgb, *_: 256 * 10 ** -(density(rgb) + density(np.array(colour))) - 1

    def half(rgb: np.ndarray, nuclei: np.ndarray, rest: np.ndarray) -> np.ndarray:
        left = np.arange(rgb.shape[1])[None, :, None] < rgb.shape[1] // 2
        strong, pale = dyes(0.4, HAEMATOXYLIN, 2, DAB), dyes(0.2, HAEMATOXYLIN, 0.05, EOSIN)
        return np.where(left, strong(rgb, nuclei, rest), pale(rgb, nuclei, rest))

    def only(blue: Vector) -> Restain:
        return lambda _, nuclei, rest: coloured((nuclei + 0.5 * rest, blue))

    return {
        "control": {"haematoxylin and eosin": lambda rgb, *_: rgb},
        "haematoxylin": {name: dyes(1, blue, 1, EOSIN) for name, blue in BLUES.items()}
        | {f"{name}, strong": dyes(1.6, blue, 0.5, EOSIN) for name, blue in BLUES.items()},
        "Masson": {
            "light green": dyes(0.6, FUCHSIN, 1, LIGHT_GREEN), "aniline blue": dyes(0.6, FUCHSIN, 1, ANILINE_BLUE),
        },
        "immunohistochemistry": {
            "brown": dyes(0.4, HAEMATOXYLIN, 1, DAB), "strong brown": dyes(0.4, HAEMATOXYLIN, 2.5, DAB),
            "red": dyes(0.4, HAEMATOXYLIN, 1.2, FAST_RED),
        } | {f"negative, {name}": only(blue) for name, blue in BLUES.items()},
        "other stains": {
            "alcian blue": dyes(0.3, EOSIN, 0.8, (0.87, 0.43, 0.20)),
            "PAS": dyes(0.6, HAEMATOXYLIN, 1.2, (0.18, 0.95, 0.30)),
            "Giemsa": dyes(1.2, (0.83, 0.52, 0.18), 0.5, EOSIN),
            "toluidine blue": dyes(1.5, TOLUIDINE, 0.6, TOLUIDINE),
            "Congo red": dyes(0.3, HAEMATOXYLIN, 1.2, (0.08, 0.65, 0.75)),
            "eosin only": dyes(0, HAEMATOXYLIN, 1, EOSIN),
        },
        "other glass": {
            "yellowed": on_glass(235, 228, 200), "pink": on_glass(240, 225, 232), "blue": on_glass(215, 222, 240),
        },
        "paler": {f"× {factor:g}": darker(factor) for factor in (0.5, 0.25, 0.15, 0.1)},
        "stronger": {"× 2": darker(2.0), "dark scan": lambda rgb, *_: 0.55 * rgb},
        "half pale, half strong": {"brown and pale": half},
    }  # fmt: skip


FOLD_PX, BLUR_RADIUS_PX, BLUR_UM = 12, 35, (16.0, 24.0, 32.0)
"""Width of a synthetic fold, radius of a blurred disk, and the filters' standard deviations."""


def with_fold(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """The slide with a strip of twice the optical density through its middle, and the fold, bool [h, w]."""
    y, x = np.ogrid[: source.true.shape[0], : source.true.shape[1]]
    distance = np.abs((x - x.max() / 2) + 0.3 * (y - y.max() / 2))
    fold = (distance < FOLD_PX / 2) & source.true
    twice = np.clip(256 * 10 ** -(2 * density(source.rgb)) - 1, 0, 255).astype(np.uint8)
    return np.where(fold[..., None], twice, source.rgb), fold


def with_blur(source: Source, sigma_um: float) -> tuple[np.ndarray, np.ndarray]:
    """The slide with a blurred disk in its middle, with a camera's noise, and the blurred tissue, bool [h, w]."""
    y, x = np.ogrid[: source.true.shape[0], : source.true.shape[1]]
    disk = np.hypot(x - x.max() / 2, y - y.max() / 2) < BLUR_RADIUS_PX
    sigma = sigma_um / UM_PX
    smooth = ndimage.gaussian_filter(source.rgb.astype(float), (sigma, sigma, 0))
    smooth += np.random.default_rng(0).normal(0, 0.5, smooth.shape)
    rgb = np.where(disk[..., None], np.clip(smooth, 0, 255).astype(np.uint8), source.rgb)
    return rgb, disk & source.true


def make_cases(sources: list[Source]) -> Iterator[Case]:
    """Every slide in every surrounding and stain. White that was not scanned stays white."""
    for source in sources:
        for around, picture, white in surrounded(source):
            nuclei, rest = unmixed(picture.rgb)
            for kind, named in restains().items():
                for name, restain in named.items():
                    rgb = np.clip(restain(picture.rgb, nuclei, rest), 0, 255).astype(np.uint8)
                    rgb[white] = WHITE
                    yield Case(kind, f"{source.name}, {around}, {name}", rgb, picture.true)

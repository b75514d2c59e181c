"""Inspect a feature store: list its slides, draw one, verify its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cfusion.console import progress
from cfusion.data.store import FeatureStore, check_digests, check_features, encoders_in
from cfusion.errors import ConfigError, DataError, StoreError
from cfusion.files import atomic_path
from cfusion.types import SlideFeatures


@dataclass(frozen=True)
class StoredSlide:
    """One row of a store's table.

    Attributes:
        encoder: Name of the encoder.
        slide_id: File stem of the slide.
        tiles: Number of tiles per magnification name.
        dim: Width of the embeddings.
        mpp: µm per level-0 px, and its source.
        unreadable: Cells that could not be read.
        program: Version of the program that wrote it.
    """

    encoder: str
    slide_id: str
    tiles: dict[str, int]
    dim: int
    mpp: str
    unreadable: int
    program: str


def list_store(root: Path, encoder: str | None = None) -> list[StoredSlide]:
    """List the slides of a store, of one encoder or of all.

    Raises:
        DataError: There is no store, it is empty, or one of its groups is unreadable.
    """
    rows = []
    for store in _stores(root, encoder):
        for slide_id in store.slide_ids():
            attrs, shapes = store.attrs(slide_id), store.shapes(slide_id)
            mpp = attrs.get("mpp")
            resolution = f"{mpp:g} ({attrs.get('mpp_source', '?')})" if mpp else "unknown"
            tiles = {magnification: shape[0] for magnification, shape in shapes.items()}
            dim = next(iter(shapes.values()), (0, 0))[1]
            bad = len(attrs.get("unreadable_cells", []))
            rows.append(
                StoredSlide(
                    store.encoder, slide_id, tiles, dim, resolution, bad, str(attrs.get("program_version", "?"))
                )
            )
    return rows


def verify_store(root: Path, encoder: str | None = None) -> dict[str, str]:
    """Read every array of a store and compare it with the digest that was written.

    Returns:
        Problems by `encoder/slide_id`; empty if none.

    Raises:
        DataError: There is no store, or it is empty.
    """
    wrong: dict[str, str] = {}
    slides = [(store, slide_id) for store in _stores(root, encoder) for slide_id in store.slide_ids()]
    with progress("Verifying", len(slides)) as bar:
        for store, slide_id in slides:
            try:
                slide = store.read(slide_id)
                check_features(slide)
                check_digests(slide)
            except DataError as error:
                wrong[f"{store.encoder}/{slide_id}"] = str(error)
            bar.advance()
    return wrong


def _stores(root: Path, encoder: str | None) -> list[FeatureStore]:
    names = [encoder] if encoder else encoders_in(root)
    if not names:
        raise StoreError(f"{root}: contains no features.", "Give the folder that `cfusion preprocess` wrote.")
    return [FeatureStore.open(root, name) for name in names]


def draw_slide(slide: SlideFeatures, target: Path) -> None:
    """Draw a slide's features: tiles of each magnification in place, coloured by their first three components.

    Args:
        slide: The features.
        target: Picture to write; its suffix sets the format, such as PNG.

    Raises:
        DataError: The slide has no coordinates.
        ConfigError: The suffix is not a supported format.
    """
    kind, known = target.suffix.lstrip(".").lower() or "png", FigureCanvasAgg.get_supported_filetypes()
    if kind not in known:
        raise ConfigError(f"{target}: pictures cannot be written as {kind}.", f"Supported: {', '.join(sorted(known))}.")
    names = [name for name in slide.features if slide.coords.get(name) is not None and len(slide.coords[name])]
    if not names:
        raise DataError(f"slide {slide.slide_id}: has no coordinates, so its tiles cannot be placed.")
    figure = Figure(figsize=(5 * len(names), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        coords = slide.coords[name]
        side = slide.attrs.get("tile_px_level0", {}).get(name, 1)
        axis.imshow(_as_picture(coords, side, _components(slide.features[name])))
        axis.set_title(f"{name}: {len(coords)} tiles")
        axis.set_axis_off()
    figure.suptitle(f"{slide.slide_id} · {slide.attrs.get('encoder', '')}: first three principal components")
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=kind, dpi=110)


def _components(features: np.ndarray) -> np.ndarray:
    """Compute the first three principal components, each scaled to 0 … 1; f32 [N, 3]."""
    centred = features.astype(np.float32) - features.astype(np.float32).mean(axis=0)
    values = np.zeros((len(centred), 3), np.float32)
    found = np.linalg.svd(centred, full_matrices=False)
    count = min(3, len(found.S))
    values[:, :count] = found.U[:, :count] * found.S[:count]
    low, high = np.percentile(values, [2, 98], axis=0)
    return np.clip((values - low) / np.maximum(high - low, 1e-9), 0, 1)


def _as_picture(coords: np.ndarray, side: float, colours: np.ndarray) -> np.ndarray:
    places = np.rint((coords - coords.min(axis=0)) / side).astype(int)
    picture = np.ones((*(places.max(axis=0)[::-1] + 1), 3), np.float32)
    picture[places[:, 1], places[:, 0]] = colours
    return picture

"""Import features that other programs extracted.

Supported layouts: the published CrossFusion program, CLAM, TRIDENT, STAMP. `alignment` reports what a layout's
coordinates allow. Where they allow no alignment, none is invented.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import KDTree

import cfusion
from cfusion.console import progress
from cfusion.data.store import write_slide
from cfusion.errors import CfusionError, ConfigError, LayoutError, MissingExtraError
from cfusion.types import SlideFeatures, magnification_value
from preprocess.layouts import LAYOUTS, Level

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportReport:
    """Result of an import.

    Attributes:
        layout: The detected or given layout.
        alignment: What its coordinates allow, as a sentence.
        imported: Slides that are now in the store.
        refused: Slides that were not imported, with the reason.
    """

    layout: str
    alignment: str
    imported: tuple[str, ...]
    refused: dict[str, str]


ALIGNMENTS = {
    "grid": "tiles of all magnifications lie on one grid; parents are found by division",
    "centre": "tiles are not aligned across magnifications; each is linked to the coarser tile that "
    "contains its centre, and tiles without one are dropped",
    "none": "the files have no coordinates, so tiles have no parents in the coarser magnifications",
}


def import_features(source: Path, store: Path, layout: str = "auto", encoder: str | None = None) -> ImportReport:
    """Import the features of another program into a feature store.

    A slide whose files cannot be used is refused with the reason, and the rest are imported.

    Args:
        source: Folder that the other program wrote.
        store: Feature store.
        layout: published, clam, trident, stamp, or auto.
        encoder: Name of the encoder; required if the files do not name it.

    Raises:
        ConfigError: The layout is unknown, or the encoder is not named.
        LayoutError: The folder does not have the layout.
    """
    if not source.is_dir():
        raise LayoutError(f"{source}: no such folder.")
    if layout != "auto" and layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} is unknown.", f"Known: auto, {', '.join(LAYOUTS)}.")
    found = {name: LAYOUTS[name](source) for name in ([layout] if layout != "auto" else LAYOUTS)}
    fits = {name: f for name, f in found.items() if f.files}
    if len(fits) != 1:
        matches = f"fits the layouts {', '.join(fits)}" if fits else f"has no features of {', '.join(found)}"
        raise LayoutError(
            f"{source}: {matches}.", "Give the folder with --from LAYOUT; see `cfusion preprocess import -h`."
        )
    name, holds = next(iter(fits.items()))
    encoder = encoder or holds.encoder
    if encoder is None:
        raise ConfigError(f"{source}: the files do not name their encoder.", "Give --encoder NAME.")
    imported, refused = [], {}
    with progress("Importing", len(holds.files)) as bar:
        for slide_id, levels in sorted(holds.files.items()):
            try:
                write_slide(store, _assemble(slide_id, levels, encoder, name, holds.alignment))
                imported.append(slide_id)
            except CfusionError as error:
                if isinstance(error, MissingExtraError) or isinstance(error.__cause__, OSError):
                    raise
                logger.warning("slide %s refused: %s", slide_id, error)
                refused[slide_id] = str(error)
            bar.advance()
    return ImportReport(name, ALIGNMENTS[holds.alignment], tuple(imported), refused)


def _assemble(
    slide_id: str, files: Mapping[str, Callable[[], Level]], encoder: str, layout: str, alignment: str
) -> SlideFeatures:
    names = sorted(files, key=magnification_value, reverse=True)
    levels = {name: files[name]() for name in names}
    widths = {level.features.shape[1] for level in levels.values() if len(level.features)}
    if not widths:
        raise LayoutError(f"slide {slide_id}: has no tiles.")
    if len(widths) > 1:
        raise LayoutError(
            f"slide {slide_id}: its magnifications have embeddings of different widths: {sorted(widths)}."
        )
    parents: dict[str, np.ndarray] = {}
    # From the coarsest down, so that a tile is linked only to a parent that is itself kept.
    for coarse, fine in zip(names[::-1], names[-2::-1], strict=False):
        if levels[fine].coords is None or levels[coarse].coords is None:
            continue
        parent = find_parents(levels[fine], levels[coarse])
        keep = parent >= 0
        if not keep.any():
            raise LayoutError(f"slide {slide_id}: no tile of {fine} lies in a tile of {coarse}.")
        if not keep.all():
            logger.info("slide %s: %d tiles of %s have no parent", slide_id, int((~keep).sum()), fine)
        levels[fine] = levels[fine].subset(keep)
        parents[fine] = parent[keep].astype(np.int32)
    with np.errstate(over="ignore"):
        features = {name: level.features.astype(np.float16) for name, level in levels.items()}
    coords = {n: level.coords.astype(np.int32) for n, level in levels.items() if level.coords is not None}
    attrs: dict[str, Any] = {
        "encoder": encoder, "imported_from": layout, "alignment": alignment, "program_version": cfusion.__version__,
        "tile_px_level0": {n: level.side_px for n, level in levels.items() if level.side_px is not None},
    }  # fmt: skip
    return SlideFeatures(slide_id, features, coords, parents, attrs)


def find_parents(fine: Level, coarse: Level) -> np.ndarray:
    """Return, for each tile, the row of the coarser tile that contains its centre, i64 [N]; −1 if none does.

    Where coarser tiles overlap, the one whose centre is nearest wins.
    """
    if fine.coords is None or coarse.coords is None or fine.side_px is None or coarse.side_px is None:
        raise LayoutError("tiles without coordinates or size have no parents.")
    centres = fine.coords + fine.side_px / 2
    distance, row = KDTree(coarse.coords + coarse.side_px / 2).query(centres, p=np.inf)
    return np.where(distance <= coarse.side_px / 2, row, -1)

"""Find explanations of slides and return their scores for the page."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from cfusion.errors import DataError
from cfusion.explanation.colour import Scale
from cfusion.explanation.result import METHODS, ZARR_NAME, Explanation, TileScores, read_explanation
from cfusion.files import read_json
from cfusion.view.served_slides import UnknownSlideError
from preprocess.deepzoom import DeepZoom

logger = logging.getLogger(__name__)

MAX_HELD = 4
"""Maximum number of explanations kept in memory."""

MPP_TOLERANCE = 0.01
"""Maximum relative difference between the µm/px of a slide and that of its explanation."""


class Explanations:
    """Explanations of slides in a folder.

    Args:
        root: Output of `cfusion explain`, or a folder of such outputs; None: no explanations.

    Raises:
        DataError: The folder does not exist or contains no explanation.
    """

    def __init__(self, root: Path | None) -> None:
        self.paths: dict[str, Path] = {}
        self._held: OrderedDict[str, Explanation] = OrderedDict()
        self._lock = threading.Lock()
        if root is None:
            return
        for path in [root] if root.suffix == ".zarr" else sorted(root.rglob(ZARR_NAME)):
            try:
                slide_id = str(read_json(path / "zarr.json")["attributes"]["slide_id"])
            except (DataError, KeyError, TypeError) as error:
                logger.warning("%s is not an explanation (%s)", path, error)
                continue
            if slide_id in self.paths:
                logger.warning("%s is ignored: %s is an explanation of the same slide", path, self.paths[slide_id])
            self.paths.setdefault(slide_id, path)
        if not self.paths:
            raise DataError(
                f"{root}: contains no explanation.", "Give an output folder of `cfusion explain`.", topic="viewer"
            )

    def get(self, slide_id: str, zoom: DeepZoom) -> Explanation | None:
        """Return the explanation of a slide; None if there is none.

        Raises:
            DataError: It belongs to another slide of the same name, or cannot be read.
        """
        if slide_id not in self.paths:
            return None
        with self._lock:
            explanation = self._held.pop(slide_id, None) or read_explanation(self.paths[slide_id])
            self._held[slide_id] = explanation
            if len(self._held) > MAX_HELD:
                self._held.popitem(last=False)
        _check_same_slide(explanation, zoom)
        return explanation


def _check_same_slide(explanation: Explanation, zoom: DeepZoom) -> None:
    attrs, slide = explanation.attrs, zoom.slide
    different = None
    if attrs.get("slide_digest") and slide.quickhash and attrs["slide_digest"] != slide.quickhash:
        different = f"its slide had the digest {attrs['slide_digest'][:12]}…, this one has {slide.quickhash[:12]}…"
    elif attrs.get("slide_size_px") and tuple(attrs["slide_size_px"]) != slide.size_px:
        different = f"its slide had {_by(attrs['slide_size_px'])} px, this one has {_by(slide.size_px)}"
    elif any((level.coords >= slide.size_px).any() for level in explanation.levels.values()):
        different = "some of its tiles lie outside this one"
    elif (
        attrs.get("mpp")
        and slide.resolution.source != "default"
        and abs(attrs["mpp"] / slide.resolution.mpp - 1) > MPP_TOLERANCE
    ):
        different = f"its slide had {attrs['mpp']:g} µm/px, this one has {slide.resolution.mpp:g}"
    if different:
        raise DataError(
            f"The explanation belongs to another slide named {explanation.slide_id}: {different}.",
            "Run `cfusion explain` on this slide.", topic="viewer",
        )  # fmt: skip


def _by(size: Any) -> str:
    return " × ".join(str(side) for side in size)


def described(explanation: Explanation) -> dict[str, Any]:
    """Return what the page shows of an explanation before it fetches scores."""
    methods = [name for name in METHODS if name in explanation.methods]
    return {
        "models": len(explanation.risks),
        "tested": explanation.tested,
        "methods": {name: {**METHODS[name].__dict__, "scale": score_scale(explanation, name)} for name in methods},
        "magnifications": {
            name: {
                "side_px": level.side_px,
                "tiles": len(level.coords),
                "verdicts": {m: explanation.verdict(name, m) for m in methods if explanation.has(name, m)},
            }
            for name, level in explanation.levels.items()
        },
    }


def score_scale(explanation: Explanation, method: str) -> dict[str, float | bool]:
    """Return the ends of a method's colour scale at all magnifications, and of a scale that no score is outside of."""
    scale = Scale.of(explanation, method)
    scores = np.concatenate([explanation.scores(name, method) for name in explanation.levels])
    most = max(float(np.nanmax(np.abs(scores))), scale.high)
    return {"low": scale.low, "high": scale.high, "most": most, "clipped": scale.clipped}


def level_of(explanation: Explanation | None, magnification: str) -> TileScores:
    """Return the tiles of one magnification.

    Raises:
        UnknownSlideError: The slide has no scores at this magnification.
    """
    if explanation is None or magnification not in explanation.levels:
        raise UnknownSlideError(f"There are no scores at {magnification[:20]}.")
    return explanation.levels[magnification]


def tile_at(level: TileScores, x_px: float, y_px: float) -> int | None:
    """Return the row of the tile that contains a point in level-0 px; None if there is no such tile."""
    inside = ((level.coords <= (x_px, y_px)) & (level.coords + level.side_px > (x_px, y_px))).all(axis=1)
    rows = np.flatnonzero(inside)
    return int(rows[0]) if len(rows) else None


def lineage(
    explanation: Explanation | None, sides_px: dict[str, float], x_px: float, y_px: float
) -> list[dict[str, Any]]:
    """Find the tile at a point and the coarser tiles that contain it, finest first.

    If a magnification has no tile there, the entry has the position of that tile on the grid.

    Args:
        explanation: The explanation with the tiles; None: return only positions.
        sides_px: Side of a tile in level-0 px, by magnification.
        x_px: x of the point, in level-0 px.
        y_px: y of the point, in level-0 px.

    Returns:
        Per magnification `name, side_px, x_px, y_px` (its corner, level-0 px), `tile` (its row, or null) and
        `scores`: by method `mean` and `sd` (null for one model).
    """
    found = []
    for name in sorted(sides_px, key=lambda n: sides_px[n]):
        side = sides_px[name]
        level = explanation.levels.get(name) if explanation is not None else None
        row = tile_at(level, x_px, y_px) if level is not None else None
        if level is not None and row is not None:
            x, y = level.coords[row].tolist()
        else:
            x, y = (round(np.floor(at / side) * side) for at in (x_px, y_px))
        entry = {"name": name, "side_px": side, "x_px": x, "y_px": y, "tile": row, "scores": {}}
        if explanation is not None and level is not None and row is not None:
            entry["scores"] = {
                method: {"mean": float(level.mean[i, row]), "sd": _or_none(float(level.sd[i, row]))}
                for i, method in enumerate(explanation.methods)
                if np.isfinite(level.mean[i, row])
            }
        found.append(entry)
        if row is not None:
            x_px, y_px = x + side / 2, y + side / 2
    return found


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None

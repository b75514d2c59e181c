"""Phantom slides with a planted region: cells of grave tissue within tissue of low risk, and where they lie.

Both tissues are drawn from the same state of the generator, so that glands, nuclei, colours and borders are the same on
both sides; inside the region the glands lie in order and the chromatin is coarse, or one of the two.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool

from cfusion.errors import ConfigError, DataError
from cfusion.files import atomic_path, read_json, write_text
from preprocess.phantom.draw import CELL_PX, write_drawn_slide
from preprocess.phantom.histology import Stain, draw_tissue

Signal = Literal["both", "architecture", "nuclei"]

LOW, HIGH = 0.1, 0.9
"""Order of the glands and coarseness of the chromatin, outside and inside the region."""


@dataclass(frozen=True)
class PlantedSlide:
    """A drawn slide and its truth.

    Attributes:
        slide: The slide.
        region: GeoJSON of the planted cells, level-0 px; QuPath opens it together with the scores.
    """

    slide: Path
    region: Path


def draw_planted(
    folder: str | os.PathLike[str],
    name: str,
    planted: Bool[np.ndarray, "row column"],
    *,
    signal: Signal = "both",
    stain: Stain | None = None,
    seed: int = 0,
) -> PlantedSlide:
    """Draw one slide at 20x whose planted cells carry the signal, and write where they lie.

    Args:
        folder: Gets `NAME.svs` and `NAME.planted.geojson`.
        name: Of the slide.
        planted: For each cell of 1024 × 1024 px whether it is planted.
        signal: What is raised inside the region; the other stays low.
        stain: Colours; None: those of `phantom-a`.
        seed: Of the pixels.

    Raises:
        ConfigError: No cell, or every cell, is planted.
    """
    if planted.all() or not planted.any():
        raise ConfigError(f"{name}: {int(planted.sum())} of {planted.size} cells are planted; both kinds are needed.")
    folder = Path(folder)
    rows, columns = planted.shape
    architecture, nuclei = (HIGH if signal in ("both", kind) else LOW for kind in ("architecture", "nuclei"))
    inside, outside = (
        draw_tissue(rows * CELL_PX, columns * CELL_PX, a, n, stain or Stain(), np.random.default_rng([seed, 1]))
        for a, n in ((architecture, nuclei), (LOW, LOW))
    )
    where = planted.repeat(CELL_PX, axis=0).repeat(CELL_PX, axis=1)
    image = np.where(where[..., None], inside, outside)
    files = PlantedSlide(folder / f"{name}.svs", folder / f"{name}.planted.geojson")
    with atomic_path(files.slide) as temporary:
        write_drawn_slide(temporary, image, 20)
    write_text(files.region, json.dumps(_geojson(planted, signal)) + "\n")
    return files


def read_planted(region: Path, centres: np.ndarray) -> Bool[np.ndarray, " tile"]:
    """Whether each point lies in the planted region.

    Args:
        region: GeoJSON that `draw_planted` wrote.
        centres: [tile, 2], x and y in level-0 px.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        rings = [np.array(f["geometry"]["coordinates"][0], float) for f in read_json(region)["features"]]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{region}: is not the region of a planted slide ({error}).") from error
    inside = np.zeros(len(centres), bool)
    for ring in rings:
        inside |= ((centres >= ring.min(axis=0)) & (centres < ring.max(axis=0))).all(axis=1)
    return inside


def _geojson(planted: np.ndarray, signal: str) -> dict[str, object]:
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [(np.add(corners, (column, row)) * CELL_PX).tolist()]},
            "properties": {
                "objectType": "annotation",
                "name": f"planted {signal}",
                "classification": {"name": "Planted", "color": [200, 0, 0]},
            },
        }
        for row, column in np.argwhere(planted).tolist()
    ]
    return {"type": "FeatureCollection", "features": features}


__all__ = ["HIGH", "LOW", "PlantedSlide", "Signal", "draw_planted", "read_planted"]

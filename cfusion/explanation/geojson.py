"""Write scores as tile objects for QuPath: drag the file onto the slide, then Measure → Show measurement maps.

The file follows RFC 7946: closed rings, counterclockwise, an id for each feature. As QuPath does, and as section 4 of
the RFC allows between programs that agree, the coordinates are not degrees but level-0 px from the slide's upper left
corner. The fields are those of QuPath's export (qupath.lib.io.PathObjectTypeAdapters, 0.4 and later): `objectType`,
`name`, `color`, `classification`, `measurements` by name.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from cfusion.explanation.colour import Scale
from cfusion.explanation.result import METHODS, Explanation
from cfusion.files import atomic_path
from cfusion.types import magnification_words

RAISES = {"name": "Raises risk", "color": [178, 24, 43]}
LOWERS = {"name": "Lowers risk", "color": [33, 102, 172]}
NOISE = {"name": "May be noise", "color": [140, 140, 140]}
"""Classes in QuPath, by the sign of the leading method's mean over folds."""


def write_geojson(explanation: Explanation, magnification: str, target: str | os.PathLike[str]) -> None:
    """Write the tiles of one magnification as a FeatureCollection, one tile per line, as a stream.

    The class of a tile is the sign of the leading method (`Explanation.leading`), or that it may be noise, and its
    colour is on that method's scale. The measurements are every method's mean and spread, with the unit in the name.
    """
    with atomic_path(target) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write('{"type": "FeatureCollection", "features": [')
        for row, feature in enumerate(_features(explanation, magnification)):
            stream.write((",\n" if row else "\n") + json.dumps(feature, allow_nan=False))
        stream.write("\n]}\n")


def _features(explanation: Explanation, magnification: str) -> Iterator[dict[str, Any]]:
    level = explanation.levels[magnification]
    leading = explanation.leading(magnification)
    scores = explanation.scores(magnification, leading)
    clear = explanation.stands_out(magnification, leading)
    colours = (Scale.of(explanation, leading).colours(scores, clear) * 255).round().astype(int)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]) * level.side_px
    for row, origin in enumerate(level.coords):
        ring = (origin + corners).round(1).tolist()
        properties: dict[str, Any] = {
            "objectType": "tile",
            "name": f"{magnification_words(magnification)} tile {row}",
            "measurements": _measurements(explanation, magnification, row),
        }
        if np.isfinite(scores[row]):
            properties["color"] = colours[row, :3].tolist()
            properties["classification"] = (RAISES if scores[row] > 0 else LOWERS) if clear[row] else NOISE
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"cfusion:{explanation.slide_id}/{magnification}/{row}")),
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": properties,
        }


def _measurements(explanation: Explanation, magnification: str, row: int) -> dict[str, float]:
    level = explanation.levels[magnification]
    values = {}
    for number, method in enumerate(explanation.methods):
        unit = METHODS[method].unit
        values[f"{method} ({unit})"] = float(level.mean[number, row])
        values[f"{method} sd over folds ({unit})"] = float(level.sd[number, row])
    return {name: value for name, value in values.items() if np.isfinite(value)}


__all__ = ["LOWERS", "NOISE", "RAISES", "write_geojson"]

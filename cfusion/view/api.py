"""Answer the requests of the page: list of slides, one slide, its tiles, scores and survival.

No address contains a file path; slides have keys.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import cfusion
from cfusion.errors import CfusionError, DataError
from cfusion.explanation.colour import FADED, MAPS, map_colours
from cfusion.explanation.result import Explanation
from cfusion.types import magnification_name, magnification_value
from cfusion.view import openseadragon
from cfusion.view.explanations import Explanations, described, level_of, lineage
from cfusion.view.patient_curve import CohortCurves, patient_panel
from cfusion.view.picture_cache import PictureCache
from cfusion.view.served_slides import ServedSlide, SlideFolder, SlideGoneError, UnknownSlideError, stamp_of
from preprocess.deepzoom import OVERLAP_PX, TILE_PX, DeepZoom, NotReadyError
from preprocess.grid import TILE_PX as PATCH_PX
from preprocess.resolution import scale_of

logger = logging.getLogger(__name__)

PICTURE_BYTES = 128 << 20
MAGNIFICATIONS = (20.0, 10.0, 5.0)
"""Magnifications of the patches that the inspector always shows, with or without scores."""

LIST_PX = 160
STILL_PX = 2048
"""Longest side of the overview picture of a slide, in the list and as the replacement of deep zoom."""

ASSETS = {
    "view.css": "text/css", "app.js": "text/javascript", "controls.js": "text/javascript",
    "heatmap.js": "text/javascript", "panels.js": "text/javascript", "stage.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}  # fmt: skip
PALETTES = {
    "sequential": (MAPS[False], "inferno", "cividis"),
    "diverging": (MAPS[True], "PuOr_r", "coolwarm"),
}
"""Colour maps of matplotlib; the first of each kind is that of the page of `cfusion explain`, and the default. All are
readable with colour vision deficiency."""

STATUS: dict[type[Exception], int] = {
    SlideGoneError: 410, UnknownSlideError: 404, NotReadyError: 503, CfusionError: 422,
}  # fmt: skip


@dataclass
class Viewer:
    """What the viewer shows.

    Attributes:
        slides: The slides.
        explanations: Explanations of the slides.
        curves: The run with the patients of the slides; None if no run was given.
        deep_zoom: Script and licence of OpenSeadragon by file name; empty if it was not fetched.
        deep_zoom_trouble: Why deep zoom is unavailable; empty if it is available.
        pictures: Cache of drawn tiles and patches.
    """

    slides: SlideFolder
    explanations: Explanations
    curves: CohortCurves | None = None
    deep_zoom: dict[str, bytes] = field(default_factory=dict)
    deep_zoom_trouble: str = ""
    pictures: PictureCache = field(default_factory=lambda: PictureCache(PICTURE_BYTES))


def load_deep_zoom(viewer: Viewer) -> None:
    """Load OpenSeadragon from the user's cache, or record why it is unavailable."""
    try:
        viewer.deep_zoom = openseadragon.load() or {}
        viewer.deep_zoom_trouble = "" if viewer.deep_zoom else "OpenSeadragon has not been fetched."
    except DataError as error:
        viewer.deep_zoom_trouble = str(error)


def routes(viewer: Viewer, lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]]) -> Starlette:
    """Build the application that serves a viewer."""
    api = _Api(viewer)
    slide = "/slides/{key}"
    table: dict[str, Callable[[Request], Response]] = {
        "/": api.page,
        "/assets/{name}": api.asset,
        "/api/state": api.state,
        "/api/palettes": api.palettes,
        f"/api{slide}": api.slide,
        f"/api{slide}/lineage": api.lineage,
        f"/api{slide}/scores/{{magnification}}/{{what}}": api.scores,
        f"{slide}/tiles/{{level:int}}/{{column:int}}_{{row:int}}.jpg": api.tile,
        f"{slide}/patch.jpg": api.patch,
        f"{slide}/still.jpg": api.still,
    }
    handlers: dict[Any, Any] = dict.fromkeys((*STATUS, HTTPException, Exception), _error_response)
    return Starlette(
        routes=[Route(path, answer) for path, answer in table.items()], exception_handlers=handlers, lifespan=lifespan
    )


def _error_response(request: Request, error: Exception) -> Response:
    """Convert an error to the JSON that the page shows."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail, "remedy": ""}, error.status_code, headers=error.headers)
    if isinstance(error, CfusionError):
        status = next(code for kind, code in STATUS.items() if isinstance(error, kind))
        return JSONResponse({"error": error.message, "remedy": error.remedy}, status)
    return JSONResponse({"error": "The viewer failed; see the error in its terminal.", "remedy": ""}, 500)


class _Api:
    """One method per address; the methods run in threads."""

    def __init__(self, viewer: Viewer) -> None:
        self._viewer = viewer

    def page(self, request: Request) -> Response:
        return _asset("index.html", "text/html; charset=utf-8")

    def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name == "openseadragon.min.js" and name in self._viewer.deep_zoom:
            return Response(self._viewer.deep_zoom[name], media_type="text/javascript")
        if name == "openseadragon-LICENSE.txt" and self._viewer.deep_zoom:
            return Response(self._viewer.deep_zoom["LICENSE.txt"], media_type="text/plain")
        if name not in ASSETS:
            raise HTTPException(404, "File not found.")
        return _asset(name, ASSETS[name])

    def state(self, request: Request) -> Response:
        viewer = self._viewer
        slides = [
            {"key": slide.key, "id": slide.slide_id, "name": slide.name, "trouble": viewer.slides.trouble(slide),
             "version": _version(slide),
             "explained": slide.slide_id in viewer.explanations.paths}
            for slide in viewer.slides.slides.values()
        ]  # fmt: skip
        slides.sort(key=lambda slide: (not slide["explained"], slide["name"]))
        return JSONResponse({
            "folder": viewer.slides.root.resolve().name, "slides": slides, "probing": viewer.slides.probing,
            "deep_zoom": not viewer.deep_zoom_trouble, "deep_zoom_trouble": viewer.deep_zoom_trouble,
            "run": viewer.curves.name if viewer.curves is not None else None, "version": cfusion.__version__,
        })  # fmt: skip

    def palettes(self, request: Request) -> Response:
        return JSONResponse({**_palettes(), "faded": [round(255 * channel) for channel in FADED]})

    def slide(self, request: Request) -> Response:
        slide = self._slide(request)
        with self._viewer.slides.lease(slide) as zoom:
            explanation, trouble = self._explanation(slide, zoom)
            mpp = self._viewer.slides.mpp(zoom)
            width, height = zoom.slide.size_px
            return JSONResponse({
                "key": slide.key, "id": slide.slide_id, "name": slide.name, "width": width, "height": height,
                "mpp": mpp, "mpp_source": zoom.slide.resolution.source if mpp else None, "vendor": zoom.slide.vendor,
                "levels": zoom.levels, "tile_px": TILE_PX, "overlap_px": OVERLAP_PX,
                "version": _version(slide), "ready": self._viewer.slides.prepare(slide, zoom),
                "explanation": described(explanation) if explanation is not None else None,
                "explanation_trouble": trouble,
                "patient": patient_panel(self._viewer.curves, slide.slide_id, explanation),
            })  # fmt: skip

    def lineage(self, request: Request) -> Response:
        x, y = _number(request, "x"), _number(request, "y")
        slide = self._slide(request)
        with self._viewer.slides.lease(slide) as zoom:
            explanation, _ = self._explanation(slide, zoom)
            mpp = self._viewer.slides.mpp(zoom)
            sides, trouble = _sides(explanation, slide, mpp)
        width, height = zoom.slide.size_px
        if not (0 <= x < width and 0 <= y < height):
            raise UnknownSlideError(f"{x:.0f}, {y:.0f} is outside the slide ({width} × {height} px).")
        return JSONResponse({
            "x_px": x, "y_px": y, "mpp": mpp, "tiles": lineage(explanation, sides, x, y), "trouble": trouble,
        })  # fmt: skip

    def scores(self, request: Request) -> Response:
        """Return little-endian bytes: i32 x, y of every tile's corner for `coords`, f32 per tile for a method.

        With the query `stands-out`, a method's answer is u8 per tile: 1 if it is coloured, 0 if it may be noise.
        """
        slide, what = self._slide(request), request.path_params["what"]
        with self._viewer.slides.lease(slide) as zoom:
            explanation, trouble = self._explanation(slide, zoom)
        if trouble:
            raise DataError(trouble)
        name = request.path_params["magnification"]
        level = level_of(explanation, name)
        if what == "coords":
            array = level.coords.astype("<i4")
        elif explanation is None or what not in explanation.methods:
            raise UnknownSlideError(f"There are no scores of the method {what[:20]}.")
        elif "stands-out" in request.query_params:
            array = explanation.stands_out(name, what).astype("u1")
        else:
            array = explanation.scores(name, what).astype("<f4")
        return Response(np.ascontiguousarray(array).tobytes(), media_type="application/octet-stream")

    def tile(self, request: Request) -> Response:
        level, column, row = (request.path_params[name] for name in ("level", "column", "row"))
        try:
            return self._picture(request, ("tile", level, column, row), lambda zoom: zoom.tile(level, column, row))
        except IndexError as error:
            raise UnknownSlideError(f"There is no such tile: {error}.") from error

    def patch(self, request: Request) -> Response:
        x, y = (round(_number(request, name)) for name in ("x", "y"))
        side = _number(request, "side")
        return self._picture(request, ("patch", x, y, side), lambda zoom: zoom.patch(x, y, side))

    def still(self, request: Request) -> Response:
        longest = STILL_PX if request.query_params.get("size") == "large" else LIST_PX
        return self._picture(request, ("still", longest), lambda zoom: zoom.still(longest))

    def _picture(self, request: Request, what: tuple[object, ...], draw: Callable[[DeepZoom], Image.Image]) -> Response:
        slide = self._slide(request)
        with self._viewer.slides.lease(slide) as zoom:
            key = (slide.key, stamp_of(slide.path), *what)
            picture = self._viewer.pictures.jpeg(key, lambda: draw(zoom))
        # The addresses in the page contain the version of the file, so browsers may cache the pictures.
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    def _slide(self, request: Request) -> ServedSlide:
        return self._viewer.slides.get(request.path_params["key"])

    def _explanation(self, slide: ServedSlide, zoom: DeepZoom) -> tuple[Explanation | None, str]:
        try:
            return self._viewer.explanations.get(slide.slide_id, zoom), ""
        except DataError as error:
            return None, str(error)


def _version(slide: ServedSlide) -> str:
    """Return a version that changes with the file; it is part of the addresses of pictures, which browsers cache."""
    return "-".join(f"{part:x}" for part in stamp_of(slide.path) or ())


def _number(request: Request, name: str) -> float:
    text = request.query_params.get(name, "")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise HTTPException(400, f"{name}={text[:20]!r}: expected a number of level-0 px.")
    return value


def _sides(explanation: Explanation | None, slide: ServedSlide, mpp: float | None) -> tuple[dict[str, float], str]:
    """Return the side of a tile in level-0 px by magnification, and the reason if there are none."""
    scored = {name: level.side_px for name, level in explanation.levels.items()} if explanation is not None else {}
    if scored:
        name = next(iter(scored))
        side_at_1x = scored[name] * magnification_value(name)
    elif mpp is None:
        return {}, "The resolution of the slide is unknown, so no tile can be placed; set --default-mpp."
    else:
        try:
            finest = scale_of(slide.slide_id, mpp, MAGNIFICATIONS[0], "nominal").factor
        except DataError as error:
            return {}, str(error)
        side_at_1x = PATCH_PX * finest * MAGNIFICATIONS[0]
    return {magnification_name(m): side_at_1x / m for m in MAGNIFICATIONS} | scored, ""


@cache
def _palettes() -> dict[str, dict[str, list[list[int]]]]:
    steps = np.linspace(0, 1, 256)
    return {
        kind: {
            name: np.rint(255 * map_colours(name, steps, signed=kind == "diverging")).astype(int).tolist()
            for name in names
        }
        for kind, names in PALETTES.items()
    }


def _asset(name: str, media_type: str) -> Response:
    content = resources.files("cfusion.view").joinpath("assets", name).read_bytes()
    return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

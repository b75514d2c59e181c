"""Render the page of one slide (risk, survival curve, heatmaps, tiles, faithfulness) as one self-contained file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import UInt8
from markupsafe import Markup
from PIL import Image

import cfusion
from cfusion.explanation.colour import Scale
from cfusion.explanation.faithfulness import deletion_areas, draw_deletion
from cfusion.explanation.gallery import Strip, sides
from cfusion.explanation.result import METHODS, Explanation
from cfusion.report.number_words import UNDEFINED, decimal, significant
from cfusion.report.page_environment import page_environment
from cfusion.report.svg import Plot, number
from cfusion.survival.curves import is_high_risk
from cfusion.types import magnification_words

Painted = Mapping[str, Mapping[str, UInt8[np.ndarray, "y x 3"]]]


def render_slide_page(
    explanation: Explanation,
    painted: Painted,
    with_noise: Painted,
    galleries: Mapping[str, list[Strip]] | None,
    curves: pd.DataFrame | None,
) -> str:
    """Render the page as HTML.

    Args:
        explanation: The explanation to show.
        painted: Heatmaps by method and magnification.
        with_noise: The same with what may be noise coloured; empty if nothing shows which tiles may be.
        galleries: Tiles by magnification; None if the slide was not available.
        curves: Deletion curves; None if they were not computed.
    """
    environment = page_environment("cfusion.explanation", magnified=magnification_words, num=decimal)
    attrs, cutoff = explanation.attrs, explanation.attrs["risk_cutoff"]
    style = files("cfusion.report").joinpath("templates", "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(
        style=Markup(style),  # noqa: S704 - our own style sheet
        slide_id=explanation.slide_id,
        models=len(explanation.risks),
        model=attrs["model"],
        cohort=attrs["cohort"],
        endpoint=attrs["endpoint"],
        risk=explanation.risk,
        risk_sd=explanation.risk_sd,
        note=attrs.get("note"),
        meaning=explanation.meaning,
        cutoff=cutoff,
        group=None if cutoff is None else "high" if is_high_risk(explanation.risk, cutoff) else "low",
        curve=Markup(draw_curve(explanation)),  # noqa: S704 - figures escape their words
        summary=_table(explanation.summary()),
        heatmaps=[
            _heatmaps(explanation, method, pictures, with_noise.get(method, {})) for method, pictures in painted.items()
        ],
        galleries=galleries and {name: _gallery(explanation, name, strips) for name, strips in galleries.items()},
        tested=explanation.tested,
        ranking=explanation.ranking_text,
        above_chance=explanation.ranking is not None and explanation.ranking.above_chance,
        deletion=_deletion(explanation, curves),
        areas=_table(deletion_areas(curves)) if curves is not None else "",
        methods={name: METHODS[name] for name in METHODS if name in explanation.methods},
        provenance=_provenance(explanation),
    )


def draw_curve(explanation: Explanation) -> str:
    """Draw the predicted survival curve as SVG, with one standard deviation over folds."""
    curve = explanation.curve
    months, survival = curve["months"].tolist(), curve["survival"].to_numpy()
    plot = Plot((0, months[-1]), (0, 1), height=250)
    plot.axes("months", "survival")
    spread = curve["survival_sd"].to_numpy()
    if np.isfinite(spread).all():
        low, high = np.clip(survival - spread, 0, 1), np.clip(survival + spread, 0, 1)
        plot.step_band(months, low.tolist(), high.tolist(), "band low")
    plot.steps(months, survival.tolist(), "line low")
    values = ", ".join(f"{number(m)} months {s:.2f}" for m, s in zip(months[1:], survival[1:], strict=True))
    return plot.finish(f"Predicted survival, {explanation.slide_id}", f"Survival at {values}.")


def _table(frame: pd.DataFrame) -> Markup:
    frame = frame.assign(magnification=frame["magnification"].str.replace(r"^x(\d.*)$", r"\1x", regex=True))
    frame = frame.rename(columns=lambda name: name.replace("_", " "))
    return Markup(frame.to_html(index=False, float_format=significant, border=0, na_rep=UNDEFINED))  # noqa: S704 - pandas escapes


def _deletion(explanation: Explanation, curves: pd.DataFrame | None) -> list[Markup]:
    if curves is None:
        return []
    names = [name for name in explanation.levels if (curves["magnification"] == name).any()]
    return [Markup(draw_deletion(curves, name, explanation.slide_id)) for name in names]  # noqa: S704 - escaped


def _heatmaps(
    explanation: Explanation, method: str, pictures: Mapping[str, np.ndarray], with_noise: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Return what the template needs of one method: its scale, and pictures and a sentence per magnification."""
    scale = Scale.of(explanation, method)
    stops = matplotlib.colormaps[scale.map_name](np.linspace(0, 1, 17), bytes=True)[:, :3]
    middle = 0.0 if METHODS[method].signed else scale.high / 2
    return {
        "name": method,
        "unit": METHODS[method].unit,
        "signed": METHODS[method].signed,
        "gradient": ", ".join("rgb({} {} {})".format(*stop) for stop in stops.tolist()),
        "ends": [significant(value) for value in (scale.low, middle, scale.high)],
        "clipped": scale.clipped,
        "pictures": {
            name: {
                "source": _source(Image.fromarray(picture)),
                "with_noise": _source(Image.fromarray(with_noise[name])) if name in with_noise else None,
                "verdict": explanation.verdict(name, method),
            }
            for name, picture in pictures.items()
        },
    }


def _gallery(explanation: Explanation, name: str, strips: list[Strip]) -> dict[str, Any]:
    """Return what the template needs of the gallery of one magnification."""
    return {
        "method": explanation.leading(name),
        "sides": {
            words: [(_source(strip.picture), strip.caption, strip.words) for strip in shown]
            for _, words, shown in sides(strips)
        },
    }


def _source(picture: Image.Image) -> str:
    """Return a picture as a data URL; as JPEG, which for tissue needs a tenth of the bytes of PNG."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _provenance(explanation: Explanation) -> dict[str, Any]:
    attrs = explanation.attrs
    size = attrs.get("slide_size_px")
    return {
        "encoder": attrs["encoder"],
        "tiles": ", ".join(
            f"{len(level.coords)} at {magnification_words(name)}" for name, level in explanation.levels.items()
        ),
        "slide": f"{size[0]} × {size[1]} px" if size else "unknown size",
        "resolution": f"{attrs['mpp']:g} µm/px" if attrs.get("mpp") else "unknown",
        "program": f"cfusion {cfusion.__version__}",
    }


__all__ = ["draw_curve", "render_slide_page"]

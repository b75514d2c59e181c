"""Hold the scores of every tile of a slide, and write and read their zarr group.

`explanation.zarr` is a zarr v3 group. Its attributes:

- `format`: `cfusion-explanation-1`;
- `slide_id`, `encoder`, `slide_size_px` ([width, height] of level 0), `mpp` (µm per level-0 px), `slide_digest`
  (OpenSlide's quickhash): null if missing from the feature store;
- `model` (name of the model), `models` (number of folds), `cohort`, `endpoint`;
- `note`, what a reader must know of patients of the training, or null;
- `risk_percentile`, the percentage of the training patients with a lower risk (mean over folds), or null;
- `risk`, `risk_sd` (over folds; null for one model), `risks` (one per fold), `risk_cutoff` (mean over folds of the
  median risk of the training patients, or null);
- `ranking`: how the run ranks held-out patients (`cindex`, `chance`, `p`, `patients`, `events`; see
  `cfusion.apply.ranking`), or null if that is unknown; if `p` is above 0.05, every score may be noise;
- `months`, `survival`, `survival_sd`: the curve, mean and spread over folds;
- `methods`: by name, in the order of the rows of `scores`: `{"unit", "signed", "meaning", "neutral"}`. `signed` scores
  are above 0 if a tile raises the risk and need a diverging colour scale around 0; unsigned scores are never below 0;
  `neutral` is the score of a tile without effect;
- `magnifications`: names, finest first; `program_version`.

Each magnification has a group `x20`, `x10`, … with the attribute `tile_px_level0` (side of a tile in level-0 px) and

- `coords` i32 [tile, 2]: x, y of the top-left corner in level-0 px, in the order of the feature store;
- `scores` f32 [method, tile]: mean over folds; NaN if the method has no score at this magnification;
- `sd` f32 [method, tile]: standard deviation over folds; NaN for one model;
- `p` f32 [method, tile]: p-value that the models' mean is the score of a tile without effect (see
  `cfusion.explanation.noise`); NaN where there is no score; absent for one model, and in files of earlier versions;
- `parent` i32 [tile]: row in the next coarser magnification; absent at the coarsest, or if the source has no parents.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float32, Int32

import cfusion
from cfusion.apply.ranking import RunRanking
from cfusion.errors import DataError
from cfusion.explanation.noise import LEVEL, more_than_noise
from cfusion.files import atomic_path
from cfusion.survival.curves import risk_words, survival_after_years
from cfusion.types import magnification_value, magnification_words, titled_table

EXPLANATION_FORMAT = "cfusion-explanation-1"

ZARR_NAME = "explanation.zarr"
"""File name of the group in the folder of an explanation."""


@dataclass(frozen=True)
class Method:
    """A way to score tiles.

    Attributes:
        unit: Unit of the scores.
        signed: Whether scores can be below 0, for tiles that lower the risk.
        meaning: Explanation of a score, as a sentence.
        neutral: Score of a tile without effect.
    """

    unit: str
    signed: bool
    meaning: str
    neutral: float = 0.0


METHODS = {
    "occlusion": Method(
        "risk",
        True,
        "Decrease in risk when the tile and the finer tiles inside it are removed. If tiles are removed in squares, "
        "the decrease is divided equally among the tiles of a square.",
    ),
    "gradient": Method(
        "risk",
        True,
        "Embedding times gradient of the risk: to first order, the decrease in risk if the embedding were zero.",
    ),
    "attention": Method(
        "× the mean tile",
        False,
        "Attention relative to the average tile (1 = average). It shows what the model reads, not whether the tile "
        "raises the risk: tiles of high attention may lower it.",
        1.0,
    ),
}
"""All methods, in the order in which they are shown; an explanation contains those that were requested and that its
model supports."""


@dataclass(frozen=True)
class TileScores:
    """The tiles of one magnification and their scores.

    Attributes:
        coords: Top-left corners in level-0 px.
        side_px: Side of a tile in level-0 px.
        mean: Mean over folds; rows are the explanation's methods; NaN if a method has no scores.
        sd: Standard deviation over folds; NaN for one model.
        parent: Row in the next coarser magnification; None at the coarsest, or if the source has no parents.
        p: p-value that a tile has no effect; NaN if a method has no scores; None if it was not tested.
    """

    coords: Int32[np.ndarray, "tile 2"]
    side_px: float
    mean: Float32[np.ndarray, "method tile"]
    sd: Float32[np.ndarray, "method tile"]
    parent: Int32[np.ndarray, " tile"] | None = None
    p: Float32[np.ndarray, "method tile"] | None = None


@dataclass(frozen=True, repr=False)
class Explanation:
    """Explanation of the risk that a fold ensemble predicts for a slide.

    Attributes:
        slide_id: The slide.
        methods: Keys of `METHODS`, in the order of the rows of the scores.
        levels: Scores by magnification name, finest first.
        curve: Predicted survival, columns `months, survival, survival_sd`.
        risks: One risk per fold.
        attrs: Other attributes of the zarr group: encoder, model, cohort, endpoint, slide size, µm/px, risk cut-off.
    """

    slide_id: str
    methods: tuple[str, ...]
    levels: dict[str, TileScores]
    curve: pd.DataFrame
    risks: tuple[float, ...]
    attrs: dict[str, Any]

    @property
    def risk(self) -> float:
        """Mean over folds; higher is worse."""
        return float(np.mean(self.risks))

    @property
    def risk_sd(self) -> float:
        """Standard deviation over folds; NaN for one model."""
        return float(np.std(self.risks)) if len(self.risks) > 1 else float("nan")

    @property
    def meaning(self) -> str:
        """What the risk means: its place among the training patients and survival after years; see `risk_words`."""
        percentile = self.attrs.get("risk_percentile")
        years = survival_after_years(self.curve["months"].to_numpy(), self.curve["survival"].to_numpy())
        return risk_words(float("nan") if percentile is None else percentile, years)

    @property
    def risk_text(self) -> str:
        """The risk as text: `risk -1.881 ± 0.120 over 5 models, above 82% of the training patients; …`."""
        if len(self.risks) == 1:
            number = f"risk {self.risk:.3f}, one model"
        else:
            number = f"risk {self.risk:.3f} ± {self.risk_sd:.3f} over {len(self.risks)} models"
        return ", ".join(filter(None, [number, self.meaning]))

    def scores(self, magnification: str, method: str) -> Float32[np.ndarray, " tile"]:
        """Return the mean scores of one method for the tiles of one magnification."""
        return self.levels[magnification].mean[self.methods.index(method)]

    def has(self, magnification: str, method: str) -> bool:
        """Return whether the method has scores at this magnification."""
        return bool(np.isfinite(self.scores(magnification, method)).any())

    @property
    def ranking(self) -> RunRanking | None:
        """How the run ranks held-out patients; None if unknown."""
        record = self.attrs.get("ranking")
        return None if record is None else RunRanking(**record)

    @property
    def ranking_text(self) -> str:
        """What the ranking of held-out patients means for the scores, as a sentence."""
        if self.ranking is None:
            return "It is not known whether the run ranks held-out patients better than chance."
        if self.ranking.above_chance:
            return f"The run ranks held-out patients better than chance ({self.ranking})."
        return f"The run does not rank held-out patients better than chance ({self.ranking}): every score may be noise."

    @property
    def tested(self) -> bool:
        """Whether something shows which scores may be noise; otherwise every tile is coloured."""
        return self._only_noise or self._has_p

    @property
    def _only_noise(self) -> bool:
        return self.ranking is not None and not self.ranking.above_chance

    @property
    def _has_p(self) -> bool:
        return all(level.p is not None for level in self.levels.values())

    def stands_out(self, magnification: str, method: str) -> Bool[np.ndarray, " tile"]:
        """Return which tiles are coloured: the run ranks held-out patients, and its models agree on the tile's score.

        All that are scored if nothing shows which may be noise.
        """
        scored = np.isfinite(self.scores(magnification, method))
        p = self.levels[magnification].p
        if self._only_noise:
            return np.zeros_like(scored)
        return scored if p is None else scored & (p[self.methods.index(method)] <= LEVEL)

    def verdict(self, magnification: str, method: str) -> str:
        """Say on how many tiles the models agree, or why that says nothing, in one or two sentences."""
        where, models = magnification_words(magnification), len(self.risks)
        if self._only_noise:
            return self.ranking_text
        if not self._has_p:
            if models == 1:
                return f"There is one model, so nothing shows which tiles at {where} are noise."
            return (
                f"This explanation has no p-values, so nothing shows which tiles at {where} are noise: run "
                "`cfusion explain` again."
            )
        count = int(self.stands_out(magnification, method).sum())
        tiles = int(np.isfinite(self.scores(magnification, method)).sum())
        found = f"the {models} models agree on {count} of {tiles} tiles at {where}"
        if not more_than_noise(count, tiles):
            return f"No tile at {where} matters: {found}, which is no more than chance gives ({LEVEL:.0%})."
        return f"{found[0].upper()}{found[1:]}; chance gives {LEVEL:.0%}."

    def leading(self, magnification: str) -> str:
        """Return the signed method for ranking tiles: occlusion, which runs the model, or else input×gradient."""
        return "occlusion" if "occlusion" in self.methods and self.has(magnification, "occlusion") else "gradient"

    def table(self, magnification: str) -> pd.DataFrame:
        """Return one row per tile: `x_px, y_px` (level 0), then each method's mean and `METHOD_sd`."""
        level = self.levels[magnification]
        columns: dict[str, Any] = {"x_px": level.coords[:, 0], "y_px": level.coords[:, 1]}
        for row, method in enumerate(self.methods):
            columns[method], columns[f"{method}_sd"] = level.mean[row], level.sd[row]
        return pd.DataFrame(columns).rename_axis("tile")

    def summary(self) -> pd.DataFrame:
        """Return one row per magnification and method: tiles, range of the scores, and mean spread over folds."""
        rows = [
            {
                "magnification": name, "method": method, "unit": METHODS[method].unit, "tiles": len(level.coords),
                "coloured": int(self.stands_out(name, method).sum()) if self.tested else np.nan,
                "lowest": np.nanmin(level.mean[row]), "highest": np.nanmax(level.mean[row]),
                "sd_over_folds": level.sd[row].mean(),
            }
            for name, level in self.levels.items()
            for row, method in enumerate(self.methods)
            if self.has(name, method)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        tiles = ", ".join(f"{name}: {len(level.coords)}" for name, level in self.levels.items())
        return f"Explanation({self.slide_id}: {self.risk_text}; tiles {tiles}; {', '.join(self.methods)})"

    def _repr_html_(self) -> str:
        return titled_table(f"{self.slide_id}: {self.risk_text}", self.summary())


def write_explanation(explanation: Explanation, target: str | os.PathLike[str]) -> None:
    """Write an explanation as a zarr group, atomically; the docstring of the module defines the format."""
    import zarr

    with atomic_path(target) as temporary:
        group = zarr.open_group(temporary, mode="w", zarr_format=3)
        group.attrs.update(
            {
                **explanation.attrs,
                "format": EXPLANATION_FORMAT,
                "program_version": cfusion.__version__,
                "slide_id": explanation.slide_id,
                "risk": explanation.risk,
                "risk_sd": explanation.risk_sd if len(explanation.risks) > 1 else None,
                "risks": list(explanation.risks),
                "models": len(explanation.risks),
                **{
                    name: [None if np.isnan(v) else float(v) for v in explanation.curve[name]]
                    for name in ("months", "survival", "survival_sd")
                },
                "methods": {name: METHODS[name].__dict__ for name in explanation.methods},
                "magnifications": list(explanation.levels),
            }
        )
        for name, level in explanation.levels.items():
            arrays = {
                "coords": level.coords, "scores": level.mean, "sd": level.sd, "parent": level.parent, "p": level.p,
            }  # fmt: skip
            for key, array in arrays.items():
                if array is not None:
                    group.create_array(f"{name}/{key}", data=array)
            group[name].attrs["tile_px_level0"] = float(level.side_px)


def read_explanation(path: str | os.PathLike[str]) -> Explanation:
    """Read an explanation from its zarr group, or from the folder that contains the group.

    Raises:
        DataError: There is no explanation, or it has another format.
    """
    import zarr

    path = Path(path)
    path = path if path.suffix == ".zarr" else path / ZARR_NAME
    try:
        group: Any = zarr.open_group(path, mode="r")
        attrs = dict(group.attrs)
        if attrs.get("format") != EXPLANATION_FORMAT:
            raise DataError(f"{path}: its format is {attrs.get('format')!r}, expected {EXPLANATION_FORMAT!r}.")
        levels = {
            name: _read_level(group[name])
            for name in sorted(attrs["magnifications"], key=magnification_value, reverse=True)
        }
        curve = pd.DataFrame({n: np.array(attrs.pop(n), float) for n in ("months", "survival", "survival_sd")})
        methods, risks = tuple(attrs.pop("methods")), tuple(attrs.pop("risks"))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: is not an explanation ({error}).", "Run `cfusion explain` again.") from error
    return Explanation(attrs.pop("slide_id"), methods, levels, curve, risks, attrs)


def _read_level(group: Any) -> TileScores:
    coords, mean, sd = (np.asarray(group[key][:]) for key in ("coords", "scores", "sd"))
    parent, p = (np.asarray(group[key][:]) if key in group else None for key in ("parent", "p"))
    return TileScores(coords, float(group.attrs["tile_px_level0"]), mean, sd, parent, p)

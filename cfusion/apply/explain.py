"""Explain the slides of opened inputs, each in a separate folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.apply.inputs import Inputs
from cfusion.apply.ranking import RunRanking
from cfusion.cohort.slide_owners import SlideOwners, read_owners
from cfusion.data.tile_places import LEVEL_0, check_on_slide, coords_space, on_slide
from cfusion.errors import CfusionError, ConfigError, DataError, PartialResultError
from cfusion.explanation import Explanation, explain
from cfusion.explanation.explanation_files import check_target, write_results
from cfusion.explanation.faithfulness import deletion_areas, deletion_curves
from cfusion.explanation.scoring import Occlusion
from cfusion.types import SlideFeatures
from preprocess.regions import SlidePictures
from preprocess.slides import SlideGeometry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Explained:
    """The result for one slide.

    Attributes:
        explanation: Its scores.
        page: Its page.
        areas: Areas of its deletion curves, if they were requested.
    """

    explanation: Explanation
    page: Path
    areas: pd.DataFrame | None


def explain_inputs(
    inputs: Inputs,
    ensemble: FoldEnsemble,
    out: Path,
    *,
    cases: Path | None = None,
    magnifications: Sequence[str] | None = None,
    occlusion: Occlusion = "cells",
    most_removals: int = 256,
    faithfulness: bool = False,
    heatmap_slides: bool = False,
    ranking: RunRanking | None = None,
    default_mpp: float | None = None,
    device: str = "cpu",
    cohort: str | None = None,
) -> Iterator[Explained]:
    """Explain every slide of the inputs, each in a folder with the slide's name in `out`.

    Args:
        inputs: The slides.
        ensemble: The models.
        out: Folder to write.
        cases: Table of the patients of slides; slides that it does not name, or all if None: see
            `cfusion.cohort.slide_owners`. Patients of the training are explained by the models that have not seen
            them.
        magnifications: Names of the magnifications to report; None: all that the models read.
        occlusion: See `cfusion.explain`.
        most_removals: See `cfusion.explain`.
        faithfulness: Also make deletion curves.
        heatmap_slides: Also write every heatmap as a pyramidal OME-TIFF of the slide's size.
        ranking: See `cfusion.explain`.
        default_mpp: µm/px of slides whose files do not state it, for their pictures.
        device: Device of the models.
        cohort: Cohort of the patients that `ensemble` was chosen for (`FoldEnsemble.of_chosen`), for the page.

    Raises:
        DataError: The only slide cannot be explained.
        PartialResultError: Some slides could not be explained; the rest are done.
    """
    failed: dict[str, CfusionError] = {}
    of_cohort = {} if cohort is None else {"cohort": cohort}
    owners = SlideOwners(ensemble.find_trained, {} if cases is None else read_owners(cases))
    for slide_id in inputs.slide_ids:
        try:
            models, note = ensemble.not_seen_by(owners.patient(slide_id))
            check_target(out / slide_id)
            slide = _placed(inputs.source.read(slide_id), inputs.files.get(slide_id), default_mpp)
            found = explain(
                models, slide, occlusion=occlusion, most_removals=most_removals, magnifications=magnifications,
                ranking=ranking, device=device,
            )  # fmt: skip
            found = dataclasses.replace(found, attrs={**found.attrs, **of_cohort, "note": note})
            curves = deletion_curves(models, slide, found, device=device) if faithfulness else None
            page = _write(found, inputs.files.get(slide_id), default_mpp, out, curves, heatmap_slides)
        except DataError as error:
            if len(inputs.slide_ids) == 1 and not inputs.failed:
                raise
            logger.warning("failed: %s", error)
            failed[slide_id] = error
            continue
        yield Explained(found, page, None if curves is None else deletion_areas(curves))
    if lost := sorted({*failed, *inputs.failed}):
        first = next(iter(failed.values())).message if failed else "their features could not be extracted, see above."
        raise PartialResultError(
            f"{len(lost)} of {len(inputs.slide_ids) + len(inputs.failed)} slides were not explained: "
            f"{', '.join(lost[:5])}.",
            f"The first: {first}",
        )


def _placed(slide: SlideFeatures, file: Path | None, default_mpp: float | None) -> SlideFeatures:
    """Return the features with coordinates in level-0 px, checked against the slide where it is at hand."""
    if file is None:
        return slide
    if coords_space(slide.attrs) == LEVEL_0:
        check_on_slide(slide, SlideGeometry.of(file, {}, default_mpp).size_px)
        return slide
    geometry = SlideGeometry.of(file, {}, default_mpp)
    return on_slide(slide, geometry.size_px, geometry.known_resolution().mpp)


def _write(
    found: Explanation,
    file: Path | None,
    default_mpp: float | None,
    out: Path,
    curves: pd.DataFrame | None,
    heatmap_slides: bool,
) -> Path:
    write = partial(write_results, found, out / found.slide_id, curves=curves, heatmap_slides=heatmap_slides)
    if file is None:
        logger.info(
            "%s: no gallery and no picture under the heatmaps, because the slide file is unavailable", found.slide_id
        )
        return write()
    with SlidePictures(file, default_mpp=default_mpp) as pictures:
        return write(pictures=pictures)


def checked_device(name: str | None) -> str:
    """Return the name of a usable device; None: a GPU if available, otherwise the CPU.

    Raises:
        ConfigError: The device cannot be used.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: cannot be used ({str(error).splitlines()[0]}).") from error
    return name

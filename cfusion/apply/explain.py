"""Explain the slides of opened inputs, each into a folder of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.apply.inputs import Inputs
from cfusion.errors import CfusionError, ConfigError, DataError, PartialResultError
from cfusion.explanation import Explanation, explain
from cfusion.explanation.explanation_files import check_target, write_results
from cfusion.explanation.faithfulness import deletion_areas, deletion_curves
from cfusion.explanation.scoring import Occlusion
from preprocess.regions import SlidePictures

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Explained:
    """What became of one slide.

    Attributes:
        explanation: Its scores.
        page: Its page.
        areas: Areas of its deletion curves, where they were made.
    """

    explanation: Explanation
    page: Path
    areas: pd.DataFrame | None


def explain_inputs(
    inputs: Inputs,
    ensemble: FoldEnsemble,
    out: Path,
    *,
    magnifications: Sequence[str] | None = None,
    occlusion: Occlusion = "cells",
    most_removals: int = 256,
    faithfulness: bool = False,
    default_mpp: float | None = None,
    device: str = "cpu",
) -> Iterator[Explained]:
    """Explain every slide of the inputs, each into a folder of its name in `out`.

    Args:
        inputs: The slides.
        ensemble: The models.
        out: Folder to write.
        magnifications: Names of those to report; None: all that the models read.
        occlusion: See `cfusion.explain`.
        most_removals: Likewise.
        faithfulness: Also make deletion curves.
        default_mpp: µm/px of slides whose files do not state it, for their pictures.
        device: Where the models run.

    Raises:
        DataError: The only slide cannot be explained.
        PartialResultError: Some slides cannot; the others are done.
    """
    failed: dict[str, CfusionError] = {}
    for slide_id in inputs.slide_ids:
        try:
            check_target(out / slide_id)
            slide = inputs.source.read(slide_id)
            found = explain(
                ensemble, slide, occlusion=occlusion, most_removals=most_removals, magnifications=magnifications,
                device=device,
            )  # fmt: skip
            curves = deletion_curves(ensemble, slide, found, device=device) if faithfulness else None
            page = _write(found, inputs.files.get(slide_id), default_mpp, out, curves)
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


def _write(
    found: Explanation, file: Path | None, default_mpp: float | None, out: Path, curves: pd.DataFrame | None
) -> Path:
    folder = out / found.slide_id
    if file is None:
        logger.info("%s: no gallery and no picture under the heatmaps, as its slide is not at hand", found.slide_id)
        return write_results(found, folder, curves=curves)
    with SlidePictures(file, default_mpp=default_mpp) as pictures:
        size = found.attrs.get("slide_size_px")
        if size and tuple(size) != pictures.size_px:
            raise DataError(
                f"{file}: has {pictures.size_px[0]} × {pictures.size_px[1]} px, but the features of {found.slide_id} "
                f"are of a slide of {size[0]} × {size[1]} px.",
                "Give the folder of the slides that the features were made of.",
            )
        return write_results(found, folder, pictures=pictures, curves=curves)


def checked_device(name: str | None) -> str:
    """The device of this name; none: a GPU where there is one, or else the CPU.

    Raises:
        ConfigError: There is no such device.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: cannot be used ({str(error).splitlines()[0]}).") from error
    return name

"""Bags: the slides that a patient's prediction is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cfusion.data.shards import ShardDataset
from cfusion.errors import ShardsError
from cfusion.types import magnification_name


@dataclass(frozen=True)
class BagEntry:
    """One bag.

    Attributes:
        key: The case, or the slide where bags are slides.
        case_id: The patient.
        slide_ids: Slides whose tiles it holds, in order.
        tiles: Number of tiles per magnification name.
    """

    key: str
    case_id: str
    slide_ids: tuple[str, ...]
    tiles: dict[str, int]


def make_bags(
    dataset: ShardDataset,
    cases: Mapping[str, Sequence[str]],
    unit: Literal["case", "slide"],
    magnifications: Sequence[float],
) -> tuple[BagEntry, ...]:
    """Build the bags of the given patients.

    Args:
        dataset: The shards.
        cases: Slides of each patient, as `Cohort.slides_of` gives them.
        unit: `case`: all slides of a patient form one bag; `slide`: one bag per slide.
        magnifications: Magnifications that every bag must have.

    Raises:
        ShardsError: Slides or a magnification are missing from the shards, or a patient has no slide.
    """
    names = [magnification_name(m) for m in magnifications]
    absent = [name for name in names if name not in dataset.index.magnifications]
    if absent:
        raise ShardsError(
            f"{dataset.directory}: no magnification {', '.join(absent)}; the shards have "
            f"{', '.join(dataset.index.magnifications)}.",
            "Change data.magnifications, or extract and pack the missing ones.",
        )
    missing = [slide for slides in cases.values() for slide in slides if slide not in dataset]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ShardsError(f"{dataset.directory}: {len(missing)} slides are not in the shards: {shown}.", "Pack them.")
    empty = [case for case, slides in cases.items() if not slides]
    if empty:
        raise ShardsError(f"Patients without a slide: {', '.join(empty[:5])}.", "Leave them out of the cohort.")
    groups = [
        (case if unit == "case" else group[0], case, tuple(group))
        for case, slides in cases.items()
        for group in ([list(slides)] if unit == "case" else [[slide] for slide in slides])
    ]
    return tuple(BagEntry(key, case, slides, _tiles(dataset, slides, names)) for key, case, slides in groups)


def _tiles(dataset: ShardDataset, slides: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    counts = [dataset.tiles(slide) for slide in slides]
    return {name: sum(count[name] for count in counts) for name in names}

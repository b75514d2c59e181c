"""Outcome of each slide: the printed summary and its table."""

from __future__ import annotations

import csv
import errno
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from cfusion.errors import DISK, CfusionError, DataError
from cfusion.files import atomic_path

ALREADY = "already extracted"
"""Why a finished slide is skipped."""

STORE_IS_LOST = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES})
"""Write errors after which every other slide would fail too."""


def store_is_lost(error: CfusionError) -> bool:
    """Return whether an error comes from a store that cannot be written, so that every other slide would fail too."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in STORE_IS_LOST


@dataclass(frozen=True)
class SlideOutcome:
    """Outcome of one slide.

    Attributes:
        slide_id: The slide's name.
        status: `done`; `skipped`: already extracted; `stale`: extracted with another configuration or from another
            file; `failed`.
        why: The reason if not `done`; otherwise a remark, such as cells that cannot be read.
        tiles: Tiles over all magnifications.
        seconds: From opening the slide to the written features; slides overlap.
        mpp: µm per level-0 px.
        mpp_source: Source of that number.
        taken_as: What `nominal` takes the slide as, such as `40x`; `exact` if it uses the true resolution.
        mask: Source of the tissue: a mask's file, or `automatic`.
        tissue_percent: Share of the scanned area that is tissue.
        ink_percent: Share of the scanned area that is ink of pens, with its margin; 0 with a user's mask.
        warnings: What was assumed or is suspicious.
        reader: Reader of its pixels.
        path: The slide's file.
    """

    slide_id: str
    status: Literal["done", "skipped", "stale", "failed"]
    why: str = ""
    tiles: int = 0
    seconds: float = 0.0
    mpp: float | None = None
    mpp_source: str = ""
    reader: str = ""
    path: str = ""
    taken_as: str = ""
    mask: str = ""
    tissue_percent: float | None = None
    ink_percent: float | None = None
    warnings: str = ""


@dataclass(frozen=True)
class Summary:
    """Outcome of all slides.

    Attributes:
        outcomes: One per slide, in the order of their paths.
        seconds: Duration of the run.
        pixels: Level-0 pixels read.
        encoder_idle: Share of the time, 0 to 1, in which the encoders had no work, or networks did not run.
        table: The CSV file with `outcomes`.
    """

    outcomes: tuple[SlideOutcome, ...]
    seconds: float
    pixels: int
    encoder_idle: float
    table: Path

    def of(self, status: str) -> list[SlideOutcome]:
        """Return the slides with one status."""
        return [o for o in self.outcomes if o.status == status]

    @property
    def tiles(self) -> int:
        """Number of tiles that this run encoded."""
        return sum(o.tiles for o in self.outcomes)


def write_summary(target: Path, outcomes: Sequence[SlideOutcome]) -> Path:
    """Write one row per slide as CSV.

    Raises:
        DataError: The file cannot be written.
    """
    try:
        # A file name need not be valid UTF-8.
        with (
            atomic_path(target) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
        ):
            writer = csv.DictWriter(stream, [f.name for f in fields(SlideOutcome)])
            writer.writeheader()
            writer.writerows({**asdict(o), "seconds": f"{o.seconds:.2f}"} for o in outcomes)
    except OSError as error:
        remedy = DISK.get(error.errno or 0, "")
        raise DataError(f"{target}: cannot be written ({error.strerror or error}).", remedy) from error
    return target

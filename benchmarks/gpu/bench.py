"""What the parts of the acceptance run share: the device, the time that is left, and figures with their limits."""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.model_step import matrix_peak
from cfusion.files import write_json


@dataclass(frozen=True)
class Limit:
    """What a figure must keep.

    Attributes:
        bound: The limit itself.
        at: Whether the figure may be at most or must be at least this.
        speed: Whether it is an aim for a GPU at full size; otherwise it is one of correctness and holds everywhere.
    """

    bound: float
    at: Literal["most", "least"] = "most"
    speed: bool = False

    def kept(self, value: float) -> bool:
        """Whether a figure keeps the limit; NaN keeps none."""
        return value <= self.bound if self.at == "most" else value >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at == 'most' else '≥'} {self.bound:g}"


@dataclass(frozen=True)
class Figure:
    """One row of the run.

    Attributes:
        part: Part of the run.
        case: What was measured.
        value: The figure, or a text; None where it was skipped.
        unit: Unit of the figure.
        device: Where it was measured.
        limit: The limit, as text; empty if there is none.
        kept: Whether the limit was kept; None if there is none, or it does not apply to this device and size.
        note: Anything else that a reader must know, such as why it was skipped.
    """

    part: str
    case: str
    value: float | str | None
    unit: str
    device: str
    limit: str = ""
    kept: bool | None = None
    note: str = ""

    def __str__(self) -> str:
        shown = f"{self.value:.4g} {self.unit}".rstrip() if isinstance(self.value, float) else self.value or "skipped"
        verdict = {None: "not checked here", True: "kept", False: "MISSED"}[self.kept]
        limit = f"limit {self.limit}: {verdict}" if self.limit else ""
        return "  ".join(filter(None, [f"{self.part:<9} {self.case:<66} {shown:>20}", limit, self.note]))


class Bench:
    """One acceptance run.

    Args:
        quick: Whether sizes are small, which shows only that the parts run.
        minutes: How long the run may take.
        shared: Folder with published weights and slides.
        json_file: Where the figures are written after each of them; None: nowhere.
    """

    def __init__(self, *, quick: bool, minutes: float, shared: Path, json_file: Path | None) -> None:
        self.quick, self.shared = quick, shared
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.figures: list[Figure] = []
        self._json_file = json_file
        self._end = self._part_end = time.monotonic() + 60 * minutes
        self._part = ""
        self.failed: list[str] = []

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    @functools.cached_property
    def device_name(self) -> str:
        """Name of the device, as in every row."""
        return torch.cuda.get_device_name() if self.on_gpu else f"CPU, {platform.machine()}: no GPU"

    @functools.cached_property
    def peak(self) -> float:
        """Operations a second of a large matrix product here: bf16 on a GPU, f32 on a CPU."""
        return matrix_peak(self.device.type)

    @property
    def left(self) -> float:
        """Seconds that are left of this part's time."""
        return self._part_end - time.monotonic()

    def run(self, name: str, part: Callable[[Bench], None], share: float) -> None:
        """Run a part within a share of the time that is left; an error in it is a row, and the next part runs."""
        self._part, now = name, time.monotonic()
        if now >= self._end:
            self.skip("all", "no time left; give more --minutes")
            return
        self._part_end = now + share * (self._end - now)
        try:
            part(self)
        except Exception as error:  # noqa: BLE001 - reported as a row; one part does not end the run
            self.failed.append(name)
            self.skip("all" if not self.figures or self.figures[-1].part != name else "the rest", f"failed: {error!r}")
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def tell(self, case: str, value: float | str, unit: str = "", limit: Limit | None = None, note: str = "") -> None:
        """Record and print a figure."""
        kept = None
        if limit is not None and isinstance(value, float) and (not limit.speed or (self.on_gpu and not self.quick)):
            kept = limit.kept(value)
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)  # JSON has no such number
        self._add(Figure(self._part, case, value, unit, self.device_name, str(limit or ""), kept, note))

    def skip(self, case: str, why: str) -> None:
        """Record and print what was not measured, and why."""
        self._add(Figure(self._part, case, None, "", self.device_name, note=why))

    def _add(self, figure: Figure) -> None:
        self.figures.append(figure)
        sys.stdout.write(f"{figure}\n")
        sys.stdout.flush()
        if self._json_file is not None:
            write_json(self._json_file, [dataclasses.asdict(f) for f in self.figures])

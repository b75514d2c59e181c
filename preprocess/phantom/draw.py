"""Phantom cohorts: synthetic slides whose patients' survival depends on two visible signals.

One is visible only at 5x (`architecture`), one only at 20x (`nuclei`). Nothing here is data about people.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from jaxtyping import UInt8
from PIL import Image

from cfusion.console import progress
from cfusion.errors import ConfigError, DataError
from cfusion.files import atomic_path, digest_json, read_json, write_json, write_text
from preprocess.phantom.histology import Stain, atlas, draw_tissue

CELL_PX = 1024
"""Side of a cell, one 5x tile, at 20x."""
JPEG_QUALITY = 90
_VERSION = 1


@dataclass(frozen=True)
class PhantomSpec:
    """A synthetic cohort.

    Attributes:
        name: Short name; prefix of the patients' ids.
        seed: Seed of patients, outcomes and pixels.
        patients: Number of patients.
        cells: Columns and rows of 1024 px cells on a slide (at 20x).
        share_40x: Share of slides written at 40x (0.25 µm/px); the others are 20x (0.5 µm/px).
        two_slides: Number of patients with a second slide.
        architecture_weight: Weight of the architecture in the log-hazard; the weight of the nuclei completes a sum of
            squares of 1.
        effect: Standard deviation of the log-hazard.
        median_months: Median survival of a patient of average risk.
        shape: Weibull shape of the survival times.
        censoring_months: Follow-up ends for reasons unrelated to risk, uniformly within this number of months.
        stain: Colours of the laboratory.
    """

    name: str
    seed: int
    patients: int = 240
    cells: tuple[int, int] = (2, 2)
    share_40x: float = 0.08
    two_slides: int = 1
    architecture_weight: float = 0.71
    effect: float = 1.6
    median_months: float = 30.0
    shape: float = 1.2
    censoring_months: float = 90.0
    stain: Stain = dataclasses.field(default_factory=Stain)

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A number is out of its range.
        """
        ranges = {
            "patients": (1, 10_000), "share_40x": (0, 1), "two_slides": (0, self.patients),
            "architecture_weight": (0, 1),
        }  # fmt: skip
        for key, (low, high) in ranges.items():
            if not low <= getattr(self, key) <= high:
                raise ConfigError(f"{self.name}: {key}={getattr(self, key)} is not within {low} … {high}.")


PHANTOMS = (
    PhantomSpec("phantom-a", seed=1, effect=1.55),
    PhantomSpec(
        "phantom-b",
        seed=8,
        architecture_weight=0.8,
        median_months=45.0,
        censoring_months=130.0,
        stain=Stain(hematoxylin=(0.55, 0.76, 0.42), eosin=(0.10, 0.88, 0.42)),
    ),
)
"""The two cohorts of `cfusion demo`: they differ in seeds, colours, survival and weights of the two signals."""


@dataclass(frozen=True)
class Patient:
    """One row of truth and outcome.

    Attributes:
        case_id: Patient.
        slides: Slide ids.
        architecture: 0 … 1, the order of the glands.
        nuclei: 0 … 1, the coarseness of the chromatin.
        log_hazard: The planted risk.
        time_months: Follow-up.
        event: Whether death was observed.
        magnification: 20 or 40, of the patient's slides.
    """

    case_id: str
    slides: tuple[str, ...]
    architecture: float
    nuclei: float
    log_hazard: float
    time_months: float
    event: bool
    magnification: int


@dataclass(frozen=True)
class PhantomCohort:
    """Location of a drawn cohort.

    Attributes:
        slides: Folder of the slides.
        table: Clinical table, CSV `patient, slide, time, event` (months), one row per slide.
        truth: CSV `case_id, architecture, nuclei, log_hazard`.
    """

    slides: Path
    table: Path
    truth: Path


def plan_patients(spec: PhantomSpec) -> tuple[Patient, ...]:
    """Sample the patients of a cohort: what their slides show, and their outcomes.

    Architecture and nuclei are uniform and independent (a Latin square of strata). Times are Weibull with hazard
    proportional to exp(log_hazard); censoring is uniform and independent.
    """
    rng = np.random.default_rng([spec.seed, _VERSION])
    count = spec.patients
    architecture, nuclei = ((rng.permutation(count) + rng.uniform(0, 1, count)) / count for _ in range(2))
    standard_a, standard_n = (np.sqrt(12) * (value - 0.5) for value in (architecture, nuclei))
    weight = spec.architecture_weight
    log_hazard = spec.effect * (weight * standard_a + np.sqrt(1 - weight**2) * standard_n)
    median = spec.median_months * np.exp(-log_hazard / spec.shape)
    death = median * (rng.exponential(1, count) / np.log(2)) ** (1 / spec.shape)
    censoring = rng.uniform(0, spec.censoring_months, count)
    months = np.maximum(np.round(np.minimum(death, censoring), 2), 0.01)
    at_40x = set(rng.permutation(count)[: round(spec.share_40x * count)].tolist())
    patients = []
    for row in range(count):
        case = f"{spec.name}-{row:04d}"
        slides = tuple(f"{case}-{letter}" for letter in ("ab" if row < spec.two_slides else "a"))
        patients.append(
            Patient(
                case,
                slides,
                float(architecture[row]),
                float(nuclei[row]),
                float(log_hazard[row]),
                float(months[row]),
                bool(death[row] <= censoring[row]),
                40 if row in at_40x else 20,
            )
        )
    return tuple(patients)


def draw_cohort(spec: PhantomSpec, out_dir: str | os.PathLike[str], workers: int = 2) -> PhantomCohort:
    """Draw a cohort's slides and write its tables; existing slides are kept.

    Slides are pyramidal tiled JPEG TIFFs in Aperio's dialect, with µm/px and objective power. The same spec gives the
    same bytes.

    Args:
        spec: The cohort.
        out_dir: Folder to write to; created if missing.
        workers: Slides drawn in parallel; each takes about 150 MB (at 40x 300 MB).

    Raises:
        DataError: `out_dir` contains slides of another spec.
    """
    out_dir = Path(out_dir)
    cohort = PhantomCohort(out_dir / "slides", out_dir / "cohort.csv", out_dir / "truth.csv")
    _claim(spec, out_dir)
    cohort.slides.mkdir(exist_ok=True)
    for left_over in cohort.slides.glob(f".{spec.name}-*.svs.*.tmp"):
        left_over.unlink()
    patients = plan_patients(spec)
    _write_tables(patients, cohort)
    jobs = [
        (patient, number)
        for patient in patients
        for number, slide in enumerate(patient.slides)
        if not (cohort.slides / f"{slide}.svs").exists()
    ]
    if jobs:
        atlas(spec.cells[1] * CELL_PX, spec.cells[0] * CELL_PX)  # once, before threads ask for it at the same time
    with progress(f"Drawing {spec.name}", len(jobs)) as bar, ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda job: _draw_slide(spec, job[0], job[1], cohort.slides), jobs):
            bar.advance()
    return cohort


def _claim(spec: PhantomSpec, out_dir: Path) -> None:
    """Write the spec's digest next to the slides, or check that it matches the one already there."""
    marker, digest = out_dir / "phantom.json", digest_json([_VERSION, dataclasses.asdict(spec)])
    if not marker.exists():
        write_json(marker, {"spec": dataclasses.asdict(spec), "digest": digest})
    elif read_json(marker).get("digest") != digest:
        raise DataError(
            f"{marker}: the folder contains the phantom cohort of another spec, expected that of {spec.name}.",
            "Remove the folder or give another.",
        )


def _write_tables(patients: tuple[Patient, ...], cohort: PhantomCohort) -> None:
    outcomes = [
        (patient.case_id, slide, f"{patient.time_months:.2f}", int(patient.event))
        for patient in patients
        for slide in patient.slides
    ]
    truth = [(p.case_id, f"{p.architecture:.6f}", f"{p.nuclei:.6f}", f"{p.log_hazard:.6f}") for p in patients]
    _write_csv(cohort.table, ("patient", "slide", "time", "event"), outcomes)
    _write_csv(cohort.truth, ("case_id", "architecture", "nuclei", "log_hazard"), truth)


def _write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _draw_slide(spec: PhantomSpec, patient: Patient, number: int, folder: Path) -> None:
    path = folder / f"{patient.slides[number]}.svs"
    rng = np.random.default_rng([spec.seed, _VERSION, int(patient.case_id.rsplit("-", 1)[1]), number])
    columns, rows = spec.cells
    image = draw_tissue(rows * CELL_PX, columns * CELL_PX, patient.architecture, patient.nuclei, spec.stain, rng)
    if patient.magnification == 40:
        image = image.repeat(2, axis=0).repeat(2, axis=1)
    with atomic_path(path) as temporary:
        write_drawn_slide(temporary, image, patient.magnification)


def write_drawn_slide(path: Path, image: UInt8[np.ndarray, "y x 3"], magnification: int) -> None:
    """Write an image as a pyramid of JPEG tiles in Aperio's dialect of TIFF.

    Args:
        path: File to write.
        image: RGB pixels of level 0.
        magnification: Objective power; 20 stands for 0.5 µm/px.
    """
    height, width = image.shape[:2]
    description = f"Aperio Image Library, phantom\r\n{width}x{height} JPEG/RGB Q={JPEG_QUALITY}"
    description += f"|AppMag = {magnification}|MPP = {10 / magnification:g}"
    levels = [image]
    while min(levels[-1].shape[:2]) > 512:
        levels.append(np.asarray(Image.fromarray(levels[-1]).reduce(4)))
    with tifffile.TiffWriter(path) as tiff:
        for level in levels:
            tiff.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": JPEG_QUALITY},
                subsampling=(1, 1),
                description=description if level is image else f"Aperio Image Library, phantom {level.shape[1]}",
                subfiletype=0 if level is image else 1,
                software="",
                metadata=None,
                maxworkers=1,
            )


__all__ = [
    "CELL_PX", "JPEG_QUALITY", "PHANTOMS", "Patient", "PhantomCohort", "PhantomSpec", "draw_cohort", "plan_patients",
    "write_drawn_slide",
]  # fmt: skip

"""Tissue detection on other stains and other glass, against Otsu's threshold on saturation.

The slides (`benchmarks.tissue_cases`) are real ones where they are available, and phantoms, stained again in many ways.
A case is right if recall and precision of its tissue, in pixels of 8 µm, are at least .95. The other side does what
CLAM does: HSV saturation, a median filter of 7 px, a threshold (Otsu's, or CLAM's default of 8 of 255), closing with
4 px. The limits of our method were chosen on these same cases.

The last rows are folds and blurred disks drawn into the slides: recall and precision of their pixels. The other side
has no such measure.

    python -m benchmarks.tissue --slides SHARED/slides [--quick] [--json FILE]
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from benchmarks.table import Row, options, present
from benchmarks.tissue_cases import (
    BLUR_UM,
    UM_PX,
    Case,
    Source,
    drawn_sources,
    make_cases,
    real_sources,
    with_blur,
    with_fold,
)  # fmt: skip
from preprocess.artefacts import find_artefacts
from preprocess.tissue import find_tissue

ENOUGH = 0.95
"""Recall and precision of a case that counts as right."""

SIDE_PX, QUICK_SIDE_PX = 4096, 2048
"""Side of the phantoms at 20x."""

FIXED_THRESHOLD = 8
"""CLAM's default threshold on saturation, of 255."""


def ours(case: Case) -> np.ndarray:
    """The mask that the extraction uses."""
    return find_tissue(case.overview, UM_PX).mask


def by_saturation(case: Case, threshold: int | None = None) -> np.ndarray:
    """The mask by a threshold on saturation; None: Otsu's."""
    saturation = cv2.medianBlur(cv2.cvtColor(case.rgb, cv2.COLOR_RGB2HSV)[..., 1], 7)
    kind = cv2.THRESH_BINARY | (cv2.THRESH_OTSU if threshold is None else 0)
    _, mask = cv2.threshold(saturation, threshold or 0, 255, kind)
    return cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((4, 4), np.uint8)) > 0


def quality(found: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Recall and precision."""
    both = (found & true).sum()
    return float(both / max(1, true.sum())), float(both / max(1, found.sum()))


def is_right(case: Case, found: np.ndarray) -> bool:
    """Whether recall and precision are high enough."""
    return min(quality(found, case.true)) >= ENOUGH


def measure(sources: list[Source]) -> tuple[list[Row], list[str]]:
    """For each kind the number of right cases, ours and theirs; and the cases that ours has wrong."""
    right: dict[str, list[tuple[bool, bool, bool]]] = {}
    wrong = []
    for case in make_cases(sources):
        masks = ours(case), by_saturation(case), by_saturation(case, FIXED_THRESHOLD)
        verdicts = [is_right(case, mask) for mask in masks]
        right.setdefault(case.kind, []).append((verdicts[0], verdicts[1], verdicts[2]))
        if not verdicts[0]:
            recall, precision = quality(masks[0], case.true)
            wrong.append(f"{case.kind}: {case.name}: recall {recall:.2f}, precision {precision:.2f}")
    rows = []
    for number, name in enumerate(("Otsu's threshold", f"a threshold of {FIXED_THRESHOLD}"), start=1):
        for kind, cases in right.items():
            counts = [sum(of_method) for of_method in zip(*cases, strict=True)]
            rows.append(Row(f"{kind}, against {name}", counts[0], counts[number], f"right of {len(cases)}"))
    return rows, wrong


def artefact_rows(sources: list[Source]) -> list[Row]:
    """Recall and precision of synthetic artefacts, mean over slides, and what is found on slides without any."""
    scores: dict[str, list[tuple[float, float]]] = {}
    clean = []
    for source in sources:
        rgb, fold = with_fold(source)
        scores.setdefault("fold", []).append(quality(find_artefacts(rgb, source.true, UM_PX).folds, fold))
        for sigma in BLUR_UM:
            rgb, blurred = with_blur(source, sigma)
            found = find_artefacts(rgb, source.true, UM_PX).blurred
            scores.setdefault(f"blur of {sigma:g} µm", []).append(quality(found, blurred))
        clean.append(find_artefacts(source.rgb, source.true, UM_PX).mask.sum() / source.true.sum())
    rows = [
        Row(f"{name}: {what}", float(np.mean([s[number] for s in of_kind])), None, "share")
        for name, of_kind in scores.items()
        for number, what in enumerate(("recall", "precision"))
    ]
    return [*rows, Row("no artefact: tissue that is left out", float(np.mean(clean)), None, "share", "lower")]


def main() -> None:
    """Run both sides, print the table and the cases that ours has wrong."""
    parser = options(__doc__)
    parser.add_argument("--slides", type=Path, default=Path("../shared/slides"))
    chosen = parser.parse_args()
    sources = drawn_sources(QUICK_SIDE_PX)[:1] if chosen.quick else real_sources(chosen.slides) + drawn_sources(SIDE_PX)
    rows, wrong = measure(sources)
    print(f"Slides: {', '.join(source.name for source in sources)}")
    for line in wrong:
        print(f"wrong: {line}")
    present("Tissue on other stains and glass; artefacts", [*rows, *artefact_rows(sources)], chosen.json)


if __name__ == "__main__":
    main()

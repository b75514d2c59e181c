"""Scoring: bootstrap replicates against scikit-survival one by one, and a large comparison from table to page.

    python -m benchmarks.evidence [--quick] [--json FILE]

`ours` draws all replicates of Harrell's C as matrix products; `theirs` calls scikit-survival once per replicate, on the
same draws, and must return the same numbers. The large comparison (models × cohorts, five folds, survival curves,
1,000 replicates an interval, one report) has no other side.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sksurv.metrics import concordance_index_censored

from benchmarks.table import Row, options, present
from cfusion.report import write_report
from cfusion.survival.bootstrap import Resamples
from cfusion.survival.score import score

COHORT_SIZES = (373, 416, 444, 480, 569, 871)
"""Patients of the six TCGA cohorts of the study."""


def outcomes(size: int, seed: int = 0) -> pd.DataFrame:
    """A made-up cohort: true risk, times in months, about 40% events."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=size)
    happens, leaves = generator.exponential(40 * np.exp(-truth)), generator.exponential(35, size)
    return pd.DataFrame({"truth": truth, "survival_months": np.minimum(happens, leaves), "event": happens < leaves})


def bootstrap_rows(patients: int, replicates: int) -> list[Row]:
    """Seconds of all replicates of one interval."""
    data = outcomes(patients)
    time_months, event, risk = (data[c].to_numpy() for c in ("survival_months", "event", "truth"))
    start = time.perf_counter()
    resamples = Resamples.draw(time_months, event, replicates=replicates, seed=7)
    ours = resamples.cindex(risk)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    theirs = []
    for counts in resamples.counts:
        rows = np.repeat(np.arange(patients), counts.astype(int))
        theirs.append(concordance_index_censored(event[rows], time_months[rows], risk[rows])[0])
    other = time.perf_counter() - start
    if not np.allclose(ours, theirs, rtol=0, atol=1e-12):
        raise AssertionError("the two sides disagree")
    return [Row(f"{replicates} bootstrap replicates, {patients} patients", seconds, other, "s", "lower")]


def predictions(models: int, cohorts: int) -> pd.DataFrame:
    """Out-of-fold predictions with survival curves of many models on many cohorts."""
    frames = []
    for number in range(cohorts):
        size = COHORT_SIZES[number % len(COHORT_SIZES)]
        base = outcomes(size, number)
        edges = base.loc[base["event"], "survival_months"].quantile([0.25, 0.5, 0.75, 1.0]).to_numpy()
        generator = np.random.default_rng(number)
        base = base.assign(
            cohort=f"cohort_{number}", protocol="strict", fold=np.arange(size) % 5,
            case_id=[f"p{number}_{i}" for i in range(size)], **{f"edge_{k + 1}": edges[k] for k in range(4)},
        )  # fmt: skip
        for model in range(models):
            seen = base["truth"].to_numpy() + generator.normal(scale=1 + model / 20, size=size)
            survival = np.exp(-np.outer(np.exp(seen), edges / 40))
            columns = {f"survival_{k + 1}": survival[:, k] for k in range(4)}
            frames.append(base.assign(model=f"model_{model}", risk=-survival.sum(axis=1), **columns))
    return pd.concat(frames, ignore_index=True)


def comparison_rows(models: int, cohorts: int) -> list[Row]:
    """Seconds from a table of predictions to a written report."""
    table = predictions(models, cohorts)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        scores = score(table)
        scored = time.perf_counter()
        write_report([scores], Path(folder))
        done = time.perf_counter()
    case = f"{models} models × {cohorts} cohorts"
    return [
        Row(f"{case}: scored", scored - start, None, "s", "lower"),
        Row(f"{case}: reported", done - scored, None, "s", "lower"),
        Row(f"{case}: scored and reported", done - start, None, "s", "lower"),
    ]


def main() -> None:
    """Measure, print and, where asked for, write JSON."""
    parser = options(__doc__)
    parser.add_argument("--patients", type=int, default=1000)
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--cohorts", type=int, default=6)
    chosen = parser.parse_args()
    rows = bootstrap_rows(chosen.patients, 50 if chosen.quick else chosen.replicates)
    rows += comparison_rows(*((3, 2) if chosen.quick else (chosen.models, chosen.cohorts)))
    present("Evidence", rows, chosen.json)


if __name__ == "__main__":
    main()

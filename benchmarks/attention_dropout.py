"""What dropout of attention weights does for the C-index: CrossFusion with .2, as published, and without, the default.

    cfusion demo --out runs/demo
    python -m benchmarks.attention_dropout --demo runs/demo --seeds 5

Each phantom cohort of the demo is cross-validated under the strict protocol with either setting and several seeds;
a row has the patient-level C pooled over the folds, `ours` without and `theirs` with dropout of attention weights. The
last line is the mean of the paired differences with its 95% interval (Student's t over cohorts and seeds).
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.table import Row, options, present
from cfusion.config import Config, validate
from cfusion.demo import SETTINGS
from cfusion.runs.crossval import cross_validate


def pooled_cindex(cohort: Path, out: Path, dropout: float, seed: int) -> float:
    """C-index over the patients of all folds of one cross-validation."""
    values = {
        **SETTINGS,
        "cohort": {"name": cohort.name, "table": str(cohort / "cohort.csv")},
        "data": {**SETTINGS["data"], "shards": str(cohort / "shards")},
        "model": {**SETTINGS["model"], "options": {"attention_dropout": dropout}},
        "evaluation": {"bootstrap": 0},
        "tracking": {"enabled": False},
        "seed": seed,
        "output": str(out / f"{cohort.name}-{dropout:g}-{seed}"),
    }
    scores = cross_validate(validate(Config, values, "attention_dropout"))
    return float(scores.summary["cindex_pooled"].iloc[0])


def main() -> None:
    """Run what the command line asks for."""
    parser = options(__doc__)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="output folder of `cfusion demo`")
    parser.add_argument("--out", type=Path, default=Path("runs/attention_dropout"))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    cohorts = sorted(arguments.demo.glob("phantom-*"))
    if not cohorts:
        raise SystemExit(f"{arguments.demo}: holds no phantom cohort; run: cfusion demo --out {arguments.demo}")
    seeds = 2 if arguments.quick else arguments.seeds
    rows, differences = [], []
    for cohort in cohorts:
        pairs = [
            (pooled_cindex(cohort, arguments.out, 0.0, seed), pooled_cindex(cohort, arguments.out, 0.2, seed))
            for seed in range(seeds)
        ]
        differences += [ours - theirs for ours, theirs in pairs]
        rows += [Row(f"{cohort.name}, seed {seed}", ours, theirs, "C") for seed, (ours, theirs) in enumerate(pairs)]
        ours, theirs = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        rows.append(Row(f"{cohort.name}, mean", ours, theirs, "C"))
    low, high = stats.t.interval(0.95, len(differences) - 1, np.mean(differences), stats.sem(differences))
    print(f"without − with: {np.mean(differences):+.3f} ({low:+.3f} … {high:+.3f}) over {len(differences)} pairs")
    present("C-index without (ours) and with (theirs) dropout of attention weights", rows, arguments.json)


if __name__ == "__main__":
    main()

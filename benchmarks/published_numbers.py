"""The paper's tables against noise scores under their protocol, and against age, sex, stage and grade.

    python -m benchmarks.published_numbers [--quick] [--repetitions N] [--json FILE]

Everything comes from files of the package: the tables of Soraki et al. (MIDL 2026), the outcomes, folds and covariates
of the six TCGA cohorts. Nulls are simulated per slide, as the published program scores (`cfusion null` and `--beside`:
per patient). The last part compares COAD's outcome table with TCGA-CDR.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd

from benchmarks.table import options
from cfusion.cohort.audited import audited
from cfusion.cohort.read import read_cohort
from cfusion.config import Config, load_config
from cfusion.files import write_json
from cfusion.report.comparison.published_results import read_published
from cfusion.study.packaged import FOLDER, shipped_config
from cfusion.survival.clinical import clinical_predictions
from cfusion.survival.null import scored_outcomes, simulate_null
from cfusion.survival.score import score
from cfusion.types import Cohort

PAPER = "crossfusion-midl2026"
QUICK_REPETITIONS = 10
REFERENCES = ("null_independent", "null_independent_high", "null_correlated", "null_correlated_high", "clinical")
"""Figures that published results are counted below."""


def study_config(name: str) -> Config:
    """Return the shipped configuration of a cohort, for a model that chooses nothing."""
    settings = load_config(shipped_config(name))
    evaluation = settings.evaluation.model_copy(update={"protocol": "fixed-epoch"})
    return settings.model_copy(update={"evaluation": evaluation})


def clinical_c(settings: Config, cohort: Cohort) -> float:
    """Return what `cfusion baseline` prints: C of the clinical model, mean over the study's folds."""
    found = audited(settings, cohort)
    predictions = clinical_predictions(found.cohort, found.splits)
    return float(score(predictions, splits=found.splits, bootstrap=0).summary["cindex_mean"].iloc[0])


def cohort_row(name: str, published: pd.DataFrame, repetitions: int) -> dict[str, Any]:
    """Compare one cohort's published results with the nulls and the clinical model."""
    settings = study_config(name)
    cohort = read_cohort(settings.cohort)
    found = audited(settings, cohort)
    folds = scored_outcomes(found.cohort, found.splits, "slide")
    row: dict[str, Any] = {
        "cohort": name, "patients": len(found.cohort.cases), "events": int(found.cohort.cases["event"].sum()),
        "results": len(published), "lowest": published["cindex_mean"].min(), "highest": published["cindex_mean"].max(),
    }  # fmt: skip
    for kind, memory in (("independent", 0.0), ("correlated", 0.9)):
        null = simulate_null(folds, chosen_on_scored_fold=True, autocorrelation=memory, repetitions=repetitions)
        row |= {f"null_{kind}": null.mean, f"null_{kind}_sd": null.sd, f"null_{kind}_high": null.high}
    row["clinical"] = clinical_c(settings, cohort)
    below = {f"below_{key}": int((published["cindex_mean"] < row[key]).sum()) for key in REFERENCES}
    return row | below


def coad_times() -> dict[str, Any]:
    """Compare COAD's outcome table with the overall survival of TCGA-CDR, in the same patients."""
    settings = study_config("tcga_coad")
    cohort = read_cohort(settings.cohort)
    cdr = pd.read_csv(FOLDER / "tcga" / "covariates" / "tcga_coad.csv").set_index("case_id").loc[cohort.cases.index]
    table, months = cohort.cases["time_months"], cdr["os_months"]
    known = months.notna()
    apart = known & ((table - months).abs() > 3)
    zero = apart & cohort.cases["event"] & (table == 0)
    corrected = dataclasses.replace(cohort, cases=cohort.cases.assign(time_months=months.where(known, table)))
    return {
        "patients": len(table), "known": int(known.sum()), "zero_months": int((table == 0).sum()),
        "status_differs": int((cdr["os"].astype(bool) != cohort.cases["event"])[known].sum()),
        "apart": int(apart.sum()), "apart_deaths": int((apart & cohort.cases["event"]).sum()),
        "deaths_at_zero": sorted(float(value) for value in months[zero]),
        "others_at_most": float((table - months).abs()[known & ~apart].max()),
        "clinical": clinical_c(settings, cohort), "clinical_with_cdr": clinical_c(settings, corrected),
    }  # fmt: skip


def figures(repetitions: int) -> dict[str, Any]:
    """Compute everything."""
    published = read_published(PAPER).results
    cohorts = [cohort_row(str(name), rows, repetitions) for name, rows in published.groupby("cohort")]
    total = {f"below_{key}": sum(row[f"below_{key}"] for row in cohorts) for key in REFERENCES}
    return {"cohorts": cohorts, "results": len(published), **total, "coad": coad_times(), "repetitions": repetitions}


def main() -> None:
    """Compute, print and, where asked for, write JSON."""
    parser = options(__doc__)
    parser.add_argument("--repetitions", type=int, default=200, help="simulated cross-validations of each null")
    chosen = parser.parse_args()
    found = figures(QUICK_REPETITIONS if chosen.quick else chosen.repetitions)
    print(pd.DataFrame(found["cohorts"]).set_index("cohort").T.to_string(float_format="{:.3f}".format))
    for key, value in found.items():
        if key != "cohorts":
            print(f"{key}: {value}")
    if chosen.json is not None:
        write_json(chosen.json, found)


if __name__ == "__main__":
    main()

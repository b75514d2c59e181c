"""From finished runs to one report: scores, the null beside each, and where the numbers came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from cfusion.crossval import is_done
from cfusion.errors import DataError
from cfusion.files import read_json
from cfusion.report import ReportContext, write_report
from cfusion.survival.score import Scores, score
from launch.plan import PlannedRun

Key = tuple[str, str, str]


def report_runs(
    runs: Sequence[PlannedRun], out: Path, *, title: str, oracle: Mapping[str, float] | None = None
) -> Path:
    """Score every finished run and write one report; runs with permuted outcomes become the null of the others.

    Args:
        runs: Of one plan.
        out: Folder of the report.
        title: Heading.
        oracle: Per cohort, the C-index of the planted risk, where the cohort is made up.

    Returns:
        The page.

    Raises:
        DataError: No run with real outcomes is finished.
    """
    finished = [run for run in runs if is_done(run.config.output)]
    real = [run for run in finished if run.config.evaluation.permute_outcomes is None]
    if not real:
        raise DataError(f"{title}: none of {len(runs)} runs with real outcomes is finished.", "Run the sweep first.")
    scores = {_key(run): _scores(run) for run in real}
    null = {
        _key(run): float(_scores(run, bootstrap=0).summary["cindex_pooled"].iloc[0])
        for run in finished
        if run.config.evaluation.permute_outcomes is not None
    }
    context = ReportContext(
        title=title,
        oracle={key: value for key in scores for cohort, value in (oracle or {}).items() if cohort == key[0]},
        permuted=null,
        curves=pd.concat([_curves(run) for run in real], ignore_index=True),
        audits={run.config.cohort.name: read_json(run.config.output / "audit.json") for run in real},
        provenance={run.name: read_json(run.config.output / "run.json")["provenance"] for run in real},
    )
    return write_report(list(scores.values()), out, context=context)


def _key(run: PlannedRun) -> Key:
    return run.config.cohort.name, run.config.model.name, run.config.evaluation.protocol


def _scores(run: PlannedRun, bootstrap: int | None = None) -> Scores:
    config = run.config
    predictions = pd.read_csv(config.output / "predictions.csv", dtype={"case_id": str}, float_precision="round_trip")
    return score(
        predictions,
        bootstrap=config.evaluation.bootstrap if bootstrap is None else bootstrap,
        horizons=config.evaluation.horizons_months,
    )


def _curves(run: PlannedRun) -> pd.DataFrame:
    frames = [pd.read_csv(path) for path in sorted(run.config.output.glob("*fold_*/history.csv"))]
    cohort, model, protocol = _key(run)
    return pd.concat(frames, ignore_index=True).assign(cohort=cohort, model=model, protocol=protocol)

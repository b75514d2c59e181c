"""Predictions of an archive: those of a joint run keep the patients' own cohorts, and score as the run did."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from cfusion.cli.main import app
from cfusion.survival.metrics import concordance
from launch.sweep.sharing import _all_predictions


def made_up(cohorts: dict[str, float], seed: int) -> pd.DataFrame:
    """Predictions of two folds; the risks of a cohort are shifted by its number, against its outcomes."""
    rng = np.random.default_rng(seed)
    rows = []
    for cohort, shift in cohorts.items():
        risk = rng.normal(size=40)
        months = 20 * np.exp(-0.5 * risk + 0.5 * rng.normal(size=40) + shift)
        rows.append(pd.DataFrame({
            "model": "amil", "cohort": cohort, "protocol": "strict", "seed": 7, "fold": np.arange(40) % 2,
            "case_id": [f"{cohort}-{i:03d}" for i in range(40)], "risk": risk + 4 * shift,
            "survival_months": months, "event": (np.arange(40) % 3 > 0).astype(int),
        }))  # fmt: skip
    return pd.concat(rows, ignore_index=True)


@pytest.fixture
def done(tmp_path: Path) -> list[SimpleNamespace]:
    """A run of two cohorts as one, and a run of one of them."""
    members = []
    for name, cohorts in (("both", {"a": 0.0, "b": 1.0}), ("a", {"a": 0.0})):
        (tmp_path / name).mkdir()
        made_up(cohorts, seed=1).to_csv(tmp_path / name / "predictions.csv", index=False)
        members.append(
            SimpleNamespace(name=name, label="made-up / amil", cohort=name, permuted=None, folder=tmp_path / name)
        )
    return members


def test_patients_of_a_joint_run_keep_their_cohort(done):
    frame = _all_predictions(done)
    assert frame.groupby(["joint", "cohort", "model"]).size().to_dict() == {
        ("", "a", "made-up / amil"): 40,
        ("both", "a", "made-up / amil, both"): 40,
        ("both", "b", "made-up / amil, both"): 40,
    }
    assert set(_all_predictions(done[:1])["model"]) == {"made-up / amil"}, "no other model has its name"
    assert "joint" not in _all_predictions(done[1:])


def test_the_score_of_a_joint_run_compares_patients_of_one_cohort_only(done, tmp_path):
    frame = _all_predictions(done)
    frame.to_csv(tmp_path / "all.csv", index=False)
    arguments = ["-q", "score", "--predictions", str(tmp_path / "all.csv"), "--out", str(tmp_path / "scored")]
    result = CliRunner().invoke(app, [*arguments, "--bootstrap", "20"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "both: one model of several cohorts" in " ".join(result.output.split())
    summary = pd.read_csv(tmp_path / "scored" / "summary.csv").set_index(["cohort", "model"])
    assert set(summary.index) == {
        ("both", "made-up / amil, both"), ("a", "made-up / amil, both"), ("b", "made-up / amil, both"),
        ("a", "made-up / amil"),
    }  # fmt: skip
    rows = frame[frame["joint"] == "both"]
    outcomes = rows["survival_months"].to_numpy(), rows["event"].to_numpy(bool)
    stratum = np.unique(rows["cohort"], return_inverse=True)[1]
    within = concordance(*outcomes, rows["risk"].to_numpy(), stratum).cindex
    mixed = concordance(*outcomes, rows["risk"].to_numpy()).cindex
    pooled = summary.loc[("both", "made-up / amil, both"), "cindex_pooled"]
    assert pooled == pytest.approx(within)
    assert mixed < within - 0.1, "what mixing the cohorts would have given"
    assert summary.loc[("both", "made-up / amil, both"), "n"] == 80

"""Every score agrees with R's survival package, on untied and on tied data."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from cfusion.survival.calibration import (
    calibration_intercept,
    calibration_slope,
    integrated_calibration_index,
    observed_over_expected,
)
from cfusion.survival.curves import step_values
from cfusion.survival.groups import hazard_ratio, kaplan_meier, log_rank
from cfusion.survival.losses import cox, stratified
from cfusion.survival.metrics import Training, auc_at, concordance, integrated_brier, uno_cindex
from cfusion.types import Targets

MATERIAL = Path(__file__).parents[1] / "material" / "r"


def parsed(text: str) -> dict[str, dict[str, list[float]]]:
    """Return the figures that scores.R prints, by data set and name."""
    found: dict[str, dict[str, list[float]]] = {}
    for line in text.splitlines():
        name, *values = line.split()
        if name == "##":
            found[values[0]] = current = {}
        else:
            current[name] = [float(value) for value in values]
    return found


FIGURES = parsed((MATERIAL / "scores.txt").read_text())


def stratified_cox(time: np.ndarray, event: np.ndarray, risk: np.ndarray, strata: np.ndarray) -> float:
    """Return the loss of fixed log hazards, with a risk set in each stratum."""
    targets = Targets(
        torch.zeros(len(time), dtype=torch.long), torch.tensor(event), torch.tensor(time), torch.tensor(strata)
    )
    return float(stratified(cox, torch.tensor(risk), targets).sum())


def ours(data: str) -> dict[str, list[float]]:
    time, happened, risk = np.loadtxt(MATERIAL / f"{data}.csv", delimiter=",", skiprows=1).T
    event = happened.astype(bool)
    training, fold, high = Training(time, event), np.arange(len(time)) % 3, risk >= np.median(risk)
    months = np.linspace(3, 12, 30)
    survival = np.exp(-np.outer(np.exp(risk), months / 30))
    grouped, plain = hazard_ratio(time, event, high, fold), hazard_ratio(time, event, risk)
    curve = kaplan_meier(time, event)
    twice = np.exp(-2 * 9 / 30 * np.exp(risk))
    intercept = calibration_intercept(event, 2 * np.exp(risk) * time / 30)
    slope = calibration_slope(time, event, twice, fold)
    return {
        "harrell": [concordance(time, event, risk).cindex],
        "uno": [uno_cindex(training, time, event, risk)],
        "auc_6": list(auc_at(training, time, event, risk, [6])),
        "auc_12": list(auc_at(training, time, event, risk, [12])),
        "ibs": [integrated_brier(training, time, event, survival, months)],
        "cox_high_by_fold_efron": [grouped.coefficient, grouped.error],
        "partial_likelihood_by_fold": [-stratified_cox(time, event, risk, fold)],
        "harrell_by_fold": [concordance(time, event, risk, fold).cindex],
        "cox_risk_efron": [plain.coefficient, plain.error],
        "log_rank_by_fold": [log_rank(time, event, high, fold)],
        "kaplan_meier_9": [
            float(step_values(curve.months, values, 9.0, before=1.0))
            for values in (curve.survival, curve.low, curve.high)
        ],
        "observed_expected_9": list(observed_over_expected(time, event, twice, 9)),
        "intercept": [intercept[0], (intercept[2] - intercept[0]) / 1.959964],
        "ici_9": [integrated_calibration_index(time, event, twice, 9)],
        "slope": [slope[0], (slope[2] - slope[0]) / 1.959964],
    }


@pytest.mark.parametrize("data", ["untied", "tied"])
def test_the_stratified_loss_of_fixed_risks_is_that_of_r(data: str) -> None:
    found = ours(data)
    for name in ("partial_likelihood_by_fold", "harrell_by_fold"):
        assert found[name] == pytest.approx(FIGURES[data][name], rel=1e-9), name


@pytest.mark.parametrize("data", ["untied", "tied"])
def test_scores_agree_with_r(data: str) -> None:
    found = ours(data)
    assert set(FIGURES[data]) - set(found) == {"cox_high_by_fold_breslow"}
    for name, values in found.items():
        assert values == pytest.approx(FIGURES[data][name], rel=1e-6), name


def test_ties_make_a_difference_that_the_ratio_names() -> None:
    """Efron's and Breslow's coefficients differ on tied times only; ours is Efron's."""
    assert FIGURES["untied"]["cox_high_by_fold_efron"] == FIGURES["untied"]["cox_high_by_fold_breslow"]
    efron, breslow = (FIGURES["tied"][f"cox_high_by_fold_{ties}"][0] for ties in ("efron", "breslow"))
    assert efron - breslow > 0.02
    time, event, risk = np.array([1.0, 2, 2, 3, 4]), np.array([1, 1, 1, 0, 1], bool), np.array([0, 1, 0, 1.0, 0])
    assert hazard_ratio(time, event, risk).ties == "Efron"
    assert hazard_ratio(time + np.arange(5) / 9, event, risk).ties == "none"
    assert hazard_ratio(np.array([1.0, 2, 2, 3, 4]), np.array([1, 1, 0, 0, 1], bool), risk).ties == "none"


@pytest.mark.skipif(shutil.which("Rscript") is None, reason="needs R with the package survival")
def test_the_figures_are_those_of_this_r() -> None:
    printed = subprocess.run(["Rscript", str(MATERIAL / "scores.R")], capture_output=True, text=True, check=True)
    found = parsed(printed.stdout)
    for data, figures in FIGURES.items():
        for name, values in figures.items():
            assert found[data][name] == pytest.approx(values, rel=1e-6), name

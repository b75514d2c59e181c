"""Losses and scores of several cohorts: nothing is compared between them, so their baseline hazards do not matter."""

import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter
from made_up_outcomes import cohort as made_up
from made_up_outcomes import predicted

from cfusion.cohort.joint import join_cohorts
from cfusion.cohort.splits import make_splits
from cfusion.config import SplitsConfig
from cfusion.report import ReportContext, write_report
from cfusion.survival.losses import LOSSES, cox, ranking, stratified
from cfusion.survival.metrics import concordance
from cfusion.survival.score import score
from cfusion.types import Cohort, Targets


def outcomes(seed: int, count: int = 90) -> tuple[torch.Tensor, Targets]:
    """Log hazards of three strata whose baselines run against them: the higher the risks, the longer the times."""
    rng = np.random.default_rng(seed)
    stratum = rng.integers(0, 3, count)
    eta = rng.normal(size=count) + 3 * stratum
    time = np.ceil(rng.exponential(np.exp(5.0 * stratum - eta) * 6)) + 1
    event = rng.random(count) < 0.7
    label = torch.zeros(count, dtype=torch.long)
    return torch.tensor(eta), Targets(label, torch.tensor(event), torch.tensor(time), torch.tensor(stratum))


@pytest.mark.parametrize("seed", range(3))
def test_the_stratified_cox_loss_is_the_partial_likelihood_of_lifelines(seed):
    eta, targets = outcomes(seed)
    frame = pd.DataFrame({
        "eta": eta, "time": targets.time_months, "event": targets.event, "stratum": targets.stratum,
    })  # fmt: skip
    fitted = CoxPHFitter().fit(frame, "time", "event", strata=["stratum"])
    fixed = torch.tensor(fitted.params_["eta"]) * eta
    assert float(stratified(cox, fixed, targets).sum()) == pytest.approx(-fitted.log_likelihood_, rel=1e-9)
    pooled = CoxPHFitter().fit(frame.drop(columns="stratum"), "time", "event")
    assert pooled.params_["eta"] < 0 < fitted.params_["eta"], "the baselines are opposite to the effect"


@pytest.mark.parametrize("loss", [cox, ranking])
def test_a_stratum_counts_as_if_it_were_by_itself_and_its_level_does_not_matter(loss):
    eta, targets = outcomes(4)
    terms = stratified(loss, eta, targets)
    for number in range(3):
        rows = torch.nonzero(targets.stratum == number).flatten()
        single = loss(eta[rows], targets.time_months[rows], targets.event[rows])
        torch.testing.assert_close(terms[rows], single, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stratified(loss, eta + 7.0 * targets.stratum, targets), terms)
    assert not torch.allclose(loss(eta + 7.0 * targets.stratum, targets.time_months, targets.event), terms)


def test_gradients_of_the_set_losses_by_finite_differences_with_strata():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(14, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    _, targets = outcomes(5, 14)
    for name in ("cox", "ranking"):
        assert torch.autograd.gradcheck(lambda x, name=name: LOSSES[name].over_logits(x, targets).sum(), logits)


def test_concordance_counts_pairs_within_strata_only():
    eta, targets = outcomes(6)
    time, event, stratum = (values.numpy() for values in (targets.time_months, targets.event, targets.stratum))
    parts = [concordance(time[rows], event[rows], eta.numpy()[rows]) for rows in (stratum == k for k in range(3))]
    found = concordance(time, event, eta.numpy(), stratum)
    assert found.concordant == sum(part.concordant for part in parts)
    pairs = sum(part.concordant + part.discordant + part.tied_risk for part in parts)
    assert found.cindex == pytest.approx(sum(p.concordant + p.tied_risk / 2 for p in parts) / pairs)
    assert found.cindex > 0.6 > concordance(time, event, eta.numpy()).cindex


@pytest.fixture(scope="module")
def joint() -> Cohort:
    """Two cohorts; the second lives ten times as long, in spite of higher risks."""
    parts = []
    for name, seed, pace in (("one", 1, 1.0), ("two", 2, 4.0)):
        part = made_up(120, seed)
        names = {case: f"{name}-{case}" for case in part.cases.index}
        cases = part.cases.rename(index=names).assign(time_months=lambda rows, pace=pace: rows["time_months"] * pace)
        slides = part.slides.rename(index=lambda s, name=name: f"{name}-{s}").assign(
            case_id=lambda rows, names=names: rows["case_id"].map(names)
        )
        parts.append(Cohort(name, cases, slides))
    return join_cohorts("both", parts)


def test_scores_have_a_row_of_each_cohort_and_a_stratified_one_of_both(joint, tmp_path):
    splits = make_splits(joint, SplitsConfig(), "fixed-epoch")
    table = predicted(joint, splits, "seer", "fixed-epoch", noise=1.0)
    # A level of the risk between cohorts that is opposite to the truth.
    level = (joint.strata.loc[table["case_id"]] == "two").to_numpy()
    scores = score(table.assign(risk=table["risk"] + 50 * level), joint, splits, bootstrap=80)
    assert list(scores.summary["cohort"]) == ["both", "one", "two"]
    rows = scores.summary.set_index("cohort")
    assert scores.joint == "both"
    assert rows.loc["both", "cohorts"] == "one, two"
    assert rows.loc["both", "n"] == rows.loc["one", "n"] + rows.loc["two", "n"]
    pair = sorted(rows.loc[["one", "two"], "cindex_within"])
    assert pair[0] <= rows.loc["both", "cindex_within"] <= pair[1]
    widths = rows["within_high"] - rows["within_low"]
    assert widths["both"] < widths[["one", "two"]].min()
    assert (rows["within_low"] < rows["cindex_within"]).all()
    assert rows.loc["both", "cindex_pooled"] > 0.58, "no pair is of two cohorts"
    of = scores.predictions.groupby("case_id")["cohort"].first()
    assert (of == joint.strata.loc[of.index]).all()
    page = write_report([scores], tmp_path / "report", context=ReportContext(title="both")).read_text()
    assert "both: seer ranks patients better than chance" in page
    written = pd.read_csv(tmp_path / "report" / "summary.csv")
    assert list(written["cohort"]) == ["both", "one", "two"]
    assert written["null_high"].between(0.5, 0.65).all()
    assert written["null_high"].iloc[0] < written["null_high"].iloc[1:].min()


def test_the_scores_of_a_cohort_are_those_that_it_has_by_itself(joint):
    splits = make_splits(joint, SplitsConfig(), "fixed-epoch")
    table = predicted(joint, splits, "seer", "fixed-epoch", noise=1.0).drop(
        columns=[f"{name}_{k}" for name in ("survival", "edge") for k in range(1, 5)]
    )
    together = score(table, joint, splits, bootstrap=40).summary
    part = joint.parts()[0]
    own = table["case_id"].isin(part.cases.index)
    folds = make_splits(part, SplitsConfig(), "fixed-epoch")
    single = score(table[own].assign(cohort="one"), part, folds, bootstrap=40).summary
    pd.testing.assert_series_equal(together[together["cohort"] == "one"].iloc[0][single.columns], single.iloc[0],
                                   check_names=False)  # fmt: skip


def test_predictions_of_patients_that_none_of_the_cohorts_has_are_refused(joint):
    splits = make_splits(joint, SplitsConfig(), "fixed-epoch")
    table = predicted(joint, splits, "seer", "fixed-epoch")
    table.loc[0, "case_id"] = "stranger"
    with pytest.raises(Exception, match="1 patients are not in cohort both, such as stranger"):
        score(table, joint, splits, bootstrap=0)

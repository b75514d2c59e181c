"""One model of several cohorts: its bins, its losses, its predictions, and what a cohort left out has."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from factories import joint_config, make_cohort, make_cohorts

import cfusion
from cfusion.config import Config
from cfusion.errors import ConfigError, RequeueError
from cfusion.survival.bins import TimeBins
from cfusion.survival.metrics import concordance
from cfusion.training.fold_job import targets_of
from cfusion.training.folds import fit, open_run_shards, ready_fold
from cfusion.training.world import join_world
from cfusion.types import Split


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_cohorts(tmp_path_factory.mktemp("cohorts"))


def prepared(config: Config, number: int = 0):
    cohort = cfusion.read_cohorts(config)
    return cohort, cfusion.make_splits(cohort, config.splits, config.evaluation.protocol)[number]


def ready(config: Config, tmp_path, number: int = 0):
    cohort, split = prepared(config, number)
    runtime = join_world(config.parallel)
    return ready_fold(config, cohort, split, open_run_shards(config), runtime, folder=tmp_path, on_epoch=None)


def test_a_bag_has_the_label_of_the_training_patients_of_its_cohort(files, tmp_path):
    fold = ready(joint_config(files, tmp_path), tmp_path)
    cohort, split = fold.cohort, fold.split
    targets = targets_of(fold.job, fold.job.train)
    for number, part in enumerate(cohort.parts()):
        training = part.cases.loc[[case for case in split.train if case in part.cases.index]]
        bins = TimeBins.fit(training["time_months"], training["event"], 4)
        assert fold.job.bins[part.name] == bins
        assert fold.card.strata[part.name].edges_months == bins.edges
        own = targets.stratum == number
        labels = bins.label(targets.time_months[own])
        np.testing.assert_array_equal(targets.label[own], labels)
        assert set(labels) == {0, 1, 2, 3}
    shared = TimeBins.fit(*(cohort.cases.loc[list(split.train)][name] for name in ("time_months", "event")), 4)
    assert not torch.equal(targets.label, torch.tensor(shared.label(targets.time_months)))
    means = np.mean([bins.edges for bins in fold.job.bins.values()], axis=0)
    assert fold.card.edges_months == pytest.approx(means)


def test_weighted_sampling_draws_each_class_of_each_cohort_equally(files, tmp_path):
    fold = ready(joint_config(files, tmp_path, train={"sampling": "weighted"}), tmp_path)
    cases = fold.job.cases.loc[[bag.case_id for bag in fold.job.train.bags]]
    weighted = cases.assign(weight=fold.job.sampling_weights)
    sums = weighted.groupby(["stratum", "label", "event"])["weight"].sum()
    assert sums.to_numpy() == pytest.approx(1)


def test_a_joint_model_learns_within_cohorts_whose_baselines_are_opposite(files, tmp_path):
    config = joint_config(
        files, tmp_path, train={"loss": "cox", "epochs": 8, "lr": 1e-2}, parallel={"global_batch": 16}
    )
    cohort, split = prepared(config)
    run = fit(config, cohort, split)
    rows = run.predictions
    assert set(rows["cohort"]) == {"short", "long"}
    assert set(rows["case_id"]) == set(split.test)
    for name, own in rows.groupby("cohort"):
        stratum = run.model.card.strata[str(name)]
        edges = own[[f"edge_{k}" for k in range(1, 5)]].to_numpy()
        np.testing.assert_allclose(edges, np.tile(stratum.edges_months[1:], (len(own), 1)))
        assert set(own["risk_cutoff"]) == {stratum.risk_cutoff}
    within = concordance(rows["survival_months"], rows["event"], rows["risk"], rows["cohort"])
    assert within.cindex > 0.7
    assert run.history["validation_cindex"].max() > 0.7


def test_a_cohort_left_out_has_risks_and_no_curves(files, tmp_path):
    config = joint_config(files, tmp_path, splits={"scheme": "cohort"})
    cohort, split = prepared(config, 1)
    run = fit(config, cohort, split)
    assert set(run.predictions["cohort"]) == {"long"}
    assert not [name for name in run.predictions if name.startswith(("survival_1", "edge_"))]
    assert list(run.model.card.strata) == ["short"]
    assert set(run.predictions["risk_cutoff"]) == {run.model.card.risk_cutoff}
    scores = cfusion.score(run.predictions, cohort, split, bootstrap=20)
    assert scores.folds["note"].iloc[0] == "censoring model from the scored patients"
    assert np.isnan(scores.summary["ibs"].iloc[0])
    assert scores.summary["uno_c"].notna().all()


def test_an_epoch_is_not_chosen_by_a_cohort_that_does_not_train(files, tmp_path):
    config = joint_config(files, tmp_path)
    cohort, split = prepared(config)
    short, long = (set(part.cases.index) for part in cohort.parts())
    sides = (tuple(c for c in split.train if c in short), tuple(c for c in split.validation if c in long), split.test)
    with pytest.raises(ConfigError, match="patients of long choose the epoch and none of them trains"):
        fit(config, cohort, Split(0, *sides))


def test_a_model_of_times_in_months_is_refused_for_several_cohorts(files, tmp_path):
    model = {"name": "scmil", "embed_dim": 16}
    config = joint_config(files, tmp_path, model=model, data={"magnifications": [20]})
    cohort, split = prepared(config)
    with pytest.raises(ConfigError, match="SCMIL predicts a distribution of the time in months"):
        fit(config, cohort, split)


def test_a_stopped_fold_resumes_with_the_same_numbers(files, tmp_path):
    config = joint_config(files, tmp_path, train={"loss": "cox", "epochs": 3})
    cohort, split = prepared(config)
    undisturbed = fit(config, cohort, split)
    asked = iter([False] * 5 + [True] * 100)
    with pytest.raises(RequeueError):
        fit(config, cohort, split, folder=tmp_path / "state", stop=lambda: next(asked))
    again = fit(config, cohort, split, folder=tmp_path / "state")
    pd.testing.assert_frame_equal(again.predictions, undisturbed.predictions)
    for name, tensor in undisturbed.model.module.state_dict().items():
        assert torch.equal(tensor, again.model.module.state_dict()[name])


def test_another_cohort_of_a_patient_is_another_training(files, tmp_path):
    fold = ready(joint_config(files, tmp_path), tmp_path)
    swapped = dataclasses.replace(fold.cohort, strata=fold.cohort.strata.replace({"short": "x"}))
    config = fold.job.config
    other = ready_fold(config, swapped, fold.split, open_run_shards(config), join_world(config.parallel),
                       folder=tmp_path, on_epoch=None)  # fmt: skip
    assert other.job.identity["outcomes_digest"] != fold.job.identity["outcomes_digest"]


def test_a_card_of_several_cohorts_is_read_back_and_gives_the_bins_of_each(files, tmp_path):
    config = joint_config(files, tmp_path, train={"epochs": 1})
    cohort, split = prepared(config)
    run = fit(config, cohort, split)
    run.model.save(tmp_path / "model")
    read = cfusion.FittedModel.load(tmp_path / "model")
    assert read.card == run.model.card
    assert read.of_cohort("long").bins.edges == run.model.card.strata["long"].edges_months
    assert read.of_cohort("long").card.risk_cutoff == run.model.card.strata["long"].risk_cutoff
    with pytest.raises(ConfigError, match=r"lung: the model was not trained on this cohort; it has long, short"):
        read.of_cohort("lung")
    predicted = cfusion.predict(read.of_cohort("long"), config.data, [c for c in split.test if c.startswith("L")])
    mine = run.predictions.set_index("case_id").loc[predicted["case_id"]].reset_index()
    columns = ["risk", "risk_cutoff", "survival_1", "edge_1"]
    np.testing.assert_allclose(predicted[columns], mine[columns], rtol=1e-6)


def test_the_card_of_one_cohort_is_written_as_before(tmp_path):
    config = make_cohort(tmp_path / "one", patients=48).config(tmp_path, train={"epochs": 1})
    cohort = cfusion.read_cohorts(config)
    fit(config, cohort, cfusion.make_splits(cohort, config.splits)[0]).model.save(tmp_path / "model")
    assert not {"strata", "start"} & set(json.loads((tmp_path / "model" / "model.json").read_text()))

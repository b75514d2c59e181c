"""A nested search: chosen on the training side of each fold, the same after a stop, and reported with its price."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from factories import CohortFiles, make_cohort

from cfusion.config import Config
from cfusion.errors import CfusionError, ConfigError, RequeueError
from cfusion.report.runs import report_runs
from cfusion.report.search_section import fold_choices
from cfusion.runs import search
from cfusion.runs.crossval import cross_validate
from cfusion.runs.run import Run
from cfusion.runs.search import FoldSearch, Trial
from cfusion.training.world import join_world

SPACE = {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "model.embed_dim": [8, 16]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=36, max_cells=1)


def searching(files: CohortFiles, output: Path, epochs: int = 1, **search: object) -> Config:
    settings = {"space": SPACE, "trials": 2, **search}
    return files.config(
        output, splits={"folds": 2}, train={"epochs": epochs}, search=settings, evaluation={"bootstrap": 0}
    )


def searched(run: Run) -> FoldSearch:
    found = FoldSearch(join_world(run.config.parallel), run, run.splits[0], lambda: False)
    run.folder.mkdir(parents=True, exist_ok=True)
    found()
    return found


def test_other_outcomes_of_the_scored_patients_choose_the_same(files: CohortFiles, tmp_path: Path) -> None:
    found = []
    for name in ("real", "other"):
        run = Run.prepare(searching(files, tmp_path / name))
        if name == "other":
            cases, test = run.cohort.cases.copy(), list(run.splits[0].test)
            cases.loc[test, "time_months"] = cases.loc[test, "time_months"].to_numpy()[::-1] * 3
            cases.loc[test, "event"] = ~cases.loc[test, "event"].to_numpy()
            audited = dataclasses.replace(run.audit, cohort=dataclasses.replace(run.cohort, cases=cases))
            run = dataclasses.replace(run, audit=audited)
        found.append(searched(run))
    one, other = found
    assert one.trials == other.trials
    assert one.best == other.best
    chosen = [
        json.loads((tmp_path / name / "fold_0" / "fold.json").read_text())["chosen"] for name in ("real", "other")
    ]
    assert chosen[0] == chosen[1]
    weights = [(tmp_path / name / "fold_0/model/model.safetensors").read_bytes() for name in ("real", "other")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_stopped_search_ends_as_an_undisturbed_one_and_is_reported(
    files: CohortFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = searching(files, tmp_path / "undisturbed")
    cross_validate(undisturbed)
    config, calls, real = searching(files, tmp_path / "stopped"), [], search.fit

    def stops_once(*given, **named):
        calls.append(1)
        if len(calls) == 2:
            raise RequeueError("stopped")
        return real(*given, **named)

    monkeypatch.setattr(search, "fit", stops_once)
    monkeypatch.setattr(search, "stop_requested", lambda: len(calls) == 2)
    with pytest.raises(RequeueError):
        cross_validate(config)
    cross_validate(config)
    assert len(calls) == 5, "the stopped trial is the only one that is done again"
    for fold in ("fold_0", "fold_1"):
        one, other = (
            json.loads((c.output / "search" / fold / "trials.json").read_text()) for c in (undisturbed, config)
        )
        assert one == other
        assert (undisturbed.output / fold / "predictions.csv").read_text() == (
            config.output / fold / "predictions.csv"
        ).read_text()
        row = max((trial for trial in one if trial["state"] == "done"), key=lambda trial: trial["score"])
        card = json.loads((config.output / fold / "model" / "model.json").read_text())
        assert card["model"]["embed_dim"] == row["values"]["model.embed_dim"]
    choices = fold_choices(config.output, 7)
    assert [choice.name for choice in choices] == ["fold_0", "fold_1"]
    scores = pd.read_csv(config.output / "scores.csv")
    np.testing.assert_allclose([choice.outer for choice in choices], scores["harrell_c"])
    assert all(choice.price >= 0 and len(choice.trials) == 2 for choice in choices)
    report_runs([config.output], tmp_path / "report", title="Tuned")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "What was searched" in page
    assert choices[0].chosen_words in page


def test_hopeless_trials_are_pruned_and_failed_ones_recorded(
    files: CohortFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_WARM_UP_TRIALS", 1)
    real = search.fit

    def fails_first(config, *given, **named):
        if not (tmp_path / "run/search/fold_0/trials.json").exists():
            raise CfusionError("the loss is not finite")
        return real(config, *given, **named)

    monkeypatch.setattr(search, "fit", fails_first)
    never = search._Study.is_hopeless
    monkeypatch.setattr(search._Study, "is_hopeless", lambda study, epochs: len(study._trials) == 2 and len(epochs) > 0)
    found = searched(Run.prepare(searching(files, tmp_path / "run", epochs=2, sampler="random", trials=3)))
    assert [trial.state for trial in found.trials] == ["failed", "done", "pruned"]
    assert found.trials[0].cause == "the loss is not finite"
    assert len(found.trials[2].epochs) == 1
    assert not list((tmp_path / "run").glob("checkpoints/*/*"))
    study = search._Study(found.run.config.search, "x", [Trial(0, found.trials[1].values, "done", (0.6, 0.7), 0.7)])
    assert never(study, [0.5])
    assert not never(study, [0.65])
    assert not never(study, [0.5, 0.8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"protocol": "published"}}, "search needs evaluation.protocol=strict"),
        ({"train": {"folds": "together"}}, "search needs train.folds=separate"),
        ({"search": {"space": {"splits.seed": [1, 2]}}}, "splits.seed cannot be searched"),
        ({"search": {"space": {"model.name": ["amil", "mean_mil"]}}}, "model.name cannot be searched"),
        ({"search": {"space": {"train.lr": [1e-3]}}}, "train.lr has 1 values"),
        ({"search": {"space": {"train.lr": {"low": 0, "high": 1, "log": True}}}}, "0 < low with log"),
        ({"search": {"space": {"train.learning_rate": [1, 2]}}}, "train.learning_rate"),
        ({"search": {"space": {"train.lr": {"low": -1.0, "high": 0.5}}}}, "train.lr"),
    ],
)
def test_what_would_cheat_or_cannot_be_is_refused(
    files: CohortFiles, tmp_path: Path, changes: dict, message: str
) -> None:
    sections = {"search": {"space": SPACE, "trials": 2}, **changes}
    with pytest.raises(ConfigError, match=message):
        files.config(tmp_path, **sections)

"""Start from a trained model: its weights, its shapes, and the patients that it has seen."""

import dataclasses

import pytest
import torch
from factories import CohortFiles, make_cohort

import cfusion
from cfusion.config import Config
from cfusion.errors import ConfigError, DataError
from cfusion.run_folder import SEEN
from cfusion.runs.crossval import cross_validate
from cfusion.runs.run import Run
from cfusion.training.folds import FoldRun, fit, open_run_shards, ready_fold
from cfusion.training.start import read_starts
from cfusion.training.world import join_world


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("old"), patients=48, seed=3, prefix="OLD")


@pytest.fixture(scope="module")
def new(tmp_path_factory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("new"), patients=48, seed=4, prefix="NEW")


@pytest.fixture(scope="module")
def pretrained(old, tmp_path_factory) -> Config:
    """A finished run of three folds on the old cohort."""
    config = old.config(tmp_path_factory.mktemp("pretrained") / "run", train={"epochs": 2}, evaluation={"bootstrap": 0})
    cross_validate(config)
    return config


def trained(config: Config, number: int = 0) -> FoldRun:
    cohort = cfusion.read_cohorts(config)
    return fit(config, cohort, cfusion.make_splits(cohort, config.splits, config.evaluation.protocol)[number])


@pytest.mark.slow
def test_a_fold_starts_with_the_weights_of_the_model_of_its_number(new, pretrained, tmp_path):
    config = new.config(tmp_path, train={"start_from": str(pretrained.output)})
    cohort = cfusion.read_cohorts(config)
    starts = read_starts(str(pretrained.output))
    assert [start.card.fold for start in starts] == [0, 1, 2]
    for split in cfusion.make_splits(cohort, config.splits):
        fold = ready_fold(config, cohort, split, open_run_shards(config), join_world(config.parallel),
                          folder=tmp_path, on_epoch=None)  # fmt: skip
        for name, tensor in fold.network.state_dict().items():
            assert torch.equal(tensor, starts[split.fold].tensors[name])
        assert fold.job.identity["start_sha256"] == starts[split.fold].sha256
        assert fold.card.start["cohort"] == "made_up"


@pytest.mark.slow
def test_what_it_has_seen_passes_on_to_what_starts_from_it(new, pretrained, tmp_path):
    run = trained(new.config(tmp_path, train={"start_from": str(pretrained.output / "fold_1" / "model"), "epochs": 1}))
    start = read_starts(str(pretrained.output / "fold_1" / "model"))[0]
    assert start.seen is not None
    assert run.model.seen is not None
    assert start.seen.digests < run.model.seen.digests
    assert run.model.card.start == start.origin
    assert run.model.card.notes[0] == f"Training started from {pretrained.output / 'fold_1' / 'model'}."


def test_the_same_folds_are_a_safe_start_and_other_folds_are_refused(old, pretrained, tmp_path):
    same = old.config(tmp_path / "same", train={"start_from": str(pretrained.output), "epochs": 1})
    Run.prepare(same)
    leaks = old.config(tmp_path / "other", splits={"seed": 8}, train={"start_from": str(pretrained.output)})
    with pytest.raises(
        DataError, match=r"fold_0.model was trained on \d+ of the 16 patients that fold 0 scores, such as"
    ):
        Run.prepare(leaks)
    one = old.config(tmp_path / "one", train={"start_from": str(pretrained.output / "fold_1" / "model")})
    with pytest.raises(DataError, match="that fold 0 scores"):
        Run.prepare(one)


def test_an_unchecked_start_is_named_everywhere(old, pretrained, tmp_path, caplog):
    start = {"start_from": str(pretrained.output / "fold_1" / "model"), "start_unchecked": True, "epochs": 1}
    config = old.config(tmp_path / "run", train=start)
    assert "train.start_unchecked=true" in config.notes[1]
    prepared = Run.prepare(config)
    assert "was trained on 16 of the 16 patients that fold 0 scores" in caplog.text
    assert config.notes[1] in prepared.describe()
    assert trained(config).model.card.notes == config.notes


def test_a_model_that_does_not_record_its_patients_is_a_doubt_that_an_option_decides(new, pretrained, tmp_path):
    model = tmp_path / "model"
    cfusion.FittedModel.load(pretrained.output / "fold_0" / "model").save(model)
    (model / SEEN).unlink()
    with pytest.raises(DataError, match="does not record all patients of its training"):
        trained(new.config(tmp_path, train={"start_from": str(model)}))
    run = trained(new.config(tmp_path, train={"start_from": str(model), "start_unchecked": True, "epochs": 1}))
    assert run.model.card.start["patients"] == "unknown"
    run.model.save(tmp_path / "second")
    second = read_starts(str(tmp_path / "second"))[0]
    assert second.seen is not None
    assert not second.records_patients, "its own patients are recorded, those of its start are not"


def test_shapes_that_do_not_fit_are_named_both(new, pretrained, tmp_path):
    start = {"start_from": str(pretrained.output)}
    with pytest.raises(ConfigError, match=r"is \[16(, 8)?\] there and \[32(, 8)?\] here"):
        Run.prepare(new.config(tmp_path, train=start, model={"embed_dim": 32}))
    with pytest.raises(ConfigError, match=r"is \[4(, \d+)?\] there and \[3(, \d+)?\] here"):
        Run.prepare(new.config(tmp_path, train=start, evaluation={"n_bins": 3}))
    with pytest.raises(ConfigError, match=r"is missing there|missing here"):
        Run.prepare(new.config(tmp_path, train=start, model={"name": "transmil"}))
    with pytest.raises(ConfigError, match="magnifications x10 here and x20, x10, x5 there"):
        Run.prepare(new.config(tmp_path, train=start, data={"magnifications": [10]}))


def test_what_is_no_model_is_refused(new, pretrained, tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"holds no model\.json"):
            trained(new.config(tmp_path, train={"start_from": str(place)}))
    with pytest.raises(ConfigError, match="fit reads folders only"):
        trained(new.config(tmp_path, train={"start_from": "models:/x@champion"}))
    damaged = tmp_path / "damaged"
    cfusion.FittedModel.load(pretrained.output / "fold_0" / "model").save(damaged)
    (damaged / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="the weights do not load"):
        read_starts(str(damaged))
    (pretrained.output / "done.json").rename(tmp_path / "done.json")
    try:
        with pytest.raises(DataError, match="its run is not finished"):
            read_starts(str(pretrained.output))
    finally:
        (tmp_path / "done.json").rename(pretrained.output / "done.json")


def test_a_fold_without_a_model_of_its_number_is_refused(new, pretrained, tmp_path):
    config = new.config(tmp_path, splits={"folds": 4}, train={"start_from": str(pretrained.output)})
    with pytest.raises(ConfigError, match=r"0 of the 3 models are of fold 3 \(folds 0, 1, 2\)"):
        Run.prepare(config)


def test_the_start_is_part_of_the_identity_of_a_run(new, pretrained, tmp_path):
    none, one, other = (
        Run.prepare(
            new.config(tmp_path, train={} if fold is None else {"start_from": f"{pretrained.output}/{fold}/model"})
        )
        for fold in (None, "fold_0", "fold_1")
    )
    assert len({none.identity, one.identity, other.identity}) == 3
    copy = tmp_path / "copy"
    cfusion.FittedModel.load(pretrained.output / "fold_0" / "model").save(copy)
    moved = Run.prepare(new.config(tmp_path, train={"start_from": str(copy)}))
    assert moved.identity == one.identity, "its bytes decide, not its place"


@pytest.mark.slow
def test_buffers_in_months_stay_those_of_the_own_bins(new, old, tmp_path):
    model, data = {"name": "scmil", "embed_dim": 16}, {"magnifications": [20]}
    first = trained(old.config(tmp_path / "a", model=model, data=data, train={"epochs": 1}))
    first.model.save(tmp_path / "model")
    config = new.config(
        tmp_path / "b", model=model, data=data, train={"epochs": 1, "start_from": str(tmp_path / "model")}
    )
    second = trained(config)
    own = torch.tensor(second.model.card.edges_months)
    torch.testing.assert_close(second.model.module.state_dict()["edges_months"], own)
    assert dataclasses.asdict(first.model.card)["edges_months"] != second.model.card.edges_months

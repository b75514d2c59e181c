"""One fold in one process: it learns, is reproducible, resumes, and refuses invalid input."""

import resource
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from factories import CohortFiles, make_cohort

import cfusion
from cfusion.config import Config
from cfusion.errors import ConfigError, DataError, RequeueError
from cfusion.survival.metrics import concordance
from cfusion.training import loop
from cfusion.training.fitted import FittedModel
from cfusion.training.folds import FoldRun, fit


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"))


def run_fold(config: Config, folder: Path | None = None, **options) -> FoldRun:
    cohort = cfusion.read_cohort(config.cohort)
    split = cfusion.make_splits(cohort, config.splits, config.evaluation.protocol)[0]
    return fit(config, cohort, split, folder=folder, **options)


def weights(run: FoldRun) -> dict[str, torch.Tensor]:
    return run.model.module.state_dict()


def assert_same(one: FoldRun, other: FoldRun) -> None:
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name
    pd.testing.assert_frame_equal(one.predictions, other.predictions, check_exact=True)
    pd.testing.assert_frame_equal(one.history, other.history, check_exact=True)


@pytest.mark.parametrize(
    ("model", "options"),
    [("amil", {}), pytest.param("crossfusion", {"dropout": 0.1}, marks=pytest.mark.slow)],
)
def test_clear_signal_is_learnt(tmp_path, model, options):
    config = make_cohort(tmp_path / "cohort", patients=120).config(
        tmp_path,
        model={"name": model, "embed_dim": 16, "num_heads": 2, "options": options},
        train={"epochs": 15, "lr": 2e-3, "monitor": "loss"},
    )
    run = run_fold(config)
    frame = run.predictions
    assert concordance(frame["survival_months"], frame["event"], frame["risk"]).cindex > 0.7
    assert set(frame["case_id"]) == set(run.split.test)


def test_equal_seeds_give_equal_bits_and_different_seeds_do_not(files, tmp_path):
    config = files.config(tmp_path)
    first = run_fold(config)
    assert_same(first, run_fold(config))
    other = run_fold(files.config(tmp_path, seed=8))
    assert not np.allclose(first.predictions["risk"], other.predictions["risk"])


def test_risk_is_minus_the_sum_of_survival_and_cutoff_is_the_training_median(files, tmp_path):
    frame = run_fold(files.config(tmp_path)).predictions
    survival = frame[[f"survival_{k}" for k in range(1, 5)]].to_numpy()
    np.testing.assert_allclose(frame["risk"], -survival.sum(axis=1), rtol=1e-12)
    assert (np.diff(survival, axis=1) <= 0).all()
    assert frame["risk_cutoff"].nunique() == 1
    assert frame["risk"].min() - 1 < frame["risk_cutoff"].iloc[0] < frame["risk"].max() + 1


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 4, 9])
def test_resuming_after_a_stop_at_any_step_is_exact(files, tmp_path, stop_at, monkeypatch, caplog):
    """Resuming is exact to the bit, with dropout, moving average and early stopping."""
    sections = {
        "model": {"name": "crossfusion", "embed_dim": 16, "num_heads": 2},
        "train": {"ema": 0.9, "patience": 3, "epochs": 5},
    }
    undisturbed = run_fold(files.config(tmp_path, **sections))
    import cfusion.training.loop as loop

    steps = 0

    def asked() -> bool:
        nonlocal steps
        steps += 1
        return steps == stop_at

    monkeypatch.setattr(loop, "stop_requested", asked)
    with pytest.raises(RequeueError, match="Run the same command again to resume"):
        run_fold(files.config(tmp_path, **sections), folder=tmp_path / "state")
    monkeypatch.undo()
    torch.manual_seed(99)
    caplog.set_level("INFO", "cfusion")
    assert_same(run_fold(files.config(tmp_path, **sections), folder=tmp_path / "state"), undisturbed)
    assert f"resumes from {tmp_path}/state/" in caplog.text


@pytest.mark.slow
def test_resuming_after_a_kill_at_every_step_is_exact(files, tmp_path, monkeypatch):
    """The process dies after each step, between two checkpoints, and in the last epoch's partial step."""
    import cfusion.training.checkpoint as checkpoint
    from cfusion.training.step import Stepper

    sections = {"train": {"ema": 0.9, "epochs": 3, "monitor": "loss"}, "parallel": {"global_batch": 10}}
    undisturbed = run_fold(files.config(tmp_path, **sections))
    monkeypatch.setattr(checkpoint, "INTERVAL_SECONDS", -1.0)
    original = Stepper.step
    steps = 0

    def killed(self, *arguments, **options):
        nonlocal steps
        report = original(self, *arguments, **options)
        steps += 1
        if steps % 2 == 0:
            raise KeyboardInterrupt
        return report

    monkeypatch.setattr(Stepper, "step", killed)
    kills = 0
    while True:
        try:
            run = run_fold(files.config(tmp_path, **sections), folder=tmp_path / "state")
        except KeyboardInterrupt:
            kills += 1
        else:
            break
    assert kills == 3 * 3 - 1, "one step per process"
    assert_same(run, undisturbed)


def test_a_checkpoint_of_another_run_or_damaged_is_refused(files, tmp_path, monkeypatch):
    import cfusion.training.loop as loop

    monkeypatch.setattr(loop, "stop_requested", lambda: True)
    with pytest.raises(RequeueError):
        run_fold(files.config(tmp_path), folder=tmp_path / "state")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"another training run; differs in seed \(7 there, 9 here\)"):
        run_fold(files.config(tmp_path, seed=9), folder=tmp_path / "state")
    (tensors,) = (tmp_path / "state").glob("step_*/rank_00000.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"is damaged.*No checkpoint is complete"):
        run_fold(files.config(tmp_path), folder=tmp_path / "state")


def test_sigterm_asks_for_a_stop_after_the_step():
    from cfusion.interruption import graceful_stop, stop_requested

    with graceful_stop():
        assert not stop_requested()
        signal.raise_signal(signal.SIGTERM)
        assert stop_requested()
    assert not stop_requested()


def test_fixed_epoch_takes_the_last_epoch_and_published_chooses_on_the_test_fold(files, tmp_path):
    fixed = run_fold(files.config(tmp_path, evaluation={"protocol": "fixed-epoch", "bootstrap": 0}))
    assert fixed.best_epoch == 3
    assert "validation_cindex" not in fixed.history
    published = run_fold(files.config(tmp_path, evaluation={"protocol": "published", "bootstrap": 0}))
    frame = published.predictions
    scored = concordance(frame["survival_months"], frame["event"], frame["risk"]).cindex
    assert scored == pytest.approx(published.history["validation_cindex"].max())


@pytest.mark.parametrize("protocol", ["strict", "fixed-epoch", "published"])
def test_a_result_carries_the_protocol_of_its_split_and_a_configuration_that_contradicts_it_is_refused(
    files, tmp_path, protocol
):
    config = files.config(tmp_path, train={"epochs": 1}, evaluation={"protocol": protocol, "bootstrap": 0})
    cohort = cfusion.read_cohort(config.cohort)
    splits = {p: cfusion.make_splits(cohort, config.splits, p)[0] for p in ("strict", "fixed-epoch", "published")}
    assert {name: split.protocol for name, split in splits.items()} == {name: name for name in splits}
    run = fit(config, cohort, splits.pop(protocol))
    assert (run.model.card.protocol, set(run.predictions["protocol"])) == (protocol, {protocol})
    for other, split in splits.items():
        with pytest.raises(ConfigError, match=f"protocol {other}, expected evaluation.protocol={protocol}") as refused:
            fit(config, cohort, split)
        assert f"evaluation.protocol={other}" in refused.value.remedy


def test_test_patients_outcomes_change_nothing_in_training(files, tmp_path):
    config = files.config(tmp_path)
    cohort = cfusion.read_cohort(config.cohort)
    split = cfusion.make_splits(cohort, config.splits, "strict")[0]
    before = fit(config, cohort, split)
    cases = cohort.cases.copy()
    cases.loc[list(split.test), "time_months"] = 577.0
    cases.loc[list(split.test), "event"] = ~cases.loc[list(split.test), "event"].astype(bool)
    after = fit(config, cfusion.types.Cohort(cohort.name, cases, cohort.slides), split)
    for name, tensor in weights(before).items():
        assert torch.equal(tensor, weights(after)[name])
    np.testing.assert_array_equal(before.predictions["risk"], after.predictions["risk"])
    assert before.model.card == after.model.card


def test_another_encoder_is_refused(files, tmp_path):
    with pytest.raises(DataError, match=r"holds embeddings of made-up, expected data\.encoder=uni"):
        run_fold(files.config(tmp_path, data={"encoder": "uni"}))


def test_not_finite_embeddings_stop_before_the_step_and_name_the_bags(files, tmp_path, monkeypatch):
    from cfusion.data.loader import BagLoader

    original = BagLoader.stream

    def poisoned(self, *args, **options):
        for batch in original(self, *args, **options):
            batch.features["x20"][:] = float("nan")
            yield batch

    monkeypatch.setattr(BagLoader, "stream", poisoned)
    with pytest.raises(DataError, match=r"loss of a step is not finite. Bags of the step: .*PT-00"):
        run_fold(files.config(tmp_path))


def test_bag_drawn_twice_in_an_epoch_gets_different_dropout(files, tmp_path, monkeypatch):
    seeds, seed_of = [], loop.dropout_seed
    monkeypatch.setattr(loop, "dropout_seed", lambda *of: seeds.append((of, seed_of(*of))) or seeds[-1][1])
    run_fold(files.config(tmp_path, train={"sampling": "weighted", "epochs": 2, "micro_batch": 1}))
    drawn = [(epoch, *keys) for (_, epoch, keys, _), _ in seeds]
    assert len(set(drawn)) < len(drawn) == len({seed for _, seed in seeds})


def test_min_epoch_beyond_the_training_is_refused(files, tmp_path):
    with pytest.raises(ConfigError, match="No epoch was chosen"):
        run_fold(files.config(tmp_path, train={"min_epoch": 50}))


@pytest.mark.parametrize("loss", ["nll", "ce", "cox", "ranking"])
def test_every_loss_falls(files, tmp_path, loss):
    history = run_fold(files.config(tmp_path, train={"loss": loss, "epochs": 8})).history
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]


def test_failure_to_write_a_model_is_reported_and_leaves_nothing(files, tmp_path):
    run = run_fold(files.config(tmp_path, train={"epochs": 1}))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, before[1]))
    try:
        with pytest.raises(DataError, match=r"model: the model cannot be written \(.*\)\. Free disk space"):
            run.model.save(tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_saved_model_loads_and_a_damaged_one_is_refused(files, tmp_path):
    config = files.config(tmp_path)
    run = run_fold(config)
    run.model.save(tmp_path / "model")
    again = FittedModel.load(tmp_path / "model")
    assert again.card == run.model.card
    predictions = cfusion.predict(again, config.data, run.split.test, micro_batch=4)
    merged = run.predictions.merge(predictions, on="case_id", suffixes=("", "_again"))
    assert len(merged) == len(run.split.test)
    np.testing.assert_array_equal(merged["risk"], merged["risk_again"])
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="weights do not load"):
        FittedModel.load(tmp_path / "model")

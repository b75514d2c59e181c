"""`recipe: published` compared with the known facts of the published program's training."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from factories import CohortFiles, make_cohort

import cfusion
import cfusion.training.checkpoint as checkpoint
import cfusion.training.choice as choice
import cfusion.training.inference as inference
import cfusion.training.loop as loop
from cfusion.config import Config
from cfusion.data.partition import epoch_order
from cfusion.errors import ConfigError, RequeueError
from cfusion.survival.losses import LOSSES
from cfusion.survival.metrics import concordance
from cfusion.training.checkpoint import TrainState
from cfusion.training.checkpoint_files import open_checkpoint
from cfusion.training.choice import is_best, out_of_patience
from cfusion.training.folds import FoldRun, fit, open_run_shards, ready_fold
from cfusion.training.inference import PublishedEvaluation, predict_logits
from cfusion.training.optimizers import make_optimizer
from cfusion.training.runtime import Runtime
from cfusion.training.step import Stepper
from cfusion.training.world import join_world

pytestmark = pytest.mark.slow

EPOCHS = 7


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=60, two_slides=5)


def published(files: CohortFiles, output: Path) -> Config:
    config = cfusion.load_config(
        None,
        [
            "train.recipe=published", "evaluation.protocol=published", "evaluation.bootstrap=0", "data.unit=slide",
            "tracking.enabled=false", "model.embed_dim=16", "model.num_heads=2", "splits.folds=3",
            f"cohort.table={files.table}", f"data.shards={files.shards}", f"output={output}",
        ],
    )  # fmt: skip
    return config


@pytest.fixture(scope="module")
def seen(files, tmp_path_factory) -> dict[str, Any]:
    """Record the inputs of the steps and validations of a few epochs."""
    steps: list[dict[str, Any]] = []
    carried: list[int] = []
    validated: list[float] = []
    original, original_carry = Stepper.step, Stepper.carry

    def step(self: Stepper, micro_batches: Any, *, cases: int, lr: float, stop: bool = False) -> Any:
        shares = list(micro_batches)
        bags = [len(micro.batch.case_ids) for micro in shares]
        report = original(self, shares, cases=cases, lr=lr, stop=stop)
        steps.append({"lr": lr, "cases": cases, "bags": bags, "alpha": self.alpha, "clip": self.clip_norm})
        return report

    def carry(self: Stepper, micro_batches: Any, *, cases: int, window: int, stop: bool = False) -> Any:
        assert window == 32
        carried.append(cases)
        return original_carry(self, micro_batches, cases=cases, window=window, stop=stop)

    class Watched:
        def __call__(self, *arguments: Any, alpha: float) -> Any:
            validated.append(alpha)
            return LOSSES["nll"](*arguments, alpha=alpha)

    config = published(files, tmp_path_factory.mktemp("run"))
    cohort = cfusion.read_cohort(config.cohort)
    split = cfusion.make_splits(cohort, config.splits, config.evaluation.protocol)[0]
    short = config.model_copy(update={"train": config.train.model_copy(update={"epochs": EPOCHS})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", step)
        patch.setattr(Stepper, "carry", carry)
        patch.setattr(choice, "LOSSES", {"nll": Watched()})
        run = fit(short, cohort, split)
    return {
        "steps": steps,
        "carried": carried,
        "validated": validated,
        "run": run,
        "slides": sum(map(len, cohort.slides_of(split.train).values())),
    }


def test_one_slide_a_pass_and_32_of_them_a_step_and_the_last_partial_window_of_an_epoch_makes_no_step(seen):
    steps, slides = seen["steps"], seen["slides"]
    assert slides % 32, "the last window has to be partial here"
    per_epoch = slides // 32
    assert len(steps) == EPOCHS * per_epoch
    assert {bag for step in steps for bag in step["bags"]} == {1}
    assert [step["cases"] for step in steps] == [32] * per_epoch * EPOCHS
    assert seen["carried"] == [slides % 32] * EPOCHS


def test_the_learning_rate_is_a_cosine_by_epoch_from_1e_4_without_warm_up(seen):
    per_epoch = len(seen["steps"]) // EPOCHS
    expected = [1e-4 * (1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(EPOCHS) for _ in range(per_epoch)]
    assert [step["lr"] for step in seen["steps"]] == pytest.approx(expected, rel=1e-12)


def test_alpha_is_a_fifth_in_training_and_0_in_validation_and_nothing_is_clipped(seen):
    assert {step["alpha"] for step in seen["steps"]} == {0.2}
    assert {step["clip"] for step in seen["steps"]} == {None}
    assert seen["validated"] == [0.0] * EPOCHS


def test_the_best_validation_cindex_from_epoch_5_on_chooses_and_is_what_the_fold_scores(seen):
    scores = seen["run"].history["validation_cindex"]
    assert seen["run"].best_epoch == 5 + int(np.argmax(scores[5:]))


def test_the_fold_reports_the_cindex_that_chose_its_epoch_although_dropout_stays_on(seen):
    run, table = seen["run"], seen["run"].predictions
    reported = concordance(table["survival_months"], table["event"], table["risk"]).cindex
    assert reported == run.history["validation_cindex"][run.best_epoch]


def test_evaluation_drops_attention_by_fold_epoch_and_bag_and_leaves_the_model_without_dropout(
    files, tmp_path, monkeypatch
):
    config = published(files, tmp_path)
    cohort = cfusion.read_cohort(config.cohort)
    split = cfusion.make_splits(cohort, config.splits, config.evaluation.protocol)[0]
    runtime = join_world(config.parallel)
    fold = ready_fold(config, cohort, split, open_run_shards(config), runtime, folder=tmp_path, on_epoch=None)
    network, job = fold.network.eval(), fold.job
    plain = predict_logits(runtime, network, fold.test, 1)
    noisy = [predict_logits(runtime, network, fold.test, 1, job.evaluation(epoch)) for epoch in (3, 3, 4)]
    other = PublishedEvaluation("seed 7, repeat 0, fold 1", 3)
    noisy.append(predict_logits(runtime, network, fold.test, 1, other))
    assert torch.equal(noisy[0], noisy[1])
    assert all(not torch.equal(noisy[0], logits) for logits in (plain, *noisy[2:]))
    with monkeypatch.context() as patch:
        patch.setattr(inference, "evaluation_slices", lambda costs, world: [np.arange(len(costs))[::-1]])
        assert torch.equal(predict_logits(runtime, network, fold.test, 1, job.evaluation(3)), noisy[0])
    assert torch.equal(predict_logits(runtime, network, fold.test, 1), plain)
    assert not any(module.training for module in network.modules())
    job = dataclasses.replace(job, config=files.config(tmp_path))
    assert job.evaluation(3) is None


def test_time_bins_come_from_all_slides_of_the_cohort_and_elsewhere_from_the_training_patients(files, tmp_path):
    config = published(files, tmp_path)
    cohort = cfusion.read_cohort(config.cohort)
    split = cfusion.make_splits(cohort, config.splits, config.evaluation.protocol)[0]
    runtime = join_world(config.parallel)

    def inner_edges(chosen: Config) -> tuple[float, ...]:
        dataset = open_run_shards(chosen)
        fold = ready_fold(chosen, cohort, split, dataset, runtime, folder=tmp_path, on_epoch=None)
        return fold.job.bins[cohort.name].edges[1:-1]

    slides = cohort.cases.loc[cohort.slides["case_id"]]
    assert len(slides) > len(cohort.cases)
    edges = pd.qcut(slides["time_months"][slides["event"]], q=4, retbins=True)[1][1:-1]
    np.testing.assert_allclose(inner_edges(config), edges, rtol=1e-12)
    off = config.model_copy(update={"train": config.train.model_copy(update={"published_errors": False})})
    train = cohort.cases.loc[list(split.train)]
    np.testing.assert_allclose(inner_edges(off), np.quantile(train["time_months"][train["event"]], [0.25, 0.5, 0.75]))


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_fp16_without_loss_scaling_on_a_gpu_and_f32_on_a_cpu(files, tmp_path):
    parallel = published(files, tmp_path).parallel

    def computed_in(device: str, precision: str, errors: bool) -> torch.dtype | None:
        runtime: Any = SimpleNamespace(
            parallel=parallel.model_copy(update={"precision": precision}), device=torch.device(device)
        )
        context = Runtime.autocast(runtime, published=errors)
        return context.fast_dtype if isinstance(context, torch.autocast) else None

    assert computed_in("cuda", "f32", True) == torch.float16
    assert computed_in("cuda", "f32", False) is computed_in("cpu", "f32", True) is None
    assert computed_in("cuda", "f64", True) is None
    assert computed_in("cuda", "bf16", True) == torch.bfloat16
    assert not join_world(parallel).loss_scale, "the scaler of fp16 has a state"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("few"), patients=24, two_slides=2, max_cells=2)


def short(files: CohortFiles, output: Path) -> Config:
    """Two windows of 7 slides and a partial one in each epoch; any epoch may be chosen."""
    config = published(files, output)
    train = config.train.model_copy(update={"epochs": 3, "min_epoch": 0})
    return config.model_copy(
        update={"train": train, "parallel": config.parallel.model_copy(update={"global_batch": 7})}
    )


def train_in(config: Config, folder: Path | None = None) -> FoldRun:
    cohort = cfusion.read_cohort(config.cohort)
    return fit(config, cohort, cfusion.make_splits(cohort, config.splits, "published")[0], folder=folder)


@pytest.fixture(scope="module")
def undisturbed(few, tmp_path_factory) -> FoldRun:
    return train_in(short(few, tmp_path_factory.mktemp("undisturbed")))


def assert_same(one: FoldRun, other: FoldRun) -> None:
    for name, tensor in one.model.module.state_dict().items():
        assert torch.equal(tensor, other.model.module.state_dict()[name]), name
    pd.testing.assert_frame_equal(one.predictions, other.predictions, check_exact=True)
    pd.testing.assert_frame_equal(one.history, other.history, check_exact=True)


@pytest.mark.parametrize("every", [1, 2])
def test_a_process_killed_after_any_window_resumes_with_the_gradient_that_waits(
    few, tmp_path, undisturbed, every, monkeypatch
):
    """After every window or every second one, with a checkpoint of each."""
    monkeypatch.setattr(checkpoint, "INTERVAL_SECONDS", -1.0)
    original = checkpoint.Checkpoints.save
    kinds: list[bool] = []

    def save(self: Any, state: TrainState, snapshot: Any, *, now: bool) -> None:
        original(self, state, snapshot, now=now)
        kinds.append(bool(snapshot.carried))
        if len(kinds) % every == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    kills = 0
    while True:
        try:
            run = train_in(short(few, tmp_path), tmp_path / "state")
        except KeyboardInterrupt:
            kills += 1
        else:
            break
    assert kills == len(kinds) // every > 0
    assert sum(kinds) == 3, "an epoch ends with a gradient that waits"
    assert_same(run, undisturbed)


def test_a_stop_at_the_end_of_an_epoch_saves_the_gradient_that_waits(few, tmp_path, undisturbed, monkeypatch):
    asked = iter([False, False, True])
    monkeypatch.setattr(loop, "stop_requested", lambda: next(asked))
    with pytest.raises(RequeueError):
        train_in(short(few, tmp_path), tmp_path / "state")
    (folder,) = (tmp_path / "state").glob("step_*")
    with open_checkpoint(folder) as stored:
        assert {key for key in stored.shapes if key.startswith("gradient/")}
    monkeypatch.undo()
    assert_same(train_in(short(few, tmp_path), tmp_path / "state"), undisturbed)


def test_a_waiting_gradient_changes_what_is_learnt(few, tmp_path, undisturbed):
    config = short(few, tmp_path)
    off = config.model_copy(update={"train": config.train.model_copy(update={"published_errors": False})})
    other = train_in(off).model.module.state_dict()
    assert any(not torch.equal(tensor, other[name]) for name, tensor in undisturbed.model.module.state_dict().items())


def test_a_cohort_smaller_than_a_window_would_never_step_and_is_refused(few, tmp_path):
    config = short(few, tmp_path)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"global_batch": 64})})
    with pytest.raises(ConfigError, match=r"training bags are fewer than parallel\.global_batch=64"):
        train_in(config)


def test_adam_with_l2_of_4e_6(files, tmp_path):
    config = published(files, tmp_path)
    optimizer = make_optimizer(torch.nn.Linear(2, 1), config.train)
    assert isinstance(optimizer, torch.optim.Adam)
    assert not isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["lr"], group["betas"]) == (4e-6, 1e-4, (0.9, 0.999))
    assert not group.get("decoupled_weight_decay", False)


def test_100_epochs_seed_7_32_slides_a_step_4_bins_and_no_moving_average(files, tmp_path):
    config = published(files, tmp_path)
    assert (config.train.epochs, config.seed, config.parallel.global_batch) == (100, 7, 32)
    assert (config.evaluation.n_bins, config.train.ema, config.train.loss) == (4, None, "nll")


def test_training_ends_after_20_epochs_without_a_better_cindex(files, tmp_path):
    train = published(files, tmp_path).train
    job: Any = type("Job", (), {"config": published(files, tmp_path), "validation": object()})
    state = TrainState()
    scores = [0.9] * 5 + [0.5, 0.6] + [0.6] * 40
    ended = None
    for score in scores:
        if out_of_patience(state, train.patience):
            ended = state.epoch
            break
        is_best(state, {"validation_cindex": score, "validation_loss": 0.0}, job)
        state.epoch += 1
    assert state.best_epoch == 6, "epochs 0 to 4 cannot be chosen, and an equal score is not better"
    assert ended == 6 + 1 + 20


def test_slides_are_drawn_by_one_over_the_size_of_their_class_with_replacement(files, tmp_path):
    config = published(files, tmp_path)
    cohort = cfusion.read_cohort(config.cohort)
    split = cfusion.make_splits(cohort, config.splits, config.evaluation.protocol)[0]
    runtime = join_world(config.parallel)
    job = ready_fold(config, cohort, split, open_run_shards(config), runtime, folder=tmp_path, on_epoch=None).job
    outcomes = cohort.cases.loc[[bag.case_id for bag in job.train.bags]]
    label = pd.cut(outcomes["time_months"], job.bins[cohort.name].edges, right=False, labels=False)
    classes = list(zip(label, outcomes["event"], strict=True))
    sizes = Counter(classes)
    np.testing.assert_allclose(job.sampling_weights, [1 / sizes[which] for which in classes])

    keys = [bag.key for bag in job.train.bags]
    drawn: Counter[Any] = Counter()
    repeated = 0
    for epoch in range(400):
        order = epoch_order(keys, seed=7, epoch=epoch, weights=job.sampling_weights)
        assert len(order) == len(keys)
        repeated += len(order) - len(set(order.tolist()))
        drawn.update(classes[i] for i in order)
    assert repeated > 0
    share = 1 / len(sizes)
    total = 400 * len(keys)
    for which in sizes:
        assert abs(drawn[which] / total - share) < 5 * math.sqrt(share * (1 - share) / total), which

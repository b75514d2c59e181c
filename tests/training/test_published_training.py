"""`recipe: published` compared with the known facts of the published program's training."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from factories import CohortFiles, make_cohort

import cfusion
import cfusion.training.loop as loop
from cfusion.config import Config
from cfusion.data.partition import epoch_order
from cfusion.survival.losses import LOSSES
from cfusion.training.checkpoint import TrainState
from cfusion.training.choice import is_best, out_of_patience
from cfusion.training.folds import fit, open_run_shards, ready_fold
from cfusion.training.schedule import make_optimizer
from cfusion.training.step import Stepper
from cfusion.training.world import join_world

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
    validated: list[float] = []
    original = Stepper.step

    def step(self: Stepper, micro_batches: Any, *, cases: int, lr: float, stop: bool = False) -> Any:
        bags = [len(micro.batch.case_ids) for micro in micro_batches]
        report = original(self, micro_batches, cases=cases, lr=lr, stop=stop)
        steps.append({"lr": lr, "cases": cases, "bags": bags, "alpha": self.alpha, "clip": self.clip_norm})
        return report

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
        patch.setattr(loop, "LOSSES", {"nll": Watched()})
        run = fit(short, cohort, split)
    return {
        "steps": steps,
        "validated": validated,
        "run": run,
        "slides": sum(map(len, cohort.slides_of(split.train).values())),
    }


def test_one_slide_a_pass_and_32_of_them_a_step_with_the_last_step_of_an_epoch_partial(seen):
    steps, slides = seen["steps"], seen["slides"]
    assert slides % 32, "the last window has to be partial here"
    per_epoch = math.ceil(slides / 32)
    assert len(steps) == EPOCHS * per_epoch
    assert {bag for step in steps for bag in step["bags"]} == {1}
    assert [step["cases"] for step in steps] == ([32] * (per_epoch - 1) + [slides % 32]) * EPOCHS


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


def test_adam_with_l2_of_4e_6(files, tmp_path):
    config = published(files, tmp_path)
    optimizer = make_optimizer(torch.nn.Linear(2, 1), config.train)
    assert type(optimizer) is torch.optim.Adam
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
    classes = list(
        zip(pd.cut(outcomes["time_months"], job.bins.edges, right=False, labels=False), outcomes["event"], strict=True)
    )
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

"""Folds that share one read get the results of separate training, also after a stop, a kill or a failure."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import group_runs
import numpy as np
import pytest
from factories import CohortFiles, make_cohort
from group_runs import largest_difference, same_bits, train_separately, train_together
from hypothesis import given, settings
from hypothesis import strategies as st

from cfusion.config import Config
from cfusion.data import loader
from cfusion.data.partition import distribute, epoch_order, global_batches
from cfusion.data.shards import ShardDataset
from cfusion.errors import CheckpointError, ConfigError, DataError, RequeueError
from cfusion.training.group import group, group_checkpoint
from cfusion.training.group.order import owners, windows

SMALL = {"name": "crossfusion", "embed_dim": 8, "num_heads": 2}
VARIANTS: dict[str, dict[str, dict[str, object]]] = {
    "dropout, moving average, patience": {
        "model": SMALL,
        "train": {"ema": 0.8, "patience": 1, "epochs": 4},
    },
    "attention dropout, packed by tokens": {
        "model": {**SMALL, "options": {"attention_dropout": 0.2}},
        "data": {"token_budget": 60},
    },
    "packed by number, partial last batch": {"model": {"name": "mean_mil"}, "train": {"micro_batch": 3}},
    "fixed epochs": {"evaluation": {"protocol": "fixed-epoch", "bootstrap": 0}},
    "published protocol": {"evaluation": {"protocol": "published", "bootstrap": 0}},
    "cox": {"model": SMALL, "train": {"loss": "cox", "micro_batch": 2, "epochs": 2}},
    "both branches of dsmil": {"model": {"name": "dsmil"}},
    "tiles and channels drawn": {"data": {"max_tiles": 20, "feature_dropout": 0.25}, "model": {"name": "amil"}},
    "held in memory, a bag a slide": {"data": {"cache": "ram", "unit": "slide"}},
    "chosen by loss, late": {"train": {"monitor": "loss", "min_epoch": 2}},
}
LONGEST = ("attention dropout, packed by tokens", "cox", "dropout, moving average, patience", "chosen by loss, late")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=30, two_slides=3)


def configuration(files: CohortFiles, output: Path, **sections: Any) -> Config:
    """Three folds in f64, amil with 16 channels by default."""
    values: dict[str, dict[str, object]] = {
        "parallel": {"precision": "f64", "global_batch": 7},
        "model": {"name": "amil", "embed_dim": 16},
        "train": {"folds": "together", "epochs": 3, "micro_batch": 1},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return files.config(output, **values)


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] if name in LONGEST else []) for name in VARIANTS]
)
def test_together_equals_separate(files, tmp_path, variant):
    config = configuration(files, tmp_path, **VARIANTS[variant])
    separate, together = train_separately([config]), train_together([config], tmp_path)
    assert len(together) == len(separate) == 3
    assert max(map(largest_difference, separate, together)) < 1e-9
    if "patience" in variant:
        assert len({len(run.history) for run in together}) > 1, "each fold has its own patience"


@pytest.mark.slow
def test_seeds_models_and_protocols_share_a_read(files, tmp_path):
    base = {"splits": {"folds": 2}}
    configs = [
        configuration(files, tmp_path, **base, seed=1),
        configuration(files, tmp_path, **base, seed=2, train={"epochs": 2}, parallel={"global_batch": 5}),
        configuration(files, tmp_path, **base, model={**SMALL}, evaluation={"protocol": "fixed-epoch", "bootstrap": 0}),
    ]
    separate, together = train_separately(configs), train_together(configs, tmp_path)
    assert max(map(largest_difference, separate, together)) < 1e-9
    assert largest_difference_or_none(together[0], together[2]) > 1e-3, "seeds differ"


def largest_difference_or_none(one, other) -> float:
    return abs(one.predictions["risk"].mean() - other.predictions["risk"].mean())


@pytest.mark.slow
def test_each_bag_is_read_once_a_pass(files, tmp_path, monkeypatch):
    reads: list[str] = []
    original = loader.read_batch

    def counted(dataset, bags, *arguments):
        reads.extend(slide_id for bag in bags for slide_id in bag.slide_ids)
        return original(dataset, bags, *arguments)

    monkeypatch.setattr(loader, "read_batch", counted)
    config = configuration(files, tmp_path, train={"epochs": 6}, **VARIANTS["published protocol"])
    train_together([config], tmp_path)
    slides = len(ShardDataset.open(files.shards).slide_ids)
    assert len(reads) <= 8 * slides, "six epochs, one pass that validates the last, one that predicts"
    assert len(reads) >= 7 * slides
    together = len(reads)
    reads.clear()
    train_separately([config])
    assert len(reads) == 21 * slides > 2.5 * together


def test_the_seconds_of_an_epoch_are_those_of_the_pass_that_trained_it(files, tmp_path, monkeypatch):
    """Each epoch is validated in the pass after it, which also trains the next one."""
    clock, durations, reported = [0.0], iter([30.0, 20.0, 10.0, 5.0, 1.0]), dict[int, set[float]]()
    passing, ready = group.Group._pass, group_runs.ready_fold

    def passes(self, active, number):
        passing(self, active, number)
        clock[0] += next(durations)

    def watched(*arguments, **options):
        def on_epoch(epoch, metrics):
            reported.setdefault(epoch, set()).add(metrics["epoch_seconds"])

        return ready(*arguments, **{**options, "on_epoch": on_epoch})

    monkeypatch.setattr(group, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(group.Group, "_pass", passes)
    monkeypatch.setattr(group_runs, "ready_fold", watched)
    train_together([configuration(files, tmp_path)], tmp_path)
    assert reported == {0: {30.0}, 1: {20.0}, 2: {10.0}}


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [3, 40, 101])
def test_resuming_after_a_stop_is_exact(files, tmp_path, monkeypatch, stop_at):
    model = {**SMALL, "options": {"attention_dropout": 0.2}, "embed_dim": 8}
    packed = {"token_budget": 60}
    config = configuration(files, tmp_path, model=model, data=packed, train={"ema": 0.8}, splits={"folds": 2})
    undisturbed = train_together([config], tmp_path / "undisturbed")
    seen = 0

    def asked() -> bool:
        nonlocal seen
        seen += 1
        return seen == stop_at

    monkeypatch.setattr(group, "stop_requested", asked)
    with pytest.raises(RequeueError, match="Run the same command again to resume"):
        train_together([config], tmp_path / "stopped")
    resumed = train_together([config], tmp_path / "stopped")
    assert all(map(same_bits, undisturbed, resumed))
    assert not list((tmp_path / "stopped").glob("group/*")), "checkpoints of a finished group are gone"


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from cfusion.config import load_config
from cfusion.training.group import group
from cfusion.training.group import group_checkpoint
from group_runs import train_together
seen = 0
def counted():
    global seen
    seen += 1
    group_checkpoint.INTERVAL_SECONDS = 0.0 if seen > 45 else 1e9
    if seen == 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return False
group.stop_requested = counted
train_together([load_config(sys.argv[1])], Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_resuming_after_a_kill_is_exact(files, tmp_path):
    config = configuration(files, tmp_path, model=SMALL, train={"epochs": 2, "ema": 0.8}, splits={"folds": 2})
    undisturbed = train_together([config], tmp_path / "undisturbed")
    (tmp_path / "config.yaml").write_text(config.model_dump_json())
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[3])])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml"), str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": path}, check=False, timeout=300,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert group_checkpoint.kept_checkpoints(tmp_path / "killed" / "group")
    assert all(map(same_bits, undisturbed, train_together([config], tmp_path / "killed")))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(files, tmp_path, monkeypatch, caplog):
    config = configuration(files, tmp_path, train={"epochs": 2})
    undisturbed = train_together([config], tmp_path / "undisturbed")
    calls = iter(range(10**6))

    def asked() -> bool:
        monkeypatch.setattr(group_checkpoint, "INTERVAL_SECONDS", 0.0 if (call := next(calls)) > 42 else 1e9)
        return call == 45

    monkeypatch.setattr(group, "stop_requested", asked)
    with pytest.raises(RequeueError):
        train_together([config], tmp_path / "state")
    newest, _ = group_checkpoint.kept_checkpoints(tmp_path / "state" / "group")
    tensors = next(newest.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-50])
    assert all(map(same_bits, undisturbed, train_together([config], tmp_path / "state")))
    assert "Using the previous checkpoint" in caplog.text
    monkeypatch.setattr(group, "stop_requested", lambda: True)
    with pytest.raises(RequeueError):
        train_together([config], tmp_path / "state")
    for folder in group_checkpoint.kept_checkpoints(tmp_path / "state" / "group"):
        (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="No checkpoint is complete"):
        train_together([config], tmp_path / "state")


def test_a_loss_that_is_not_finite_names_the_bags(files, tmp_path, monkeypatch):
    from cfusion.data.loader import BagLoader

    original = BagLoader.stream

    def poisoned(self, *arguments, **options):
        for batch in original(self, *arguments, **options):
            if batch.case_ids == ("PT-0004",):
                batch.features["x20"][:] = float("nan")
            yield batch

    monkeypatch.setattr(BagLoader, "stream", poisoned)
    with pytest.raises(DataError, match=r"loss of a step is not finite. Bags of the step: .*PT-0004"):
        train_together([configuration(files, tmp_path)], tmp_path)


def test_no_epoch_to_choose_is_an_error(files, tmp_path):
    with pytest.raises(ConfigError, match=r"No epoch was chosen: train.min_epoch=50"):
        train_together([configuration(files, tmp_path, train={"min_epoch": 50})], tmp_path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"sampling": "weighted"}}, r"train\.sampling=weighted .*train\.folds=separate"),
        ({"parallel": {"engine": "zero1"}}, r"train\.folds=together needs parallel\.engine=ddp"),
        ({"parallel": {"precision": "fp16"}}, r"needs parallel\.engine=ddp and f32, bf16 or f64"),
    ],
)
def test_settings_that_cannot_share_a_read_are_refused_by_name(files, tmp_path, sections, message):
    with pytest.raises(ConfigError, match=message):
        configuration(files, tmp_path, **sections)


@settings(deadline=None, max_examples=25)
@given(
    bags=st.integers(1, 60), share=st.floats(0.1, 1), batch=st.integers(1, 12), world=st.integers(1, 5),
    micro=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_member_has_the_same_global_batches_as_without_the_group(bags, share, batch, world, micro, seed):
    rng = np.random.default_rng(seed)
    keys = [f"case-{i}" for i in range(bags)]
    own = sorted(rng.choice(bags, max(1, int(share * bags)), replace=False).tolist())
    costs, lengths = rng.lognormal(size=bags), rng.integers(1, 50, bags)
    order = epoch_order(keys, seed=seed, epoch=3)
    owner = owners(order, costs, world, batch)
    separate = [
        np.array(own)[part] for part in global_batches(epoch_order([keys[i] for i in own], seed=seed, epoch=3), batch)
    ]
    for rank in range(world):
        mine = set(order[owner == rank].tolist())
        planned = windows(
            order, set(own), mine, costs, lengths, global_batch=batch, micro_batch=micro, token_budget=None
        )
        assert [list(window.bags) for window in planned] == [part.tolist() for part in separate]
        for window in planned:
            assert order[window.end - 1] == window.bags[-1]
            passed = [bag for bags_of_pass in window.passes for bag in bags_of_pass]
            assert sorted(passed) == sorted(set(window.bags) & mine)
            if world == 1:
                micro_batches = distribute(costs[list(window.bags)], 1, micro)[0]
                assert [set(p) for p in window.passes] == [{window.bags[i] for i in m.indices} for m in micro_batches]

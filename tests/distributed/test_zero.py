"""ZeRO 1, 2 and 3 train, resume and fail as a single process does."""

import contextlib
import errno
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from factories import CohortFiles, make_cohort
from safetensors.torch import load_file
from spawn import run_world

import cfusion
from cfusion.config import Config
from cfusion.errors import CheckpointError, DataError, RequeueError
from cfusion.training.consolidation import consolidate
from cfusion.training.fitted import FittedModel
from cfusion.training.folds import fit

pytestmark = pytest.mark.slow

STAGES = ("zero1", "zero2", "zero3")
ON_ONE = ("ddp", "zero1", "zero3")
STOP_AT = 3
CANCELLED = ("score.bias",)
"""Softmax cancels it, so only rounding moves it, which Adam turns into full steps."""


def configuration(files: CohortFiles, output: Path, engine: str, **sections: dict[str, Any]) -> Config:
    """Accumulation over bags of any length, a partial last window, clipping, warm-up, a moving average, a choice."""
    settings: dict[str, dict[str, Any]] = {
        "parallel": {"engine": engine, "global_batch": 8},
        "model": {"name": "amil", "embed_dim": 16},
        "train": {
            "epochs": 3,
            "micro_batch": 1,
            "clip_norm": 0.05,
            "ema": 0.8,
            "warmup_fraction": 0.2,
            "monitor": "loss",
        },
    }
    return files.config(output, **{key: settings.get(key, {}) | sections.get(key, {}) for key in settings | sections})


def train(config: Config, folder: Path | None = None) -> Any:
    from accelerate.state import AcceleratorState

    from cfusion.training.zero import ZeroRuntime

    AcceleratorState._reset_state(True)
    ZeroRuntime.accelerate.cache_clear()
    cohort = cfusion.read_cohort(config.cohort)
    return fit(config, cohort, cfusion.make_splits(cohort, config.splits)[0], folder=folder)


def save(run: Any, folder: Path) -> None:
    folder = folder / os.environ.get("RANK", "0")
    run.model.save(folder / "model")
    run.predictions.to_csv(folder / "predictions.csv", index=False)
    run.history.to_csv(folder / "history.csv", index=False)


def stop_after(steps: int) -> None:
    """Have every training of this process asked to stop after `steps` steps; 0: never."""
    import cfusion.training.loop as loop

    calls = iter(range(1, 1 << 30))
    loop.stop_requested = lambda: next(calls) == steps


def train_stop_and_resume(configs: dict[str, Config], folder: Path) -> None:
    """In a worker: each configuration undisturbed, and stopped and resumed; a copy of where it stopped stays."""
    compiled = folder / "compiled"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(compiled)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for name, config in configs.items():
            stop_after(0)
            save(train(config), folder / name / "undisturbed")
            if name.startswith("cox"):
                continue
            stop_after(STOP_AT)
            with pytest.raises(RequeueError):
                train(config, folder / name / "state")
            if os.environ["RANK"] == "0":
                for copy in ("stopped", "single_state"):
                    shutil.copytree(folder / name / "state", folder / name / copy)
            stop_after(0)
            save(train(config, folder / name / "state"), folder / name / "resumed")
    (folder / f"said_{os.environ['RANK']}.txt").write_text(said.getvalue())
    for name in ("ddp", "zero3"):
        refuse_not_finite(configs[name])
        refuse_a_gradient_that_is_not_finite(configs[name])
    refuse_a_full_disk(configs["zero2"], folder / "full")
    assert not compiled.exists(), "a compilation that is killed leaves a lock for which the next start waits"


def refuse_not_finite(config: Config) -> None:
    """Both processes stop with the same words where one of them has a bag with a NaN."""
    from cfusion.data.loader import BagLoader

    original = BagLoader.stream

    def poisoned(self: Any, *arguments: Any, **options: Any) -> Any:
        for batch in original(self, *arguments, **options):
            if os.environ["RANK"] == "1":
                batch.features["x20"][:] = float("nan")
            yield batch

    BagLoader.stream = poisoned
    with pytest.raises(DataError, match=r"The loss of a step is not finite. Bags of the step: PT-.*, PT-") as refused:
        train(config)
    BagLoader.stream = original
    messages: list[str] = [""] * 2
    torch.distributed.all_gather_object(messages, str(refused.value))
    assert messages[0] == messages[1]


class RootOfZero:
    """A loss that is 0 with a gradient that is not a number."""

    set_wise = False

    def __call__(self, output: Any, targets: Any, *, alpha: float) -> torch.Tensor:
        return (output.logits.sum(dim=1) * 0).sqrt()


def refuse_a_gradient_that_is_not_finite(config: Config) -> None:
    """No parameter has moved."""
    from cfusion.training import folds
    from cfusion.training.step import Stepper

    kept: dict[str, torch.Tensor] = {}
    losses, step = folds.LOSSES, Stepper.step

    def watched(self: Stepper, *arguments: Any, **options: Any) -> Any:
        parts = self.runtime.parts(self.model.module, self.optimizer)
        before = {name: part.values.clone() for name, part in parts.items()}
        try:
            return step(self, *arguments, **options)
        finally:
            assert before
            assert all(torch.equal(part.values, before[name]) for name, part in parts.items())
            kept.update(before)

    folds.LOSSES, Stepper.step = {"nll": RootOfZero()}, watched
    with pytest.raises(DataError, match=r"The gradient of a step is not finite. Bags of the step: PT-"):
        train(config)
    folds.LOSSES, Stepper.step = losses, step
    assert kept


def refuse_a_full_disk(config: Config, folder: Path) -> None:
    """Both processes say what one of them met, and nothing is left of the checkpoint."""
    from cfusion.training import checkpoint_files

    original = checkpoint_files._write_tensors

    def full(*arguments: Any) -> str:
        if os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    checkpoint_files._write_tensors = full
    stop_after(2)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left on device"):
        train(config, folder)
    checkpoint_files._write_tensors = original
    torch.distributed.barrier()
    assert list(folder.iterdir()) == []


def resume_in_one_process(configs: dict[str, Config], folder: Path) -> None:
    """In the only worker, started by no launcher: what two processes began."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    for name, config in configs.items():
        save(train(config, folder / name / "single_state"), folder / name / "single")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=26)


@pytest.fixture(scope="module")
def worlds(files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    configs = {engine: configuration(files, folder, engine) for engine in ("ddp", *STAGES)}
    configs["cox"] = configuration(files, folder, "zero3", train={"loss": "cox"})
    configs["cox reference"] = configuration(files, folder, "ddp", train={"loss": "cox"})
    run_world(2, train_stop_and_resume, folder / "two", configs, folder / "two", timeout=400)
    run_world(1, resume_in_one_process, folder / "one", {e: configs[e] for e in ON_ONE}, folder / "two", timeout=200)
    return folder / "two"


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    for name in set(ours) - set(CANCELLED):
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=tolerance, msg=name)
    for table in ("predictions.csv", "history.csv"):
        ours, theirs = (pd.read_csv(path / table) for path in (one, other))
        pd.testing.assert_frame_equal(ours, theirs, atol=max(tolerance, 1e-12), rtol=max(tolerance, 1e-12))


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("engine", "reference"), [("zero1", "ddp"), ("zero2", "ddp"), ("zero3", "ddp"), ("cox", "cox reference")]
)
def test_every_stage_trains_the_model_that_ddp_trains(worlds, engine, reference, rank):
    assert_close(worlds / engine / "undisturbed" / rank, worlds / reference / "undisturbed" / "0", 1e-4)


@pytest.mark.parametrize("engine", ["ddp", *STAGES])
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(worlds, engine):
    for rank in ("0", "1"):
        ours, theirs = (worlds / engine / how / rank for how in ("undisturbed", "resumed"))
        for name in ("model/model.safetensors", "model/model.json", "predictions.csv", "history.csv"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.mark.parametrize("engine", ON_ONE)
def test_one_process_goes_on_where_two_stopped(worlds, engine):
    assert_close(worlds / engine / "single" / "0", worlds / engine / "undisturbed" / "0", 1e-4)


def test_deepspeed_keeps_quiet(worlds):
    assert [path.read_text() for path in sorted(worlds.glob("said_*.txt"))] == ["", ""]


@pytest.mark.parametrize("engine", STAGES)
def test_each_process_writes_its_own_part_of_the_moments(worlds, engine):
    (step,) = (worlds / engine / "stopped").glob("step_*")
    numbers = json.loads((step / "state.json").read_text())
    assert numbers["state"]["step"] == STOP_AT
    assert numbers["world_size"] == 2
    shards = [load_file(path) for path in sorted(step.glob("rank_*.safetensors"))]
    moments = [sum(t.numel() for key, t in shard.items() if key.startswith("exp_avg/")) for shard in shards]
    complete = sum(t.numel() for t in load_file(worlds / engine / "undisturbed/0/model/model.safetensors").values())
    assert sum(moments) == complete
    assert max(moments) <= 0.51 * complete


@pytest.mark.parametrize("weights", ["best", "last"])
@pytest.mark.parametrize("engine", STAGES)
def test_a_sharded_checkpoint_becomes_a_plain_model(worlds, engine, weights, tmp_path):
    ours, theirs = (consolidate(worlds / name / "stopped", weights) for name in (engine, "ddp"))
    assert ours.card == theirs.card
    assert ours.card.risk_cutoff is None, "a training in progress has none"
    ours.save(tmp_path / "model")
    module = FittedModel.load(tmp_path / "model").module
    for name, tensor in theirs.module.state_dict().items():
        if name not in CANCELLED:
            torch.testing.assert_close(module.state_dict()[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


def train_all(configs: dict[str, Config], folder: Path) -> None:
    for name, config in configs.items():
        save(train(config), folder / name)


def test_crossfusion_is_the_same_under_every_stage(files, tmp_path):
    configs = {
        engine: configuration(
            files, tmp_path, engine,
            model={"name": "crossfusion", "embed_dim": 16, "num_heads": 2}, train={"micro_batch": 1, "clip_norm": 0.5},
        )
        for engine in ("ddp", *STAGES)
    }  # fmt: skip
    run_world(2, train_all, tmp_path / "two", configs, tmp_path / "two", timeout=600)
    for engine in STAGES:
        assert_close(tmp_path / "two" / engine / "0", tmp_path / "two" / "ddp" / "0", 1e-4)


def test_bf16_is_the_same_under_the_stages_that_keep_parameters_complete(files, tmp_path):
    """ZeRO 3 rounds otherwise: its own linear layer adds the bias after it has rounded the product.

    A few steps only: what differs in the ninth digit soon rounds to another bf16.
    """
    configs = {
        engine: configuration(files, tmp_path, engine, parallel={"precision": "bf16"}, train={"epochs": 1})
        for engine in ("ddp", "zero1", "zero2")
    }
    run_world(2, train_all, tmp_path / "two", configs, tmp_path / "two", timeout=600)
    for engine in ("zero1", "zero2"):
        assert_close(tmp_path / "two" / engine / "0", tmp_path / "two" / "ddp" / "0", 1e-6)

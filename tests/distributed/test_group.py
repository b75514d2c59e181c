"""Folds that share one read, over several processes."""

import os
from pathlib import Path

import pytest
import torch
from factories import CohortFiles, make_cohort
from group_runs import train_together
from safetensors.torch import load_file
from spawn import run_world

from cfusion.config import Config
from cfusion.errors import RequeueError
from cfusion.training.group import group

pytestmark = pytest.mark.slow

VARIANTS: dict[str, dict[str, dict[str, object]]] = {
    "dropout, moving average, patience": {
        "model": {"name": "crossfusion", "embed_dim": 16, "num_heads": 2},
        "train": {"ema": 0.8, "patience": 1},
    },
    "cox, partial last window": {"train": {"loss": "cox"}, "parallel": {"global_batch": 10}},
    "fewer bags than ranks in a window": {"parallel": {"global_batch": 2}, "train": {"epochs": 2}},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=24)


def train_and_save(configs: dict[str, Config], folder: Path) -> None:
    """In a worker: train the folds of each configuration together; each rank writes what it got."""
    for name, config in configs.items():
        for number, run in enumerate(train_together([config], folder / name)):
            run.model.save(folder / name / f"model_{os.environ['RANK']}_{number}")


def stop_and_resume(config: Config, folder: Path) -> None:
    """In a worker: only the last rank is asked to stop; both stop, resume, and get the undisturbed result."""
    train_and_save({"undisturbed": config}, folder)
    asked, seen = group.stop_requested, 0

    def on_the_last_rank() -> bool:
        nonlocal seen
        seen += 1
        return os.environ["RANK"] == "1" and seen == 9

    group.stop_requested = on_the_last_rank
    with pytest.raises(RequeueError):
        train_together([config], folder / "stopped")
    group.stop_requested = asked
    train_and_save({"stopped": config}, folder)


def configuration(files: CohortFiles, output: Path, variant: dict[str, dict[str, object]]) -> Config:
    sections: dict[str, dict[str, object]] = {
        "parallel": {"precision": "f64", "global_batch": 4},
        "model": {"name": "amil", "embed_dim": 16},
        "train": {"folds": "together", "epochs": 3, "micro_batch": 1},
        "splits": {"folds": 2},
    }
    return files.config(output, **{k: v | variant.get(k, {}) for k, v in sections.items()})


@pytest.fixture(scope="module")
def worlds(files, tmp_path_factory) -> Path:
    """All variants trained on 1 and 2 processes."""
    folder = tmp_path_factory.mktemp("worlds")
    configs = {name: configuration(files, folder, variant) for name, variant in VARIANTS.items()}
    for world in (1, 2):
        run_world(world, train_and_save, folder / str(world), configs, folder / str(world))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_give_the_parameters_of_one(worlds, variant):
    for fold in range(2):
        single = load_file(worlds / "1" / variant / f"model_0_{fold}" / "model.safetensors")
        for rank in range(2):
            shared = load_file(worlds / "2" / variant / f"model_{rank}_{fold}" / "model.safetensors")
            for name, tensor in single.items():
                torch.testing.assert_close(shared[name], tensor, atol=1e-9, rtol=1e-9)


def test_two_processes_stopped_and_started_again_end_with_the_same_bits(files, tmp_path):
    config = configuration(files, tmp_path, VARIANTS["dropout, moving average, patience"])
    run_world(2, stop_and_resume, tmp_path, config, tmp_path)
    for fold in range(2):
        path = Path(f"model_0_{fold}") / "model.safetensors"
        undisturbed, resumed = load_file(tmp_path / "undisturbed" / path), load_file(tmp_path / "stopped" / path)
        assert all(torch.equal(resumed[name], tensor) for name, tensor in undisturbed.items())

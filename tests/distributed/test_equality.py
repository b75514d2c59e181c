"""The final model does not depend on the number of processes."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from factories import CohortFiles, joint_config, make_cohort, make_cohorts
from safetensors.torch import load_file
from spawn import run_world

import cfusion
from cfusion.config import Config
from cfusion.errors import ConfigError
from cfusion.training.folds import fit


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=24)


def fit_and_save(configs: dict[str, Config], folder: Path) -> None:
    """In a worker: train the first fold of each configuration; each rank writes what it got."""
    rank = os.environ["RANK"]
    for name, config in configs.items():
        cohort = cfusion.read_cohorts(config)
        run = fit(config, cohort, cfusion.make_splits(cohort, config.splits, config.evaluation.protocol)[0])
        run.model.save(folder / name / f"model_{rank}")
        run.predictions.to_csv(folder / name / f"predictions_{rank}.csv", index=False)


VARIANTS: dict[str, dict[str, dict[str, object]]] = {
    "every bag once": {},
    "weighted sampling": {"train": {"sampling": "weighted"}},
    "cox over ranks": {"train": {"loss": "cox"}},
    "partial last window": {"parallel": {"global_batch": 12}, "train": {"epochs": 10}},
    "published errors": {
        "parallel": {"global_batch": 6},
        "train": {"epochs": 7, "published_errors": True, "min_epoch": 4},
        "model": {"name": "crossfusion_single", "embed_dim": 16, "num_heads": 2, "options": {"published": True}},
        "evaluation": {"protocol": "published"},
    },
    "packed bags": {"train": {"micro_batch": 3}, "model": {"name": "mean_mil"}},
}
QUICK = ("every bag once", "packed bags")
"""Trained on two processes by default; these and the others on two and three by the slow tests."""


def configuration(files: CohortFiles, output: Path, variant: dict[str, dict[str, object]]) -> Config:
    """20 steps or more in f64, bags of any length, one bag per forward pass by default."""
    sections: dict[str, dict[str, object]] = {
        "parallel": {"precision": "f64", "global_batch": 6},
        "model": {"name": "amil", "embed_dim": 16},
        "train": {"epochs": 5, "micro_batch": 1},
        "evaluation": {"protocol": "fixed-epoch", "bootstrap": 0},
    }
    return files.config(output, **{k: v | variant.get(k, {}) for k, v in sections.items()})


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory) -> Callable[[int, str], Path]:
    """The folder of a variant, trained together with others of its speed when a test first asks for one of them."""
    folder = tmp_path_factory.mktemp("worlds")
    configs = {name: configuration(files, folder, variant) for name, variant in VARIANTS.items()}

    def train(world: int, variant: str) -> Path:
        if not (folder / str(world) / variant).exists():
            wanted = {name: config for name, config in configs.items() if (name in QUICK) == (variant in QUICK)}
            run_world(world, fit_and_save, folder / str(world), wanted, folder / str(world))
        return folder / str(world) / variant

    return train


@pytest.mark.slow
def test_several_cohorts_give_the_same_model_on_two_processes(tmp_path):
    files = make_cohorts(tmp_path / "cohorts", patients=24)
    sections = {
        "parallel": {"precision": "f64", "global_batch": 8},
        "evaluation": {"protocol": "fixed-epoch", "bootstrap": 0},
    }
    configs = {
        loss: joint_config(files, tmp_path, **sections, train={"loss": loss, "epochs": 4, "micro_batch": 1})
        for loss in ("nll", "cox", "ranking")
    }
    for world in (1, 2):
        run_world(world, fit_and_save, tmp_path / str(world), configs, tmp_path / str(world))
    for loss in configs:
        one, two = (tmp_path / str(world) / loss for world in (1, 2))
        weights = load_file(one / "model_0" / "model.safetensors")
        for rank in (0, 1):
            for name, tensor in load_file(two / f"model_{rank}" / "model.safetensors").items():
                torch.testing.assert_close(tensor, weights[name], rtol=1e-9, atol=1e-12)
        first, other = (pd.read_csv(folder / "predictions_0.csv") for folder in (one, two))
        np.testing.assert_allclose(first["risk"], other["risk"], rtol=1e-9)


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in VARIANTS]
)
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_gives_the_same_parameters(trained, world, variant):
    one, several = trained(1, variant), trained(world, variant)
    single = load_file(one / "model_0" / "model.safetensors")
    predictions = pd.read_csv(one / "predictions_0.csv")
    for rank in range(world):
        shared = load_file(several / f"model_{rank}" / "model.safetensors")
        for name, tensor in single.items():
            torch.testing.assert_close(shared[name], tensor, atol=1e-9, rtol=1e-9)
        gathered = pd.read_csv(several / f"predictions_{rank}.csv")
        assert list(gathered["case_id"]) == list(predictions["case_id"]), "every case once, in the same order"
        np.testing.assert_allclose(gathered["risk"], predictions["risk"], atol=1e-9)


def disagree(config: Config) -> None:
    """In a worker: the last rank comes with another seed."""
    from cfusion.runs.crossval import cross_validate

    seed = 7 + int(os.environ["RANK"] == "1")
    with pytest.raises(ConfigError, match=r"Ranks \[1\] differ from rank 0 in: configuration"):
        cross_validate(config.model_copy(update={"seed": seed}))


def test_ranks_that_disagree_stop_before_training(files, tmp_path):
    run_world(2, disagree, tmp_path / "world", files.config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def write_to_separate_disks(config: Config) -> None:
    """In a worker: each process has a separate disk."""
    from cfusion.runs.crossval import cross_validate

    output = config.output / os.environ["RANK"]
    with pytest.raises(ConfigError, match=r"rank 0 has made this folder, and ranks \[1\] do not see it.*all nodes"):
        cross_validate(config.model_copy(update={"output": output}))


def test_output_that_differs_between_nodes_is_refused_before_training(files, tmp_path):
    run_world(2, write_to_separate_disks, tmp_path / "world", files.config(tmp_path / "run"))


def indivisible(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"global_batch=7 cannot be shared by 2 processes.*global_batch=8"):
        fit_and_save({"run": config}, Path())


def test_a_global_batch_that_does_not_divide_names_the_nearest_that_does(files, tmp_path):
    run_world(2, indivisible, tmp_path / "world", files.config(tmp_path, parallel={"global_batch": 7}))

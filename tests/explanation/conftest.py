"""Train one ensemble for all tests of explanations."""

import fcntl
import os

import pytest
from planted_bags import ensemble, planted_slide

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.explanation import explain
from cfusion.training.fitted import FittedModel


@pytest.fixture(scope="session")
def folds(tmp_path_factory) -> FoldEnsemble:
    """Trained by the worker that comes first; the others wait for its files."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "ensemble"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "saved").exists():
            for number, model in enumerate(ensemble(folder / "training", epochs=16).models):
                model.save(folder / f"model_{number}")
            (folder / "saved").touch()
    return FoldEnsemble(tuple(FittedModel.load(path) for path in sorted(folder.glob("model_*"))))


@pytest.fixture(scope="session")
def slide():
    return planted_slide(8)[0]


@pytest.fixture(scope="session")
def found(folds, slide):
    return explain(folds, slide, occlusion="tiles")

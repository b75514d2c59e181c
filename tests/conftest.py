"""Fixtures that every part of the tests may use."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("MLFLOW_TRACKING_URI", None)
install_import_hook(["cfusion.models", "cfusion.data", "cfusion.survival"], "typechecker.check")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared material: golden weights, published predictions, clinical tables, real slides."""
    folder = Path(os.environ.get("CFUSION_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"shared material is not at {folder}; set CFUSION_SHARED to its folder")
    return folder


@pytest.fixture(autouse=True)
def _no_handler_stays_behind() -> Iterator[None]:
    """A command run within a test logs to that test's output, which is closed when the test ends."""
    yield
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            logging.root.removeHandler(handler)


@pytest.fixture(autouse=True)
def _address_and_threads_stay_as_they_were() -> Iterator[None]:
    """MLflow puts its address into the environment; a sweep's worker that runs within a test sets its threads."""
    watched = ("OMP_NUM_THREADS", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "CUDA_VISIBLE_DEVICES")
    before = {name: os.environ.get(name) for name in watched}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        os.environ.update({name: value} if value is not None else {})
    if "torch" in sys.modules and (torch := sys.modules["torch"]).get_num_threads() != 1:
        torch.set_num_threads(1)

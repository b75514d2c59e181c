"""Fixtures that every part of the tests may use."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
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

"""Fixtures that every part of the tests may use."""

import os
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

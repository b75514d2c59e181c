"""Fixtures that every part of the tests may use."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["JAXTYPING_DISABLE"] = "0"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared material: golden weights, published predictions, clinical tables, real slides."""
    folder = Path(os.environ.get("CFUSION_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"shared material is not at {folder}; set CFUSION_SHARED to its folder")
    return folder

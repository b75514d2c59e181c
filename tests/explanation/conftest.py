"""The ensemble that all tests of explanations read."""

from pathlib import Path

import pytest
from planted_bags import planted_slide

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.explanation import explain
from cfusion.training.fitted import FittedModel


@pytest.fixture(scope="session")
def folds(material: Path) -> FoldEnsemble:
    """Two models as `planted_bags.ensemble(…, epochs=16)` trained them, which takes longer than many of the tests."""
    return FoldEnsemble(tuple(FittedModel.load(path) for path in sorted((material / "planted").glob("model_*"))))


@pytest.fixture(scope="session")
def slide():
    return planted_slide(8)[0]


@pytest.fixture(scope="session")
def found(folds, slide):
    return explain(folds, slide, occlusion="tiles")

"""Train one ensemble for all tests of explanations."""

import pytest
from planted_bags import ensemble, planted_slide

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.explanation import explain


@pytest.fixture(scope="session")
def folds(tmp_path_factory) -> FoldEnsemble:
    return ensemble(tmp_path_factory.mktemp("ensemble"), epochs=16)


@pytest.fixture(scope="session")
def slide():
    return planted_slide(8)[0]


@pytest.fixture(scope="session")
def found(folds, slide):
    return explain(folds, slide, occlusion="tiles")

"""Train one ensemble for all tests of explanations."""

import pytest
from planted_bags import ensemble

from cfusion.apply.ensemble import FoldEnsemble


@pytest.fixture(scope="session")
def folds(tmp_path_factory) -> FoldEnsemble:
    return ensemble(tmp_path_factory.mktemp("ensemble"), epochs=16)

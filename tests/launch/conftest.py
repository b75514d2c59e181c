"""One made-up cohort for each module."""

import pytest
from factories import CohortFiles, make_cohort


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"))

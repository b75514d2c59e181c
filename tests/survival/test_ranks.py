"""Ranks over data sets compared with scipy and with the published example."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import friedmanchisquare

from cfusion.errors import DataError
from cfusion.survival.ranks import rank_methods

DEMSAR = pd.DataFrame(
    {
        "C4.5": [.763, .599, .954, .628, .882, .936, .661, .583, .775, 1.0, .94, .619, .972, .957],
        "C4.5+m": [.768, .591, .971, .661, .888, .931, .668, .583, .838, 1.0, .962, .666, .981, .978],
        "C4.5+cf": [.771, .59, .968, .654, .886, .916, .609, .563, .866, 1.0, .965, .614, .9751, .946],
        "C4.5+m+cf": [.798, .569, .967, .657, .898, .931, .685, .625, .875, 1.0, .962, .669, .975, .97],
    }
)  # fmt: skip
"""Table 6 of Demšar (2006): AUC of four learners on fourteen data sets."""


def test_the_published_example():
    ranking = rank_methods(DEMSAR)
    assert dict(zip(ranking.names, ranking.mean_ranks, strict=True)) == pytest.approx(
        {"C4.5": 3.143, "C4.5+m": 2.0, "C4.5+cf": 2.893, "C4.5+m+cf": 1.964}, abs=5e-4
    )
    assert ranking.critical_difference == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 14)), rel=1e-3)
    assert ranking.p == pytest.approx(friedmanchisquare(*(DEMSAR[c] for c in DEMSAR)).pvalue)


def test_groups_end_where_the_difference_is_critical():
    values = pd.DataFrame({"a": [3.0] * 30, "b": [2.0] * 30, "c": [1.0] * 30})
    assert rank_methods(values).cliques == ()
    near = pd.DataFrame({"a": [3.0] * 6, "b": [2.0] * 6, "c": [1.0] * 6})
    assert rank_methods(near).cliques == (("a", "b"), ("b", "c"))


@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(1, 8))
@settings(deadline=None, max_examples=40)
def test_ranks_add_up_and_follow_the_order_of_values(seed, methods, blocks):
    rng = np.random.default_rng(seed)
    values = pd.DataFrame(rng.integers(0, 5, size=(blocks, methods)), columns=[f"m{i}" for i in range(methods)])
    ranking = rank_methods(values)
    assert sum(ranking.mean_ranks) == pytest.approx(methods * (methods + 1) / 2)
    assert list(ranking.mean_ranks) == sorted(ranking.mean_ranks)
    assert rank_methods(values * 3 + 1) == ranking or np.isnan(ranking.p)
    assert np.isnan(ranking.critical_difference) == (blocks == 1)


def test_missing_value_is_an_error():
    with pytest.raises(DataError, match="a value of each on every data set"):
        rank_methods(pd.DataFrame({"a": [1.0, np.nan], "b": [1.0, 2.0]}))

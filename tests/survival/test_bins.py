"""Time bins: published quantiles, a label for any time, fitted on training patients only."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfusion.errors import DataError
from cfusion.survival.bins import TimeBins


def test_published_rule() -> None:
    """Labels equal those of pandas for quartiles of the uncensored times, left-closed, with widened outer edges."""
    generator = np.random.default_rng(0)
    time = generator.exponential(30, 200)
    event = generator.random(200) < 0.5
    _, edges = pd.qcut(time[event], q=4, retbins=True, labels=False)
    edges[0], edges[-1] = time.min() - 1e-6, time.max() + 1e-6
    published = pd.cut(time, bins=edges, labels=False, right=False, include_lowest=True)
    np.testing.assert_array_equal(TimeBins.fit(time, event, 4).label(time), published)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), bins=st.integers(2, 8))
def test_every_time_has_a_label(seed: int, bins: int) -> None:
    generator = np.random.default_rng(seed)
    time = generator.exponential(20, 100)
    fitted = TimeBins.fit(time, np.arange(100) % 2 == 0, bins)
    assert len(fitted.right_edges_months) == fitted.n_bins == bins
    assert (np.diff(fitted.edges) > 0).all()
    labels = fitted.label([0.0, *sorted(time), 1e6])
    assert labels[0] == 0
    assert labels[-1] == bins - 1
    assert (np.diff(labels) >= 0).all()
    events = fitted.label(time[np.arange(100) % 2 == 0])
    assert np.ptp(np.bincount(events, minlength=bins)) <= 1


def test_more_bins_than_distinct_event_times() -> None:
    with pytest.raises(DataError, match="3 distinct event times among 5 training patients cannot fill 4 time bins"):
        TimeBins.fit([1, 2, 3, 3, 9], [1, 1, 1, 1, 0], 4)
    with pytest.raises(DataError, match="quantiles of 14 event times coincide"):
        TimeBins.fit([5] * 10 + [6, 7, 8, 9], [1] * 14, 4)

"""What a risk means in words: survival after years, and the place among the training patients."""

import numpy as np

from cfusion.survival.curves import risk_words, survival_after_years


def test_survival_after_years_is_that_of_the_bin_before_and_unknown_beyond_the_last_edge() -> None:
    years = survival_after_years([6.0, 12.0, 40.0], [0.9, 0.8, 0.5])
    assert years[1] == 0.8
    assert years[3] == 0.8
    assert np.isnan(years[5])
    open_ended = survival_after_years([10.0, 60.0, np.inf], [0.9, 0.7, 0.1])
    assert open_ended == {1: 0.9, 3: 0.9, 5: 0.7}
    assert all(np.isnan(at) for at in survival_after_years([3.0], [0.9]).values())


def test_what_is_not_known_is_left_out_of_the_words() -> None:
    years = {1: 0.912, 3: 0.7, 5: float("nan")}
    assert risk_words(82.4, years) == (
        "above 82% of the training patients; predicted survival 91% at 1 year, 70% at 3 years"
    )
    assert risk_words(float("nan"), years) == "predicted survival 91% at 1 year, 70% at 3 years"
    assert risk_words(float("nan"), dict.fromkeys((1, 3, 5), float("nan"))) == ""

"""The submitting site is read where a stain was planted, and only there."""

import numpy as np

from cfusion.survival.site_reading import read_sites


def test_a_planted_stain_gives_the_site_away() -> None:
    generator = np.random.default_rng(2)
    site = np.repeat(np.array(["A6", "DU", "06", "XX"]), [30, 40, 30, 4])
    plain = generator.normal(size=(len(site), 6))
    stain = np.where(site == "DU", 2.0, 0.0)[:, None] * np.array([1, 0, 0, 1, 0, 0])
    without, planted = read_sites(plain, site), read_sites(plain + stain, site)
    assert without is not None
    assert planted is not None
    assert (planted.sites, planted.patients) == (3, 100)
    assert abs(without.null - 1 / 3) < 0.05
    assert without.p > 0.05
    assert planted.p < 0.01
    assert planted.accuracy > planted.null_high
    assert "the site can be read" in str(planted)
    assert read_sites(plain[:40], site[:40]) is not None
    assert read_sites(plain[:30], site[:30]) is None

"""Models that have learnt noise lie within the limits of the null; they did not while its folds were independent."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks.null_band import SlidesWithoutSignal, linear, networks, write_cohort

WITHIN, TWICE, BELOW = range(3)


@pytest.mark.parametrize(("patients", "repeats"), [(60, 1), (60, 3), (150, 1)])
def test_linear_models_of_noise_lie_within_the_limits(patients: int, repeats: int) -> None:
    rows = linear(patients, "first step, 20 features", repeats, trainings=60).rows("case")
    assert 0.94 <= rows[WITHIN].ours <= 0.995
    assert rows[WITHIN].theirs < rows[WITHIN].ours - 0.03
    assert rows[WITHIN].theirs < 0.94
    assert rows[BELOW].ours <= 0.05 < rows[BELOW].theirs


def test_slides_of_a_patient_look_alike_and_say_nothing() -> None:
    slides = SlidesWithoutSignal(3)
    one, again, other = (slides.read(name).features["x5"] for name in ("slide-000", "slide-000", "slide-001"))
    assert (one == again).all()
    assert one.shape == other.shape
    assert abs(one.mean(axis=0) - other.mean(axis=0)).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["strict", "published"])
def test_models_of_the_program_are_compared_with_the_null_of_their_protocol(tmp_path: Path, protocol: str) -> None:
    write_cohort(tmp_path, 60)
    found = networks(tmp_path, "mean_mil", protocol, permutations=2)
    assert all(0.3 < score < 0.75 for score in found.scores)
    means = [null.independent.mean for null in found.ours]
    assert all((mean > 0.6) == (protocol == "published") for mean in means)
    wide = dataclasses.replace(found, independent=10 * found.independent)
    assert wide.rows("case")[WITHIN].theirs == 1

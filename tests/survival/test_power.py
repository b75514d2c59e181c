"""Which difference a cohort can show."""

from cfusion.survival.power import DIFFERENCE, SPREAD, power_of


def test_more_events_show_smaller_differences() -> None:
    small, large = power_of(400, 100), power_of(1600, 400)
    for kind in SPREAD:
        assert large.smallest[kind] * 2 == small.smallest[kind]
        needed = small.needed_events[kind]
        assert power_of(needed, needed).smallest[kind] <= DIFFERENCE < power_of(needed, needed - 2).smallest[kind]
    assert len(small.lines()) == len(SPREAD)
    assert any("no interval or test can be trusted" in line for line in power_of(200, 40).lines())

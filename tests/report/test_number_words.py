"""Numbers as a reader sees them."""

import math

import pytest

from cfusion.report.number_words import bare_p, decimal, interval, p_text, significant

NO_BREAK = "\N{NO-BREAK SPACE}"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (6.06e-05, "6.1 × 10⁻⁵"),
        (-3.56e-05, "−3.6 × 10⁻⁵"),
        (4e-4, "4 × 10⁻⁴"),
        (0.00123456, "0.00123"),
        (-0.0472, "−0.0472"),
        (0.0, "0"),
        (1.3, "1.3"),
        (999.6, "1,000"),
        (12345.6, "12,346"),
        (2.5e7, "2.5 × 10⁷"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_three_significant_digits(value, words):
    assert significant(value) == words.replace(" ", NO_BREAK)


def test_signs_are_true_and_a_rounded_zero_has_none():
    assert significant(3.56e-05, 2, "+") == f"+4{NO_BREAK}×{NO_BREAK}10⁻⁵"
    assert [decimal(v) for v in (-0.0587, -0.0001, 0.5, math.nan, None)] == ["−0.059", "0.000", "0.500", "–", "–"]
    assert [decimal(v, 2, "+") for v in (0.166, -0.166)] == ["+0.17", "−0.17"]
    assert interval(-0.11, -0.007, 3, "+") == "−0.110 to −0.007"
    assert interval(math.nan, math.nan) == ""


def test_p_values():
    assert [p_text(p) for p in (6.06e-05, 0.0342, math.nan)] == ["p < 0.001", "p = 0.034", "p not defined"]
    assert [bare_p(p) for p in (6.06e-05, 0.0342, math.nan)] == ["< 0.001", "0.034", "–"]

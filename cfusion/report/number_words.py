"""Numbers as a reader sees them on pages and figures: a true minus, powers of ten, p-values; a dash if undefined.

Files keep plain numbers.
"""

from __future__ import annotations

import math

UNDEFINED = "–"
_MINUS = "\N{MINUS SIGN}"
_TIMES = "\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SMALLEST, _LARGEST = 1e-3, 1e6
"""Sizes from and up to which a number is written without a power of ten."""


def with_minus(text: str) -> str:
    """Return the text of a number with a true minus in place of the hyphen."""
    return text.replace("-", _MINUS)


def decimal(value: float | None, digits: int = 3, sign: str = "") -> str:
    """Format a number with fixed decimals; `sign` is `+` to write that of positive numbers."""
    if value is None or math.isnan(value):
        return UNDEFINED
    text = f"{value:{sign}.{digits}f}"
    return text.replace("-", "") if sign == "" and float(text) == 0 else with_minus(text)


def significant(value: float | None, digits: int = 3, sign: str = "") -> str:
    """Format a number with significant digits; a very small or large one as `6.1 × 10⁻⁵`."""
    if value is None or math.isnan(value):
        return UNDEFINED
    if value == 0 or not math.isfinite(value) or _SMALLEST <= abs(value) < _LARGEST:
        return with_minus(f"{value:{sign}.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:{sign},.0f}")
    mantissa, power = f"{value:{sign}.{max(0, digits - 2)}e}".split("e")
    mantissa = f"{float(mantissa):{sign}g}"
    return f"{with_minus(mantissa)}{_TIMES}10{str(int(power)).translate(_RAISED)}"


def interval(low: float, high: float, digits: int = 3, sign: str = "") -> str:
    """Format an interval as `low to high`; empty if it is undefined."""
    return "" if math.isnan(low) else f"{decimal(low, digits, sign)} to {decimal(high, digits, sign)}"


def with_interval(value: float, low: float, high: float, digits: int = 3, sign: str = "") -> str:
    """Format a number with its interval in brackets; without one, the number by itself."""
    limits = interval(low, high, digits, sign)
    return f"{decimal(value, digits, sign)}{f' ({limits})' if limits else ''}"


def p_text(p: float) -> str:
    """Format a p-value for a sentence."""
    if math.isnan(p):
        return "p not defined"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def bare_p(p: float) -> str:
    """Format a p-value for a column with a heading."""
    return UNDEFINED if math.isnan(p) else p_text(p).removeprefix("p ").removeprefix("= ")

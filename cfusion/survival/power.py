"""How many patients and events it takes to see a difference between two models' C-indices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cfusion.survival.bootstrap import FEW_EVENTS

SPREAD = {"a model that adds to another": 0.24, "two unrelated models": 0.60}
"""Standard error that the paired test works with, times the square root of the number of events.

From the power and the type-I error in `python -m benchmarks.coverage`: cross-validations of Cox ridge models, one with
a feature more than the other, and two on different features. With about 100 events the first is nearer 0.4.
"""

_DETECTED = 1.96 + 0.84
"""Standard errors of a difference that a test at level .05 finds in 80% of studies."""

DIFFERENCE = 0.03
"""The difference of C that a study is usually planned for."""


@dataclass(frozen=True)
class Power:
    """What a cohort can show about the difference of two models.

    Attributes:
        events: Events of the cohort.
        patients: Its patients.
        smallest: By kind of comparison, the difference of C that is found with 80% power at level .05.
        needed_events: By kind of comparison, the events that a difference of `DIFFERENCE` needs.
    """

    events: int
    patients: int
    smallest: dict[str, float]
    needed_events: dict[str, int]

    def lines(self) -> list[str]:
        """Return a line for each kind of comparison, and a warning if no interval can be trusted."""
        lines = []
        for kind, smallest in self.smallest.items():
            events = self.needed_events[kind]
            patients = math.ceil(events * self.patients / max(self.events, 1))
            lines.append(
                f"{kind}: {self.events} events show a difference of C from {smallest:.2f} on (80% power); "
                f"{DIFFERENCE:.2f} takes about {_round(events):,} events, {_round(patients):,} patients like these"
            )
        if self.events < FEW_EVENTS:
            lines.append(f"{self.events} events: below about {FEW_EVENTS}, no interval or test can be trusted")
        return lines


def power_of(patients: int, events: int) -> Power:
    """Return what a cohort of this size can show in a cross-validation.

    Args:
        patients: Scored patients.
        events: Events among them.
    """
    smallest = {kind: min(0.5, _DETECTED * spread / math.sqrt(max(events, 1))) for kind, spread in SPREAD.items()}
    needed = {kind: math.ceil((_DETECTED * spread / DIFFERENCE) ** 2) for kind, spread in SPREAD.items()}
    return Power(events, patients, smallest, needed)


def _round(count: int) -> int:
    """Round to two significant digits, which is all that the constants are good for."""
    digits = max(0, len(str(count)) - 2)
    return round(count, -digits)

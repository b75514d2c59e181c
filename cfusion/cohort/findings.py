"""Define audit findings, and check outcomes for signs of errors and for pairs that a C-index can compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

Polarity = Literal["as stated", "rather as stated", "rather flipped", "flipped"]

POLARITY_MINIMUM = 10
"""Minimum number of events, and of censored patients, from which on their polarity is checked."""

_LONGEST = 0.05
"""Part of the patients, and at least `POLARITY_MINIMUM`, that are the longest-followed ones."""

_MEDIAN_WEIGHT = 0.5
_UNCLEAR = 0.3
"""Size of the sum of the three signs of `polarity` below which times do not tell events from censorings."""

_SHORTEST = 0.01
"""Months below which a median counts as this, because times in full months can be 0."""


@dataclass(frozen=True)
class Finding:
    """One finding of an audit.

    Attributes:
        kind: Stable name of the rule, such as `missing_features`.
        subject: The slide, patient, fold or cohort it concerns.
        action: `dropped`: left out of the run; `doubted`: kept, but should be checked by a person.
        message: What was found and what it means; a predicate that follows the subject.
    """

    kind: str
    subject: str
    action: Literal["dropped", "doubted"]
    message: str

    def __str__(self) -> str:
        return f"{self.action}: {self.subject} {self.message} [{self.kind}]"


def dropped(kind: str, subject: str, message: str) -> Finding:
    """Return the finding that a slide or patient is left out."""
    return Finding(kind, subject, "dropped", message)


def finding_lines(findings: Sequence[Finding], most: int) -> list[str]:
    """Format findings as lines, at most `most` of each kind, with a count of the rest; frequent kinds first.

    A loss that depends on the outcome comes first of all.
    """
    lines = []
    counts = Counter(finding.kind for finding in findings).most_common()
    for kind, count in sorted(counts, key=lambda item: item[0] != "loss_by_outcome"):
        lines += [str(finding) for finding in findings if finding.kind == kind][:most]
        if count > most:
            lines.append(f"… and {count - most} more [{kind}]")
    return lines


def outcome_doubts(name: str, time_months: pd.Series, event: pd.Series) -> list[Finding]:
    """Find signs of a flipped event column or a wrong time unit, for a person to check.

    Args:
        name: Name of the cohort.
        time_months: [case].
        event: [case], true where the event happened.
    """
    doubts: list[tuple[str, str]] = []
    times, happened = time_months.to_numpy(float), event.to_numpy(bool)
    if polarity(times, happened) in ("rather flipped", "flipped"):
        doubts.append(("polarity", polarity_words(times, happened)))
    elif event.mean() > 0.9 and len(event) >= POLARITY_MINIMUM:
        doubts.append(("polarity", f"{event.mean():.0%} of the patients have the event"))
    if not event.any():
        doubts.append(("all_censored", "no patient has the event"))
    if time_months.median() > 180:
        doubts.append(("unit", f"the median follow-up is {time_months.median():.0f} months; are the times in days?"))
    if time_months.max() < 6:
        doubts.append(("unit", f"the longest follow-up is {time_months.max():.1f} months; are the times in years?"))
    return [Finding(kind, name, "doubted", message) for kind, message in doubts]


def polarity(time_months: np.ndarray, event: np.ndarray) -> Polarity:
    """Return whether the events of a cohort look like events, like its censorings, or like either.

    The end of a study censors the patients who were followed longest, events come early, and most cohorts of solid
    tumours have fewer events than censorings. None of these is enough: in a cohort with short follow-up, such as
    TCGA-BRCA, events have the longer median follow-up. So three signs are added: the share of events among all patients
    and among the 5% followed longest, each less one half, and half the log ratio of the medians of events and of
    censored patients. A sum above 0 is doubted. Between −.3 and .3 ("rather") no rule is right often enough: where most
    patients were recruited late, events and censorings look alike. `benchmarks.polarity` measures how often.

    Args:
        time_months: [case].
        event: [case], true where the event happened.

    Returns:
        "as stated" with fewer than 10 events or 10 censored patients. Otherwise the table with the opposite events gets
        the opposite, ties aside.
    """
    if min(event.sum(), (~event).sum()) < POLARITY_MINIMUM:
        return "as stated"
    shares = event.mean() + _longest_followed(time_months, event)[1] - 1
    medians = [max(float(np.median(time_months[rows])), _SHORTEST) for rows in (event, ~event)]
    total = float(shares + _MEDIAN_WEIGHT * np.log(medians[0] / medians[1]))
    if total > 0:
        return "flipped" if total > _UNCLEAR else "rather flipped"
    return "as stated" if total < -_UNCLEAR else "rather as stated"


def polarity_words(time_months: np.ndarray, event: np.ndarray) -> str:
    """Return what speaks for a flipped event column, or that the times cannot tell, as a predicate for a cohort."""
    number, share = _longest_followed(time_months, event)
    dead, censored = (float(np.median(time_months[rows])) for rows in (event, ~event))
    conclusion = {
        "flipped": ", and study ends usually censor most of the latter",
        "rather flipped": ", which fits events and censorings: the times cannot tell whether the column is flipped",
    }  # fmt: skip
    conclusion["rather as stated"] = conclusion["rather flipped"]
    return (
        f"{event.mean():.0%} of the patients and {share:.0%} of the {number} followed longest have the event (median "
        f"follow-up of events {dead:.1f} months, of censored patients {censored:.1f} months)"
        f"{conclusion.get(polarity(time_months, event), '')}; check the meaning of 1 in the event column"
    )


def _longest_followed(time_months: np.ndarray, event: np.ndarray) -> tuple[int, float]:
    """Return how many patients count as followed longest, tied times included, and the share of them with the event."""
    number = max(POLARITY_MINIMUM, int(_LONGEST * len(event)))
    longest = event[time_months >= np.partition(time_months, -number)[-number]]
    return len(longest), float(longest.mean())


def other_causes(name: str, endpoint: str, cases: pd.DataFrame) -> list[Finding]:
    """Name the deaths that the end point censors: after them its event can no longer happen (a competing risk).

    Args:
        name: Name of the cohort.
        endpoint: DSS or PFI.
        cases: [case], with `other_cause` where the table says who died of something else.
    """
    if "other_cause" not in cases.columns or not cases["other_cause"].any():
        return []
    what = {"DSS": "of another cause", "PFI": "without progression"}.get(endpoint, "of another cause")
    died = int(cases["other_cause"].sum())
    message = (
        f"has {died} patients who died {what}: {endpoint} censors them at death, which treats a competing risk as if "
        "they had left the study; read survival probabilities with care"
    )
    return [Finding("other_cause", name, "doubted", message)]


def has_comparable_pair(time: np.ndarray, event: np.ndarray) -> bool:
    """Return whether at least one pair of patients has a known order of events; the C-index needs one.

    Args:
        time: [case], months.
        event: [case], true where the event happened.
    """
    first = time[event].min(initial=np.inf)
    return bool(((time > first) | ((time == first) & ~event)).any())

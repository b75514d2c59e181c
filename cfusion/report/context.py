"""Context of a report beyond the scores: where the numbers come from, and what each protocol means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from cfusion.report.search_section import FoldChoice
from cfusion.survival.null import EpochChoice
from cfusion.survival.score import Key

_OPTIMISTIC = "OPTIMISTIC: the epoch is chosen on the same fold that is scored."

PROTOCOL_TEXTS = {
    "strict": "The epoch is chosen on an inner validation split of the training patients; the outer fold is scored "
    "once.",
    "fixed-epoch": "The number of epochs is set before; nothing is chosen; the outer fold is scored once.",
    "published": f"{_OPTIMISTIC} This reproduces the papers' tables and is no claim; signal-free risks score well "
    "above 0.5 in this way.",
    "unknown": "The predictions do not say how the epoch was chosen. The null assumes the worst: on the scored fold.",
}


ENDPOINT_WORDS = {
    "OS": "overall survival",
    "DSS": "disease-specific survival",
    "PFI": "progression-free interval",
}


def endpoint_words(endpoint: str | None) -> str:
    """Return an end point in words; predictions without a cohort do not state theirs."""
    return "end point not stated" if endpoint is None else f"{ENDPOINT_WORDS[endpoint]} ({endpoint})"


@dataclass(frozen=True)
class ReportContext:
    """Where the numbers come from, and additional values to show.

    Attributes:
        title: Heading of the page.
        endpoints: For each cohort whose end point is known, its name: OS, DSS or PFI.
        audits: For each cohort, `cfusion.cohort.audit.Audit.to_json()`.
        provenance: For each run, digests, versions, seeds and configuration.
        curves: Learning curves: `cohort, model, protocol, fold, epoch` and a column per metric.
        oracle: Harrell's C of the true risk, if it is known (synthetic cohorts).
        permuted: Harrell's C after training on permuted outcomes.
        choices: Which epochs the runs could choose, for the null; without an entry, those of the published training.
        searches: What the folds of runs with a search chose.
        notes: Sentences for the reader.
        joint: For each cohort that was trained with others as one, their common name, under which the audit stands.
    """

    title: str = "Survival from whole-slide images"
    endpoints: Mapping[str, str] = field(default_factory=dict)
    audits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    provenance: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    curves: pd.DataFrame | None = None
    oracle: Mapping[Key, float] = field(default_factory=dict)
    permuted: Mapping[Key, float] = field(default_factory=dict)
    choices: Mapping[Key, EpochChoice] = field(default_factory=dict)
    searches: Mapping[Key, Sequence[FoldChoice]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    joint: Mapping[str, str] = field(default_factory=dict)

    def choice(self, key: Key) -> EpochChoice:
        """Return which epochs the runs of a cohort, model and protocol could choose."""
        return self.choices.get(key, EpochChoice())

    def with_parts(self, parts: Mapping[str, Sequence[str]]) -> ReportContext:
        """Return the context with the end point and the choice of epochs of joint cohorts also for each of them.

        Args:
            parts: Names of the cohorts that are trained as one, by their common name.
        """
        endpoints = {name: self.endpoints[joint] for joint, names in parts.items() for name in names}
        choices = {
            (name, model, protocol): choice
            for (joint, model, protocol), choice in self.choices.items()
            for name in parts.get(joint, ())
        }
        return replace(
            self, endpoints={**endpoints, **self.endpoints}, choices={**choices, **self.choices},
            joint={name: joint for joint, names in parts.items() for name in names},
        )  # fmt: skip


def optimistic(protocol: str) -> bool:
    """Whether numbers under a protocol are known to be optimistic."""
    return protocol == "published"


def named(protocol: str) -> str:
    """Name the protocol for a caption, with a warning if its numbers are optimistic."""
    return f"Protocol {protocol}. {_OPTIMISTIC}" if optimistic(protocol) else f"Protocol {protocol}."

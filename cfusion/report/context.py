"""What a report says beyond the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from cfusion.survival.score import Key


@dataclass(frozen=True)
class ReportContext:
    """Where the numbers come from and what stands beside them.

    Attributes:
        title: Heading of the page.
        audits: For each cohort, `cfusion.cohort.audit.Audit.to_json()`.
        provenance: For each run, digests, versions, seeds and configuration.
        curves: Learning curves: `cohort, model, protocol, fold, epoch` and a column per metric.
        oracle: Harrell's C of the true risk, where it is known (made-up cohorts).
        permuted: Harrell's C after training on outcomes dealt to other patients.
        notes: Sentences for the reader.
    """

    title: str = "Survival from whole-slide images"
    audits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    provenance: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    curves: pd.DataFrame | None = None
    oracle: Mapping[Key, float] = field(default_factory=dict)
    permuted: Mapping[Key, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

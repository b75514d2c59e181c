"""Settings that fit the size of a cohort and the magnifications of its features, with the reason for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cfusion.config import ModelConfig, SplitsConfig

FEWEST_TO_CHOOSE = 10
"""Events of an inner validation split below which its choice of an epoch is mostly noise."""

EVENTS_PER_BIN = 10
"""Events of the training patients that a time bin needs."""

PAPER = (20.0, 10.0, 5.0)
"""Magnifications of the published model, finest first."""


@dataclass(frozen=True)
class Recommended:
    """One setting.

    Attributes:
        key: `section.name`, or a name of the top level.
        value: Its value.
        reason: Why, for the comment.
    """

    key: str
    value: Any
    reason: str


def settings_for_patients(patients: int, events: int) -> list[Recommended]:
    """Return the settings that depend on the number of patients and of events."""
    folds = max(2, min(SplitsConfig().folds, events // 6))
    training = patients * (folds - 1) // folds
    choosing = events * (folds - 1) / folds * SplitsConfig().validation_fraction
    found = [Recommended("splits.folds", folds, f"about {events // folds} events are scored in each")]
    if patients < 300:
        found.append(Recommended("splits.repeats", 3, "draws of folds; a small cohort's C depends on the draw"))
    if choosing < FEWEST_TO_CHOOSE:
        why = f"an inner validation split would have about {choosing:.0f} events, too few to choose an epoch"
        found += [
            Recommended("evaluation.protocol", "fixed-epoch", why),
            Recommended("train.epochs", 20, "all are run"),
        ]
    else:
        why = f"the epoch is chosen on about {choosing:.0f} events of training patients, never on the scored fold"
        found += [
            Recommended("evaluation.protocol", "strict", why),
            Recommended("train.epochs", 40, "at most; stops 10 epochs after the best"),
        ]
    bins = 4 if events * (folds - 1) / folds >= 4 * EVENTS_PER_BIN else 2
    found.append(Recommended("evaluation.n_bins", bins, "time bins of the hazard, at quantiles of the event times"))
    batch = 32 if training >= 320 else 16 if training >= 128 else 8
    steps = max(1, round(training / batch))
    found.append(Recommended("parallel.global_batch", batch, f"bags per step: about {steps} steps an epoch"))
    if patients < 300:
        width = 256 if patients >= 100 else 128
        found.append(Recommended("model.embed_dim", width, f"the paper's 512 has many weights for {patients} patients"))
    return found


def model_for(magnifications: Sequence[float]) -> list[Recommended]:
    """Return the model that reads the magnifications, finest first; 0 is the embedding of a slide."""
    if len(magnifications) == 1:
        only = magnifications[0]
        if only == 0:
            model = Recommended("model.name", "mean_mil", "reads embeddings of slides")
        else:
            model = Recommended("model.name", "amil", f"reads one magnification, and the features have {only:g}x only")
        return [Recommended("data.magnifications", [only], "what the features have"), model]
    reads = list(PAPER) if set(PAPER) <= set(magnifications) else list(magnifications)
    found = [
        Recommended("data.magnifications", reads, "finest first"),
        Recommended("model.name", "crossfusion", "reads all; amil, dsmil and transmil read the finest"),
    ]
    if ModelConfig().source not in reads:
        found.append(Recommended("model.source", reads[1], "tokens of this magnification define the grid"))
    return found

"""Errors a user can act on.

The command line prints one of these as a single line, without a traceback, says which page explains it, and leaves
with its exit code. Anything else that escapes is a defect of the program.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class CfusionError(Exception):
    """Something the user can put right.

    Args:
        message: What is wrong, with the file, row or key it concerns and what was expected.
        remedy: What to do about it; printed after the message.
        topic: Heading of `errors.md` that explains it, which `cfusion help TOPIC` shows; none: that of the class.
    """

    exit_code = 2
    topic = "check"

    def __init__(self, message: str, remedy: str = "", *, topic: str | None = None) -> None:
        self.message = message
        self.remedy = remedy
        self.topic = topic or self.topic
        super().__init__(f"{message} {remedy}".strip())

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers send their errors through pickle, which would call the class with the joined text alone.
        return _rebuilt, (type(self), self.message, self.remedy, self.topic)


def _rebuilt(kind: type[CfusionError], message: str, remedy: str, topic: str) -> CfusionError:
    error = kind.__new__(kind)
    CfusionError.__init__(error, message, remedy, topic=topic)
    return error


class ConfigError(CfusionError):
    """A configuration key or value that cannot be used."""

    topic = "config"


class UntrustedCodeError(ConfigError):
    """Code that came with a model and that the user has not said to trust."""

    topic = "trust-code"


class DataError(CfusionError):
    """A table, slide, store, shard or checkpoint that cannot be used."""

    topic = "data"


class ResolutionError(DataError):
    """A slide whose µm/px is unknown, implausible, or too coarse."""

    topic = "resolution"


class SlideError(DataError):
    """A slide that is not there or cannot be read."""

    topic = "slide"


class WeightsError(DataError):
    """Weights of an encoder that cannot be had or are another's."""

    topic = "weights"


class LayoutError(DataError):
    """Features of another program that are not laid out as that program does."""

    topic = "import"


class StoreError(DataError):
    """A feature store, or a slide's group in it, that cannot be used."""

    topic = "store"


class ShardsError(DataError):
    """Shards that are missing, damaged, or do not hold what is asked for."""

    topic = "shards"


class CohortError(DataError):
    """A table of patients, outcomes or slides that cannot be used."""

    topic = "cohort"


class PredictionsError(DataError):
    """A table of predictions that cannot be scored."""

    topic = "predictions"


class CheckpointError(DataError):
    """A checkpoint that is damaged or belongs to another training."""

    topic = "checkpoint"


class UndefinedMetricError(CfusionError):
    """A score that does not exist for these patients, such as a C-index without a comparable pair."""

    topic = "undefined-score"


class MissingExtraError(CfusionError):
    """An optional dependency that is not installed."""

    topic = "missing-extra"

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}, which is not installed.",
            f"Install it with: pip install 'cfusion[{extra}]'",
        )


class PartialResultError(CfusionError):
    """The work was done except for named parts; what was done is kept."""

    exit_code = 3
    topic = "partial"


class RequeueError(CfusionError):
    """The run was asked to stop, has saved its state, and wants to be started again (EX_TEMPFAIL)."""

    exit_code = 75
    topic = "requeue"


def nearest(word: str, known: Iterable[str], parent: str = "") -> str:
    """A remedy for a name that is not `known`: the nearest one, behind the `parent.` it belongs to, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"Did you mean {parent}{near[0]}?" if near else f"Known: {', '.join(names) or 'none'}."

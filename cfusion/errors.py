"""Define the errors that a user can fix.

The command line prints such an error on one line without a traceback, names the help topic, and exits with its exit
code. Any other exception that reaches the command line is a bug.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from typing import Any

DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space, then run the same command again; it resumes."),
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT,
         errno.ENAMETOOLONG, errno.ELOOP, errno.EXDEV, errno.ENOTEMPTY),
        "Give another path, or change its permissions.",
    ),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ENOTCONN, errno.ESHUTDOWN, errno.EREMOTEIO,
         errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET),
        "The disk or its file server failed: check it (dmesg, the administrator), then run the same command again; it "
        "resumes.",
    ),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE),
        "Raise the number of files that a process may open (ulimit -n), or read with fewer workers.",
    ),
}  # fmt: skip
"""Remedies for file system errors, by error number."""

TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EAGAIN})
"""Errors of a network file system that opening the file again may mend."""


class CfusionError(Exception):
    """An error that the user can fix.

    Args:
        message: What is wrong, in which file, row or key, and what was expected.
        remedy: What to do; printed after the message.
        topic: Topic of `errors.md`, shown by `cfusion help TOPIC`; None: the topic of the class.
    """

    exit_code = 2
    topic = "check"

    def __init__(self, message: str, remedy: str = "", *, topic: str | None = None) -> None:
        self.message = message
        self.remedy = remedy
        self.topic = topic or self.topic
        super().__init__(f"{message} {remedy}".strip())

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers pickle their errors. By default, unpickling would call the class with only the joined text.
        return _rebuilt, (type(self), self.message, self.remedy, self.topic)


def _rebuilt(kind: type[CfusionError], message: str, remedy: str, topic: str) -> CfusionError:
    error = kind.__new__(kind)
    CfusionError.__init__(error, message, remedy, topic=topic)
    return error


class ConfigError(CfusionError):
    """A configuration key or value that cannot be used."""

    topic = "config"


class UntrustedCodeError(ConfigError):
    """A model includes code that the user has not marked as trusted."""

    topic = "trust-code"


class DataError(CfusionError):
    """A table, slide, store, shard or checkpoint that cannot be used."""

    topic = "data"


class ResolutionError(DataError):
    """A slide whose µm/px is unknown, implausible, or too coarse."""

    topic = "resolution"


class SlideError(DataError):
    """A slide that is missing or cannot be read."""

    topic = "slide"


class WeightsError(DataError):
    """Weights of an encoder that are unavailable, or belong to another encoder."""

    topic = "weights"


class LayoutError(DataError):
    """Features of another program in an unexpected layout."""

    topic = "import"


class StoreError(DataError):
    """A feature store, or a slide's group in it, that cannot be used."""

    topic = "store"


class ShardsError(DataError):
    """Shards that are missing, damaged, or lack the requested data."""

    topic = "shards"


class CohortError(DataError):
    """A table of patients, outcomes or slides that cannot be used."""

    topic = "cohort"


class PredictionsError(DataError):
    """A table of predictions that cannot be scored."""

    topic = "predictions"


class CheckpointError(DataError):
    """A checkpoint that is damaged or belongs to another run."""

    topic = "checkpoint"


class UndefinedMetricError(CfusionError):
    """A score that is undefined for these patients, such as a C-index without a comparable pair."""

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
    """Some items failed; the finished ones are kept."""

    exit_code = 3
    topic = "partial"


class RequeueError(CfusionError):
    """The run stopped on request after saving its state, and should be restarted (EX_TEMPFAIL)."""

    exit_code = 75
    topic = "requeue"


class ExchangeError(CfusionError):
    """Processes of a run that cannot connect, or whose exchange failed; another attempt may succeed.

    Attributes:
        consequence: Another process has ended, and reports the cause itself.
    """

    exit_code = 1
    topic = "connection"

    def __init__(self, message: str, remedy: str = "", *, consequence: bool = False) -> None:
        super().__init__(message, remedy)
        self.consequence = consequence


def nearest(word: str, known: Iterable[str], parent: str = "") -> str:
    """Return a remedy for an unknown name: the nearest known name, with its `parent.` prefix, or all known names."""
    names = list(known)
    if not (near := similar(word, names)):
        return f"Known: {', '.join(names) or 'none'}."
    return f"Did you mean {parent}{near}?"


def similar(word: str, names: Sequence[str]) -> str:
    """Return the name most like a word; empty if none is like it."""
    return next(iter(difflib.get_close_matches(word, names, n=1, cutoff=0.5)), "")

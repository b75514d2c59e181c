"""Errors a user can act on.

The command line prints one of these as a single line, without a traceback, and leaves with its exit code. Anything
else that escapes is a defect of the program.
"""

from __future__ import annotations


class CfusionError(Exception):
    """Something the user can put right.

    Args:
        message: What is wrong, with the file, row or key it concerns and what was expected.
        remedy: What to do about it; printed after the message.
    """

    exit_code = 2

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(f"{message} {remedy}".strip())


class ConfigError(CfusionError):
    """A configuration key or value that cannot be used."""


class DataError(CfusionError):
    """A table, slide, store, shard or checkpoint that cannot be used."""


class UndefinedMetricError(CfusionError):
    """A score that does not exist for these patients, such as a C-index without a comparable pair."""


class MissingExtraError(CfusionError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}, which is not installed.",
            f"Install it with: pip install 'cfusion[{extra}]'",
        )


class PartialResultError(CfusionError):
    """The work was done except for named parts; what was done is kept."""

    exit_code = 3


class RequeueError(CfusionError):
    """The run was asked to stop, has saved its state, and wants to be started again (EX_TEMPFAIL)."""

    exit_code = 75

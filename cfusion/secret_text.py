"""Leaves the secrets of URLs out of texts: errors, log lines, records."""

from __future__ import annotations

import logging
import re
from typing import Any

URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^\s/?#'\"<>]*@)?(?P<rest>[^\s?#'\"<>]*)"
    r"(?P<query>\?[^\s#'\"<>]*)?"
)
"""A URL with its user, its rest and its query."""
_CONTAINERS = ("abfs://", "abfss://", "wasb://", "wasbs://")
"""Schemes where the name before `@` is a container of the store, not a user."""


def without_secrets(text: str) -> str:
    """Return a text in which every URL has lost its user, its password and its query."""
    return URL.sub(_public, text)


def _public(url: re.Match[str]) -> str:
    user = url["user"] or ""
    kept = user if url["scheme"].lower() in _CONTAINERS and ":" not in user else ""
    return f"{url['scheme']}{kept}{url['rest']}"


class SecretsLeftOut(logging.Formatter):
    """Formats log records; URLs lose their secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text, its traceback included."""
        return without_secrets(super().format(record))


def hide_in(values: Any) -> Any:
    """Return plain values, nested in lists and dictionaries, with no secret in their texts."""
    if isinstance(values, dict):
        return {key: hide_in(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [hide_in(value) for value in values]
    return without_secrets(values) if isinstance(values, str) else values

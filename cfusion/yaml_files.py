"""Read YAML mappings, apply `section.key=value` overrides, and compare nested values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cfusion.errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: The file cannot be read, is not valid YAML, or does not contain a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).", "Give the path of a YAML file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML ({' '.join(str(error).split())}).") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections with keys, found {type(values).__name__}.")
    return values


def apply_override(values: dict[str, Any], override: str) -> str:
    """Set one `section.key=value` in nested `values`, with the value parsed as YAML, and return the key.

    Raises:
        ConfigError: The override is not of the form `section.key=value`, or a part of the key is not a section.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: expected an override of the form section.key=value.")
    try:
        set_key(values, key, yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML.") from error
    return key


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` in nested `values`.

    Raises:
        ConfigError: A part of the key is a value, not a section.
    """
    *sections, last = key.split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{key}: {section} is not a section.")
    target[last] = value


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """List the keys in which two nested mappings differ, each with both values."""
    found = differing_values(there, here)
    return [f"{key} ({one} there, {other} here)" for key, (one, other) in sorted(found.items())]


def differing_values(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the two values of each key (such as `train.lr`) in which nested mappings differ, in their order.

    Values are compared as text. A value missing from one of the mappings is `"not recorded"`.
    """
    flat, flat_other = _flat(one), _flat(other)
    pairs = {key: (flat.get(key, _ABSENT), flat_other.get(key, _ABSENT)) for key in {**flat, **flat_other}}
    return {key: pair for key, pair in pairs.items() if str(pair[0]) != str(pair[1])}


_ABSENT = "not recorded"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    inner = (_flat(item, f"{prefix}.{key}" if prefix else key) for key, item in value.items())
    return {key: item for flat in inner for key, item in flat.items()}

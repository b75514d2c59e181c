"""Shell completion of settings and encoders, and commands that take settings."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


def keys() -> dict[str, FieldInfo]:
    """Return every setting by its dotted name."""
    from cfusion.config import Config

    found: dict[str, FieldInfo] = {}
    for name, field in Config.model_fields.items():
        section = getattr(field.annotation, "model_fields", None)
        found |= {f"{name}.{key}": inner for key, inner in section.items()} if section else {name: field}
    return found


def settings(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return `section.key=` of every setting that begins with `incomplete`, with its meaning; after `=`, its values.

    Bash splits a word at `=`: it completes what stands behind, and gives the parts before it as words.
    """
    before = [word for word in ctx.params.get("overrides") or () if word != "="]
    if before and before[-1] in keys():
        return _values(before[-1], incomplete)
    name, equals, begun = incomplete.partition("=")
    if equals:
        return [(f"{name}={value}", meaning) for value, meaning in _values(name, begun)]
    return [(f"{key}=", field.description or "") for key, field in keys().items() if key.startswith(incomplete)]


def _values(key: str, begun: str) -> list[tuple[str, str]]:
    field = keys().get(key)
    known = [] if field is None else _choices(field.annotation)
    return [(value, "") for value in known if value.startswith(begun)]


def _choices(annotation: Any) -> list[str]:
    """Return the values that a type lists, as YAML writes them; empty for a number or a text."""
    origin = get_origin(annotation)
    if origin is Literal:
        return [str(value).lower() if isinstance(value, bool) else str(value) for value in get_args(annotation)]
    if origin in (Union, types.UnionType):
        return [value for part in get_args(annotation) for value in _choices(part)]
    return {bool: ["true", "false"], type(None): ["null"]}.get(annotation, [])


class SettingsCommand(TyperCommand):
    """A command that takes settings as section.key=value, and says so to who writes one as an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; an unknown option that is the name of a setting is answered with its spelling."""
        known = {option for parameter in self.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for number, word in enumerate(args):
            option, _, value = word.partition("=")
            meant = _named(option) if option.startswith("--") and option not in known else []
            if meant:
                value = value or next(iter(args[number + 1 :]), "VALUE")
                ctx.fail(f"{option} is a setting: write {' or '.join(f'{key}={value}' for key in meant)}")
        return super().parse_args(ctx, args)


def _named(option: str) -> list[str]:
    """Return the settings that an option may mean."""
    word = option.lstrip("-").replace("-", "_")
    return [key for key in keys() if word in (key, key.rpartition(".")[2])]


def encoders(incomplete: str) -> list[tuple[str, str]]:
    """Return the names of the known encoders that begin with `incomplete`, with their licences."""
    from cfusion.extensions import package_names
    from preprocess.encoders.cards import CARDS

    installed = dict.fromkeys(package_names("cfusion.encoders"), "from an installed package")
    known = {name: card.licence for name, card in CARDS.items()}
    found = {**installed, "stain-texture": "untrained", **known}
    return [(name, text) for name, text in found.items() if name.startswith(incomplete)]

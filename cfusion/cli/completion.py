"""Shell completion of settings and encoders."""

from __future__ import annotations


def settings(incomplete: str) -> list[tuple[str, str]]:
    """Return `section.key=` of every setting that begins with `incomplete`, with its meaning."""
    from cfusion.config import Config

    found = []
    for name, field in Config.model_fields.items():
        section = getattr(field.annotation, "model_fields", None)
        keys = {f"{name}.{key}": inner for key, inner in section.items()} if section else {name: field}
        found += [(f"{key}=", inner.description or "") for key, inner in keys.items() if key.startswith(incomplete)]
    return found


def encoders(incomplete: str) -> list[tuple[str, str]]:
    """Return the names of the known encoders that begin with `incomplete`, with their licences."""
    from cfusion.extensions import package_names
    from preprocess.encoders.cards import CARDS

    installed = dict.fromkeys(package_names("cfusion.encoders"), "from an installed package")
    known = {name: card.licence for name, card in CARDS.items()}
    found = {**installed, "stain-texture": "untrained", **known}
    return [(name, text) for name, text in found.items() if name.startswith(incomplete)]

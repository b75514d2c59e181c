"""Names that TRIDENT gives to encoders, and the names of this program, so that a model reads features of either."""

from __future__ import annotations

TRIDENT = {
    "conch_v1": "conch", "conch_v15": "conch-v1.5", "gigapath": "prov-gigapath", "hibou_l": "hibou-l",
    "hoptimus0": "h-optimus-0", "hoptimus1": "h-optimus-1", "phikon_v2": "phikon-v2",
    "uni_v1": "uni", "uni_v2": "uni2-h",
}  # fmt: skip
"""This program's name by TRIDENT's, where they differ."""


def encoder_name(name: str) -> str:
    """Return this program's name of an encoder; a name that only this program knows stays."""
    return TRIDENT.get(name, name)

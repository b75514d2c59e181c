"""What each protocol means, in the words that every output says."""

from __future__ import annotations

_OPTIMISTIC = "OPTIMISTIC: the epoch is chosen on the same fold that is scored."

PROTOCOLS = {
    "strict": "The epoch is chosen on an inner validation split of the training patients; the outer fold is scored "
    "once.",
    "fixed-epoch": "The number of epochs is set before; nothing is chosen; the outer fold is scored once.",
    "published": f"{_OPTIMISTIC} This reproduces the papers' tables and is no claim; signal-free risks score well "
    "above 0.5 in this way.",
    "unknown": "The predictions do not say how the epoch was chosen. The null assumes the worst: on the scored fold.",
}


def optimistic(protocol: str) -> bool:
    """Whether numbers under a protocol are known to be too good."""
    return protocol == "published"


def named(protocol: str) -> str:
    """The protocol as a caption names it, with its warning where its numbers are too good."""
    return f"Protocol {protocol}. {_OPTIMISTIC}" if optimistic(protocol) else f"Protocol {protocol}."

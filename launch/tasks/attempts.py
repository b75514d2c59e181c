"""How often failed work is tried again. Ray and submitit do not retry; this is the only place that does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from cfusion.interruption import stop_requested
from launch.tasks.task import TaskResult

logger = logging.getLogger(__name__)

_SHOWN = 5


class Named(Protocol):
    """An item of work; its result has the same name."""

    @property
    def name(self) -> str:
        """Unique among the items of one call."""
        ...


I = TypeVar("I", bound=Named)  # noqa: E741
R = TypeVar("R", bound=TaskResult)


def attempt_all(items: Sequence[I], retries: int, attempt: Callable[[Sequence[I]], Iterable[R]]) -> dict[str, R]:
    """Do all items, then up to `retries` times those that failed in a way that another attempt may avoid.

    Args:
        items: What to do.
        retries: Further attempts per item. After a request to stop (see `cfusion.interruption`) there are none.
        attempt: Does some of the items and returns their results; those it did not start have none.

    Returns:
        The last result of each item by its name.
    """
    results: dict[str, R] = {}
    todo = list(items)
    for number in range(1 + retries):
        results |= {result.name: result for result in attempt(todo)}
        todo = [item for item in todo if item.name in results and results[item.name].retry]
        if not todo or number == retries or stop_requested():
            break
        names = ", ".join(item.name for item in todo[:_SHOWN]) + ", …" * (len(todo) > _SHOWN)
        logger.warning("attempt %d of %d: %s", number + 2, retries + 1, names)
    return results

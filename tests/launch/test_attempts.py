"""One rule for retries: what may succeed is tried again, as often as asked, and not after a request to stop."""

import signal
from dataclasses import dataclass

from cfusion.interruption import graceful_stop, stop_requested
from launch.tasks.attempts import attempt_all


@dataclass(frozen=True)
class Item:
    name: str


@dataclass(frozen=True)
class Result:
    name: str
    retry: bool = False
    stopped: bool = False


class Flaky:
    """Each item fails as often as `failures` says; items without an entry have no result."""

    def __init__(self, **failures: int) -> None:
        self.failures = failures
        self.calls: list[list[str]] = []

    def __call__(self, items):
        self.calls.append([item.name for item in items])
        for item in items:
            if item.name in self.failures:
                self.failures[item.name] -= 1
                yield Result(item.name, retry=self.failures[item.name] >= 0)


ITEMS = [Item("a"), Item("b"), Item("c")]


def test_only_what_failed_is_tried_again_and_as_often_as_asked():
    attempt = Flaky(a=0, b=1, c=9)
    results = attempt_all(ITEMS, 2, attempt)
    assert attempt.calls == [["a", "b", "c"], ["b", "c"], ["c"]]
    assert [results[name].retry for name in "abc"] == [False, False, True]


def test_items_that_were_not_started_are_not_tried_again():
    attempt = Flaky(a=9)
    assert list(attempt_all(ITEMS, 1, attempt)) == ["a"]
    assert attempt.calls == [["a", "b", "c"], ["a"]]


def test_nothing_is_tried_again_after_a_request_to_stop():
    attempt = Flaky(a=9)
    with graceful_stop():
        signal.raise_signal(signal.SIGTERM)
        attempt_all(ITEMS, 3, attempt)
        assert stop_requested()
    assert len(attempt.calls) == 1

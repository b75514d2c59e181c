"""A stop that was asked for reaches somebody, whatever block it arrives in."""

import signal

import pytest

from cfusion.interruption import SIGNALS, graceful_stop, handlers_kept, handling, stop_requested


def test_a_stop_that_nobody_has_read_stays_for_the_next_job():
    with graceful_stop():
        signal.raise_signal(signal.SIGTERM)
    with graceful_stop():
        assert stop_requested()
    assert not stop_requested()


def test_an_inner_block_does_not_end_the_request_of_the_outer_one():
    with graceful_stop():
        with graceful_stop():
            signal.raise_signal(signal.SIGUSR1)
            assert stop_requested()
        assert stop_requested()
    assert not stop_requested()


@pytest.mark.parametrize("number", SIGNALS)
def test_handlers_are_those_from_before(number):
    before = signal.getsignal(number)
    received = []
    with handling((number,), received.append):
        signal.raise_signal(number)
    assert received == [number]
    with handlers_kept():
        signal.signal(number, signal.SIG_IGN)
    assert signal.getsignal(number) == before

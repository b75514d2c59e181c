"""The arguments of torchrun, whose options depend on its version."""

import argparse

import pytest

from launch.torchrun import known_arguments


@pytest.mark.parametrize("given", [["--shutdown-timeout", "30"], ["--shutdown-timeout=30"], []])
def test_a_torchrun_older_than_an_option_is_not_given_it(given):
    old, new = argparse.ArgumentParser(), argparse.ArgumentParser()
    new.add_argument("--shutdown-timeout", "--shutdown_timeout")
    arguments = ["--nnodes", "2", *given, "-m", "cfusion", "train"]
    assert known_arguments(arguments, old) == ["--nnodes", "2", "-m", "cfusion", "train"]
    assert known_arguments(arguments, new) == arguments

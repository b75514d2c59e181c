"""Every error leads to a page that exists, and the page says what to do."""

import ast
import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from cfusion import errors
from cfusion.cli.cmd_help import topics
from cfusion.errors import ConfigError, MissingExtraError, RequeueError

ROOT = Path(__file__).parents[2]
CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.CfusionError)]


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_each_class_of_error_has_a_page(error):
    title, text = topics()[error.topic]
    assert title
    assert "**Cause.**" in text
    assert "**Remedy.**" in text


def test_each_topic_named_at_a_raise_exists_and_each_page_is_reached():
    named = set()
    for top in ("cfusion", "preprocess", "launch"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.keyword) and node.arg == "topic" and isinstance(node.value, ast.Constant):
                    assert node.value.value in topics(), f"{path}: topic {node.value.value!r}"
                    named.add(node.value.value)
    assert set(topics()) == named | {error.topic for error in CLASSES}


@pytest.mark.slow
def test_an_error_says_where_it_is_explained():
    done = cfusion("audit", "nothing.yaml")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].strip() == "explained by: cfusion help config"
    explained = cfusion("help", "config")
    assert explained.returncode == 0
    assert "--print-config" in explained.stdout


def test_help_lists_topics_and_names_the_nearest():
    listed = cfusion("help").stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(topics())
    wrong = cfusion("help", "resolutoin")
    assert wrong.returncode == 2
    assert "Did you mean resolution?" in wrong.stderr


def cfusion(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cfusion", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("key seed: expected a number.", "Give one.", topic="sweep"),
        MissingExtraError("ray", "ray", "This executor"),
        RequeueError("Stopped."),
    ],
)
def test_an_error_that_a_worker_sends_says_the_same(error):
    sent = copy.copy(error)  # taken apart and put together as pickle does
    assert type(sent) is type(error)
    assert (str(sent), sent.message, sent.remedy, sent.topic) == (str(error), error.message, error.remedy, error.topic)

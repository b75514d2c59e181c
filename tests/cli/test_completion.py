"""What the shell offers, and what the program teaches without arguments."""

import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from cfusion.cli.main import app


def cfusion(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cfusion", *arguments],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def completed(line: str) -> list[str]:
    words = line.split(" ")
    script = "from cfusion.cli.main import app; app(prog_name='cfusion')"
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "_CFUSION_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
    ).stdout.split()  # fmt: skip


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("cfusion tr", "train"),
        ("cfusion sweep st", "status"),
        ("cfusion preprocess run --enc", "--encoder"),
        ("cfusion preprocess run slides --encoder vircho", "virchow2"),
        ("cfusion train study.yaml train.ep", "train.epochs="),
        ("cfusion audit study.yaml evaluation.pro", "evaluation.protocol="),
        ("cfusion audit study.yaml evaluation.protocol=p", "evaluation.protocol=published"),
        ("cfusion train study.yaml train.published_errors=", "train.published_errors=false"),
        ("cfusion audit study.yaml evaluation.protocol = p", "published"),
        ("cfusion audit study.yaml evaluation.protocol =", "fixed-epoch"),
        ("cfusion help reso", "resolution"),
    ],
)
def test_commands_options_and_values_complete(line, offered):
    assert offered in completed(line)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (("train", "study.yaml", "--epochs", "10"), "--epochs is a setting: write train.epochs=10"),
        (("train", "study.yaml", "--epochs=10"), "--epochs is a setting: write train.epochs=10"),
        (("audit", "study.yaml", "--embed-dim", "64"), "--embed-dim is a setting: write model.embed_dim=64"),
        (("sweep", "run", "sweep.yaml", "--lr", "1e-4"), "--lr is a setting: write train.lr=1e-4"),
        (("train", "study.yaml", "--eposch"), "No such option: --eposch"),
    ],
)
def test_a_setting_written_as_an_option_is_answered_with_its_spelling(arguments, answer):
    found = CliRunner().invoke(app, list(arguments))
    assert found.exit_code == 2
    assert answer in " ".join(found.output.split())


def test_help_shows_a_command_as_its_option_does():
    shown = CliRunner().invoke(app, ["help", "train"]).output
    assert "section.key=value" in shown
    assert "--dry-run" in shown


def test_without_arguments_five_commands_are_taught_by_example():
    done = cfusion()
    output = done.stdout + done.stderr
    for example in (
        "cfusion demo", "cfusion preprocess slides/ --store", "cfusion preprocess shard features --out",
        "cfusion train study.yaml", "cfusion explain a.svs --model",
    ):  # fmt: skip
        assert example in output
    assert max(map(len, output.splitlines())) <= 80


def commands(command, path=()):
    children = getattr(command, "commands", {})
    if not children:
        yield path, command
    for name, child in children.items():
        yield from commands(child, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_each_command_has_an_example_whose_options_it_has(path):
    command = COMMANDS[path]
    name = " ".join(("cfusion", *path)).replace("preprocess run", "preprocess")
    examples = [line.split() for line in (command.help or "").splitlines() if name in line]
    examples += [line.split() for line in (command.help or "").splitlines() if f"cfusion {path[-1]}" in line]
    assert examples, command.help
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"}).output.splitlines()
    for words in examples:
        assert " ".join(words) in (line.strip() for line in shown), f"the example does not fit 80 columns: {words}"
    known = {option for parameter in command.params for option in parameter.opts}
    for words in examples:
        own = words[words.index(path[0]) :]
        assert {word for word in own if word.startswith("--")} <= known

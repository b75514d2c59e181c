"""The digests that tell one state of the program from another."""

from pathlib import Path

import pytest
import torch

from cfusion import program

SOURCE = '''"""A module."""

def double(x: int) -> int:
    """Twice x."""
    return 2 * x
'''


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one file of a program that is made of it."""
    path = tmp_path / "training" / "step.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    monkeypatch.setattr(program, "PACKAGE", tmp_path)
    return path


def test_the_program_is_its_source_files_and_torch(source, monkeypatch):
    digest = program.program_digest.__wrapped__
    digests = [digest(), digest()]
    source.write_text(SOURCE + "# more\n")
    digests.append(digest())
    monkeypatch.setattr(torch, "__version__", "2.0")
    digests.append(digest())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("return 2 * x", "return x + x", False),
        ("double", "twice", False),
        ("Twice x.", "The double.", True),
        ("return 2 * x", "return 2*x  # fast", True),
        ('"""A module."""', "", True),
    ],
)
def test_code_is_what_is_computed_and_not_how_it_is_written(source, before, after, same):
    first = program.code_digest.__wrapped__()
    source.write_text(SOURCE.replace(before, after))
    assert (program.code_digest.__wrapped__() == first) is same


def test_what_shows_numbers_is_not_the_code_they_come_from(source):
    first = program.code_digest.__wrapped__()
    for name, same in (("report/page.py", True), ("view/api.py", True), ("models/bag.py", False)):
        path = program.PACKAGE / name
        path.parent.mkdir()
        path.write_text("x = 1\n")
        assert (program.code_digest.__wrapped__() == first) is same

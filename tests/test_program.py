"""The digests that tell one state of the program from another."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cfusion import program
from cfusion.files import user_cache

SOURCE = '''"""A module."""

def double(x: int) -> int:
    """Twice x."""
    return 2 * x
'''


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The one file of a program that is made of it."""
    path = tmp_path / "training" / "step.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    monkeypatch.setattr(program, "PACKAGE", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield path
    forget()


def forget() -> None:
    """Clear the cached digests."""
    program.code_digest.cache_clear()
    program.program_digest.cache_clear()


def digest_with(source: Path, text: str) -> str:
    """The digest of the program whose file holds this text."""
    source.write_text(text)
    forget()
    return program.program_digest()


def test_the_program_is_its_code_that_computes_and_torch(source, monkeypatch):
    first = digest_with(source, SOURCE)
    assert digest_with(source, SOURCE + "# more\n") == first
    assert digest_with(source, SOURCE.replace("2 * x", "2 + x")) != first
    monkeypatch.setattr(torch, "__version__", "2.0")
    assert digest_with(source, SOURCE) != first


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("return 2 * x", "return x + x", False),
        ("double", "twice", False),
        ("Twice x.", "The double.", True),
        ("return 2 * x", "return 2*x  # fast", True),
        ('"""A module."""', "", True),
        ("return 2 * x", "return 2 * x if x else 'a'", False),
    ],
)
def test_code_is_what_is_computed_and_not_how_it_is_written(source, before, after, same):
    first = program.code_digest.__wrapped__()
    source.write_text(SOURCE.replace(before, after))
    assert (program.code_digest.__wrapped__() == first) is same


def test_the_digest_is_kept_and_a_damaged_or_unwritable_cache_changes_nothing(source, monkeypatch):
    first = program.code_digest.__wrapped__()
    (kept,) = (user_cache() / "code").iterdir()
    assert kept.read_text() == first
    monkeypatch.setattr(program, "_code", pytest.fail)
    assert program.code_digest.__wrapped__() == first
    monkeypatch.undo()
    monkeypatch.setattr(program, "PACKAGE", source.parents[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.parents[1] / "cache"))
    kept.write_text("damaged")
    assert program.code_digest.__wrapped__() == first
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))
    assert program.code_digest.__wrapped__() == first


def test_what_shows_numbers_is_not_the_code_they_come_from(source):
    first = program.code_digest.__wrapped__()
    for name, same in (("report/page.py", True), ("view/api.py", True), ("models/bag.py", False)):
        path = program.PACKAGE / name
        path.parent.mkdir()
        path.write_text("x = 1\n")
        assert (program.code_digest.__wrapped__() == first) is same


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ('raise ValueError(f"{x}: bad")', 'raise ValueError(f"{x + 1:g}: expected better", "Mend it.")', False),
        ('raise ValueError(f"{x}: bad")', 'raise ValueError(f"{x + 1:g}: expected better")', True),
        ('raise ValueError(f"{x}: bad")', 'raise KeyError(f"{x}: bad")', False),
        ('raise ValueError(check(x, "a"))', 'raise ValueError(check(x, "b"))', True),
        ('error = DataError("a", topic="b")', 'error = DataError("c", topic="d")', True),
        ('logger.info("%d bags", 3)', 'logger.info("bags: %d", 3)', True),
        ('logger.info("%d bags", 3)', 'logger.info("%d bags", 4)', False),
        ('warnings.warn("a")', 'warnings.warn(f"b {x}")', True),
        ('with progress(f"{x} a"): pass', 'with progress("b"): pass', True),
        ('lookup("a")', 'lookup("b")', False),
        ('def __repr__(self): return "a"', 'def __repr__(self): return f"{1 + 2}"', True),
        ('def describe(self): return "a"', 'def describe(self): return "b"', True),
        ('def kind(self): return "a"', 'def kind(self): return "b"', False),
    ],
)
def test_texts_for_a_reader_are_not_code(source, before, after, same):
    assert (digest_with(source, before + "\n") == digest_with(source, after + "\n")) is same


def test_every_module_is_classified():
    modules = [path.relative_to(program.PACKAGE).with_suffix("") for path in program.PACKAGE.rglob("*.py")]
    names = {".".join(module.parts) for module in modules}
    bare = [name for name in names if not any(f"{name}.".startswith(f"{entry}.") for entry in program.MODULES)]
    gone = [entry for entry in program.MODULES if not any(f"{name}.".startswith(f"{entry}.") for name in names)]
    assert not bare
    assert not gone


def test_no_module_that_computes_imports_a_comparison():
    """A module below a computing package that is set aside, as `survival.paired`, makes none of a run's numbers."""
    aside = [f"cfusion.{entry}" for entry, kind in program.MODULES.items() if "." in entry and not kind.computes]
    for path in program.PACKAGE.rglob("*.py"):
        if program.computes(path.relative_to(program.PACKAGE)):
            assert not [name for name in aside if f"from {name} import" in path.read_text()], path

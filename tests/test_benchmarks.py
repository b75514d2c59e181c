"""Every benchmark answers to the same command line."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted(
    ".".join(path.relative_to(ROOT / "benchmarks").with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
    if "def main(" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_says_how_it_is_run(name: str, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{name}").main()
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert "--quick" in output
    assert "--json FILE" in output


def test_benchmarks_are_found():
    assert {"tiles", "bags", "balance", "model_step", "evidence", "gpu.__main__"} <= set(BENCHMARKS)

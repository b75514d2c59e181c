"""The folder of a run: one owner of its names, importable without torch, with a format number."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfusion import run_folder
from cfusion.errors import DataError

ROOT = Path(__file__).parents[1]
NAMES = (
    "run.json", "done.json", "config.yaml", "audit.json", "fold.json", "outcomes.csv", "predictions.csv", "scores.csv",
    "history.csv", "model.json", "model.safetensors",
)  # fmt: skip
OTHERS = {"preprocess/encoders/cards.py", "preprocess/encoders/networks.py", "launch/sweep/peer_tables.py"}
"""`model.safetensors` is also the name of encoder weights on the hub, `predictions.csv` of a file of Patho-Bench."""


def literals(path: Path) -> Iterator[str]:
    """The texts in a module, without docstrings."""
    tree = ast.parse(path.read_text())
    documented = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.value


def test_no_other_module_names_a_file_of_the_folder():
    pattern = re.compile(rf"(.*/)?({'|'.join(map(re.escape, NAMES))}|\*fold_\*.*)")
    found = [
        f"{path.relative_to(ROOT)}: {text}"
        for top in ("cfusion", "launch", "preprocess")
        for path in sorted((ROOT / top).rglob("*.py"))
        if path.name != "run_folder.py" and str(path.relative_to(ROOT)) not in OTHERS
        for text in literals(path)
        if pattern.fullmatch(text)
    ]
    assert not found


def test_a_folder_is_read_without_torch():
    code = (
        "import sys; from pathlib import Path; from cfusion.run_folder import is_done, read_run\n"
        "assert not is_done(Path('nowhere')); assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("number", [run_folder.RUN_FORMAT + 1, "2", 0])
def test_a_newer_folder_is_refused(tmp_path, number):
    (tmp_path / run_folder.RUN).write_text(json.dumps({"format": number, "identity": "a", "provenance": {}}))
    (tmp_path / run_folder.DONE).write_text("{}")
    with pytest.raises(DataError, match=rf"run\.json: has format {number!r}; this program reads formats up to 1"):
        run_folder.read_run(tmp_path)


def test_the_temporary_of_a_killed_writer_is_no_fold(tmp_path):
    for name in ("fold_0", ".fold_1.x.tmp", "repeat_1_fold_2", "fold_3"):
        (tmp_path / name).mkdir()
        if name != "fold_3":
            (tmp_path / name / run_folder.FOLD).write_text("{}")
    assert [path.name for path in run_folder.fold_folders(tmp_path)] == ["fold_0", "repeat_1_fold_2"]

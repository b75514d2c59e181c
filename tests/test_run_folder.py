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


def test_predictions_that_were_edited_are_refused_with_the_way_back(tmp_path):
    fold = tmp_path / "fold_0"
    fold.mkdir()
    for folder in (tmp_path, fold):
        (folder / run_folder.PREDICTIONS).write_text("risk\n1\n")
    run_folder.write_done(tmp_path, "a", None)
    (fold / run_folder.FOLD).write_text(json.dumps(run_folder.predictions_digest(fold)))
    for folder, remedy in (
        (tmp_path, f"cfusion train {tmp_path}/config.yaml output={tmp_path} writes it again"),
        (fold, f"delete {fold} and run"),
    ):
        path = run_folder.predictions_file(folder)
        path.write_text("risk\n2\n")
        with pytest.raises(DataError, match=r"predictions\.csv: was changed after the training wrote it") as refused:
            run_folder.predictions_file(folder)
        assert remedy in refused.value.remedy
        (folder / ("done.json" if folder == tmp_path else "fold.json")).write_text("{}")  # of an older program
        assert run_folder.predictions_file(folder) == path


def test_models_of_a_run_are_complete_or_refused(tmp_path):
    run_folder.check_all_models(tmp_path)  # no run: a folder of models
    (tmp_path / run_folder.SPLITS).mkdir()
    for split, fold in (("splits_0_0", "repeat_0_fold_0"), ("splits_1_0", "repeat_1_fold_0"), ("splits_3", "fold_3")):
        (tmp_path / run_folder.SPLITS / f"{split}.csv").write_text("")
        (tmp_path / fold / run_folder.MODEL).mkdir(parents=True)
        (tmp_path / fold / run_folder.MODEL / run_folder.CARD).write_text("{}")
    (tmp_path / run_folder.RUN).write_text("{}")
    with pytest.raises(DataError, match="its run is not finished"):
        run_folder.check_all_models(tmp_path)
    (tmp_path / run_folder.DONE).write_text("{}")
    run_folder.check_all_models(tmp_path)
    for fold in ("repeat_1_fold_0", "fold_3"):
        (tmp_path / fold / run_folder.MODEL / run_folder.CARD).unlink()
    with pytest.raises(DataError, match="has no model of repeat_1_fold_0, fold_3, as after an incomplete copy"):
        run_folder.check_all_models(tmp_path)
    (tmp_path / run_folder.RUN).write_text('{"format": 99}')
    with pytest.raises(DataError, match="has format 99"):
        run_folder.check_all_models(tmp_path)

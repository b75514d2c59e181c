"""Test that folds trained at the same time end with the files of folds trained one after another."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import CohortFiles, make_cohort

from cfusion.config import Config, SplitsConfig
from cfusion.errors import DataError, RequeueError
from cfusion.runs import crossval
from cfusion.runs.arrangement import SHORT, arrange
from cfusion.runs.crossval import cross_validate
from cfusion.runs.run import Run
from cfusion.training import loop

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=48)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def settings(files: CohortFiles, output: Path, folds: str, **train: object) -> Config:
    model = {"name": "crossfusion", "embed_dim": 16, "num_heads": 2, "options": {"published": True}}
    return files.config(
        output,
        train={"folds": folds, "epochs": 3, **train},
        model=model,
        evaluation={"bootstrap": 0},
        splits={"folds": 2},
    )


def numbers(folder: Path) -> dict[str, bytes]:
    kinds = ("*/predictions.csv", "*/history.csv", "*/fold.json", "*/model/model.safetensors", "summary.csv")
    return {str(path.relative_to(folder)): path.read_bytes() for kind in kinds for path in folder.glob(kind)}


@pytest.fixture(scope="module")
def separate(files, tmp_path_factory) -> dict[str, bytes]:
    config = settings(files, tmp_path_factory.mktemp("separate") / "run", "separate")
    cross_validate(config)
    return numbers(config.output)


@pytest.mark.slow
def test_folds_at_once_write_the_files_of_folds_one_after_another(files, separate, tmp_path, two_threads):
    config = settings(files, tmp_path / "run", "side-by-side")
    cross_validate(config)
    assert numbers(config.output) == separate
    assert torch.get_num_threads() == 2


@pytest.mark.slow
def test_a_fold_trains_on_as_many_cores_after_a_resume(files, tmp_path, two_threads, monkeypatch):
    """Three folds on two cores: two at once on one core each, the third on both, whichever are missing."""
    config = settings(files, tmp_path / "run", "auto", epochs=1).model_copy(update={"splits": SplitsConfig(folds=3)})
    cores: dict[int, int] = {}
    original = crossval.fit

    def watched(config, cohort, split, **options):
        cores[split.fold] = torch.get_num_threads()
        return original(config, cohort, split, **options)

    monkeypatch.setattr(crossval, "fit", watched)
    cross_validate(config)
    assert cores == {0: 1, 1: 1, 2: 2}
    before = numbers(config.output)
    for fold in (1, 2):
        shutil.rmtree(config.output / f"fold_{fold}")
    cores.clear()
    cross_validate(config)
    assert cores == {1: 1, 2: 2}
    assert numbers(config.output) == before


@pytest.mark.slow
def test_a_run_stopped_at_two_folds_resumes_at_both(files, separate, tmp_path, two_threads, monkeypatch):
    config = settings(files, tmp_path / "run", "side-by-side")
    steps = []

    def stops() -> bool:
        steps.append(1)
        return len(steps) > 4

    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_requested", stops)
        with pytest.raises(RequeueError):
            cross_validate(config)
    assert {path.name for path in (config.output / "checkpoints").iterdir()} == {"fold_0", "fold_1"}
    assert not list(config.output.glob("fold_*"))
    cross_validate(config)
    assert numbers(config.output) == separate


@pytest.mark.slow
def test_a_fold_that_fails_stops_the_other_with_its_state(files, separate, tmp_path, two_threads, monkeypatch):
    config = settings(files, tmp_path / "run", "side-by-side")
    original = crossval.fit

    def fails(config, cohort, split, **options):
        if split.fold == 1:
            raise DataError("this fold cannot be trained")
        return original(config, cohort, split, **options)

    with monkeypatch.context() as patch:
        patch.setattr(crossval, "fit", fails)
        with pytest.raises(DataError, match="cannot be trained"):
            cross_validate(config)
    assert not list(config.output.glob("fold_1"))
    cross_validate(config)
    assert numbers(config.output) == separate


_INTERRUPTED = """
import signal, sys, threading
import torch
from cfusion.config import load_config
from cfusion.runs import crossval
from cfusion.training import loop
torch.set_num_threads(2)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
original = loop.stop_requested
pressed, folds = threading.Lock(), set()
def interrupts():
    folds.add(threading.get_ident())
    if len(folds) == 2 and pressed.acquire(blocking=False):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    return original()
loop.stop_requested = interrupts
crossval.cross_validate(load_config(sys.argv[1]))
"""


@pytest.mark.slow
def test_ctrl_c_ends_both_folds_after_a_step(files, tmp_path):
    config = settings(files, tmp_path / "run", "side-by-side", epochs=50)
    (tmp_path / "run.yaml").write_text(config.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, str(tmp_path / "run.yaml")], cwd=ROOT, capture_output=True, text=True,
        timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == -signal.SIGINT, done.stderr
    assert not list(config.output.glob("fold_*")), "no fold went on to its end"
    assert len(list(config.output.glob("checkpoints/fold_*"))) == 2


@pytest.mark.parametrize(
    ("folds", "threads", "single", "expected"),
    [
        ("auto", 2, True, ("side-by-side", 2, 1)),
        ("auto", 1, True, ("separate", 1, 1)),
        ("auto", 2, False, ("separate", 1, 2)),
        ("auto", 16, True, ("side-by-side", 3, 5)),
        ("separate", 2, True, ("separate", 1, 2)),
        ("together", 2, True, ("together", 3, 1)),
        ("side-by-side", 8, True, ("side-by-side", 3, 2)),
    ],
)
def test_arrangement_of_three_folds(files, tmp_path, folds, threads, single, expected):
    run = Run.prepare(settings(files, tmp_path / "run", folds))
    found = arrange(run.config, run.dataset, 3, threads=threads, one_cpu_process=single, code=None)
    assert dataclasses.astuple(found)[:3] == expected


def test_long_bags_and_little_memory_keep_folds_apart(files, tmp_path, monkeypatch):
    run = Run.prepare(settings(files, tmp_path / "run", "auto"))
    arranged = lambda: arrange(run.config, run.dataset, 3, threads=2, one_cpu_process=True, code=None)  # noqa: E731
    assert arranged().folds == "side-by-side"
    with monkeypatch.context() as patch:
        patch.setattr("cfusion.runs.arrangement.memory_bytes", lambda: 1 << 30)
        assert arranged().folds == "separate"
    monkeypatch.setattr(type(run.dataset), "tiles", lambda self, slide: {"x20": SHORT + 1})
    assert arranged().folds == "separate"


def test_the_plan_says_how_folds_are_trained_and_what_memory_that_takes(files, tmp_path, two_threads):
    plan = Run.prepare(settings(files, tmp_path / "run", "auto")).describe()
    assert plan.splitlines()[-1].startswith("training: folds 2 at once, 1 thread each; about 0.")

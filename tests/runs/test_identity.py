"""What decides the numbers of a run: texts, paths and threads do not; an operator and the content of a table do."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from factories import CohortFiles, make_cohort
from typer.testing import CliRunner

from cfusion import program, run_folder
from cfusion.cli.main import app
from cfusion.config import Config
from cfusion.errors import ConfigError, RequeueError
from cfusion.runs.crossval import cross_validate
from cfusion.runs.run import Run, with_begun_precision
from cfusion.training.checkpoint import Checkpoints
from cfusion.training.world import join_world
from launch.sweep.plan import PlannedRun, SweepConfig, plan
from launch.sweep.status import look, stale
from launch.sweep.work import Job


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=32)


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, str], None]]:
    """Edits a copy of `cfusion.survival`, which is then the program."""
    copy = tmp_path / "program"
    shutil.copytree(program.PACKAGE / "survival", copy / "survival", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(program, "PACKAGE", copy)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def replace(name: str, before: str, after: str) -> None:
        path = copy / "survival" / name
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after, 1))
        forget()

    forget()
    yield replace
    forget()


def forget() -> None:
    program.code_digest.cache_clear()
    program.program_digest.cache_clear()


def small(files: CohortFiles, output: Path, **sections) -> Config:
    sections = {"train": {"epochs": 3}, "splits": {"folds": 2}, "evaluation": {"bootstrap": 0}} | sections
    return files.config(output, **sections)


def interrupt(config: Config) -> None:
    """Train the first of two folds and a part of the second."""
    steps = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "cfusion.training.loop.stop_requested",
            lambda: len(run_folder.fold_folders(config.output)) == 1 and next(steps) > 1,
        )
        with pytest.raises(RequeueError):
            cross_validate(config)
    assert len(run_folder.fold_folders(config.output)) == 1


@pytest.fixture
def restored(monkeypatch) -> list[bool]:
    """For each fold that is trained: whether it continued from a checkpoint."""
    seen: list[bool] = []
    original = Checkpoints.load

    def load(self, snapshot):
        state = original(self, snapshot)
        seen.append(state is not None)
        return state

    monkeypatch.setattr(Checkpoints, "load", load)
    return seen


def sweep(files: CohortFiles, output: Path, **more) -> SweepConfig:
    base = small(files, output).model_dump(mode="json", exclude={"output"})
    values = {"name": "test", "output": str(output), "base": base, "axes": {"seed": {"7": {"seed": 7}}}}
    return SweepConfig.model_validate(values | more)


def states(settings: SweepConfig) -> tuple[list[PlannedRun], list[str], list[str]]:
    runs = plan(settings)
    return runs, [status.state for status in look(runs)], stale(settings, runs)


def test_an_edited_error_text_changes_no_run(files, tmp_path, edit, restored):
    settings = sweep(files, tmp_path / "sweep")
    Job(tuple(plan(settings)))()
    config = small(files, tmp_path / "run")
    interrupt(config)
    del restored[:]
    edit(
        "metrics.py", 'f"a time is negative ({arrays[0].min():g} months)."', 'f"Time {arrays[0].min() + 1} is below 0."'
    )
    assert states(settings)[1:] == (["done"], [])
    cross_validate(config)
    assert restored == [True]
    assert run_folder.is_done(config.output)


@pytest.mark.slow
def test_an_operator_is_other_code_and_the_named_option_continues(files, tmp_path, edit, restored):
    settings = sweep(files, tmp_path / "sweep", axes={"seed": {"7": {"seed": 7}, "8": {"seed": 8}}})
    finished, half = plan(settings)
    Job((finished,))()
    interrupt(half.config)
    config = small(files, tmp_path / "run")
    interrupt(config)
    before = program.code_digest()
    edit("losses.py", " - ", " + ")
    del restored[:]

    runs, found, left = states(settings)
    assert found == ["open", "open"]
    assert left == [finished.name]
    with pytest.raises(ConfigError, match=rf"other code began \(code {before} there, .*--same-code {before}"):
        cross_validate(config)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    for digest in ("another", before):
        result = CliRunner().invoke(app, ["train", str(path), "--same-code", digest])
        assert (result.exit_code == 0) is (digest == before), result.output
    assert restored == [True]
    marker = run_folder.read_marker(config.output)
    assert marker["provenance"]["code"] == before
    assert [entry["code"] for entry in marker["continued_by"]] == [program.code_digest()]
    cross_validate(config)

    counted = sweep(files, tmp_path / "sweep", axes=dict(settings.axes), code=before)
    runs, found, left = states(counted)
    assert (found, left) == (["done", "open"], [])
    assert [outcome.state for outcome in Job(tuple(runs))()] == ["done", "done"]
    assert restored == [True, True]


@pytest.mark.slow
def test_moved_data_and_other_threads_are_the_same_run(files, tmp_path, restored):
    settings = sweep(files, tmp_path / "sweep")
    Job(tuple(plan(settings)))()
    config = small(files, tmp_path / "run")
    interrupt(config)
    del restored[:]
    moved = CohortFiles(tmp_path / "elsewhere" / "table.csv", tmp_path / "elsewhere" / "packed")
    shutil.copytree(files.shards, moved.shards)
    shutil.copy(files.table, moved.table)
    other = small(
        moved, tmp_path / "run", train={"epochs": 3, "keep_checkpoints": 5},
        data={"read_threads": 3, "buffer_bytes": 1 << 21, "cache": "ram", "cache_bytes": 0},
    )  # fmt: skip
    assert Run.prepare(other).identity == Run.prepare(config).identity
    assert states(sweep(moved, tmp_path / "sweep"))[1:] == (["done"], [])
    cross_validate(other)
    assert restored == [True]
    fresh = small(files, tmp_path / "fresh")
    cross_validate(fresh)
    predictions = [(c.output / run_folder.PREDICTIONS).read_bytes() for c in (other, fresh)]
    assert predictions[0] == predictions[1]


def test_the_folder_of_a_model_of_ones_own_does_not_decide():
    here, there = (Config(model={"name": f"{folder}/mine.py:Mine"}).deciding() for folder in ("/scratch/a", "b/c"))
    assert here == there
    assert here["model"]["name"] == "mine.py:Mine"
    assert here != Config(model={"name": "mine.py:Other"}).deciding()


def test_another_content_of_a_table_is_another_run(files, tmp_path):
    table = pd.read_csv(files.table)
    tables = CohortFiles(tmp_path / "cases.csv", files.shards)
    table.drop(columns="slide").drop_duplicates("patient").to_csv(tables.table, index=False)
    slides = tmp_path / "slides.csv"
    table[["slide", "patient"]].set_axis(["slide_id", "case_id"], axis=1).to_csv(slides, index=False)
    config = small(tables, tmp_path / "run", cohort={"slides": str(slides)})
    Run.open(join_world(config.parallel), config)
    for path, name in ((tables.table, "table_sha256"), (slides, "slides_sha256")):
        text = path.read_text()
        path.write_text(text + "\n")
        with pytest.raises(ConfigError, match=f"holds a run that differs in {name}"):
            Run.open(join_world(config.parallel), config)
        path.write_text(text)
    Run.open(join_world(config.parallel), config)


def test_a_folder_of_0_1_0_is_compared_by_what_decides(files, tmp_path):
    config = small(files, tmp_path / "run")
    run = Run.open(join_world(config.parallel), config)
    marker = run_folder.read_marker(config.output)
    del marker["format"]
    marker["provenance"] |= {"program": "0.1.0", "code": "0123456789"}
    marker["provenance"]["config"]["data"] |= {"shards": "elsewhere", "read_threads": 9}
    (run.folder / run_folder.RUN).write_text(json.dumps(marker | {"identity": "of another time"}))
    with pytest.raises(ConfigError, match="--same-code 0123456789"):
        Run.open(join_world(config.parallel), config)
    Run.open(join_world(config.parallel), config, "0123456789")


def test_runs_on_absent_data_are_distinguished_by_its_path(files, tmp_path):
    axes = {"shards": {name: {"data.shards": str(tmp_path / name)} for name in ("one", "two")}}
    names = [run.name for run in plan(sweep(files, tmp_path / "sweep", axes=axes))]
    assert len({name.rpartition("-")[2] for name in names}) == 2


def test_precision_auto_is_recorded_as_what_it_was_and_kept_by_a_resume(files, tmp_path, monkeypatch):
    config = small(files, tmp_path / "run", train={"epochs": 1})
    assert config.parallel.precision == "auto"
    Run.open(join_world(config.parallel), config)
    assert run_folder.read_config(config.output).parallel.precision == "f32"
    assert with_begun_precision(config).parallel.precision == "f32"

    marker = run_folder.read_marker(config.output)
    marker["provenance"]["config"]["parallel"]["precision"] = "bf16"
    (config.output / run_folder.RUN).write_text(json.dumps(marker))
    assert with_begun_precision(config).parallel.precision == "bf16"
    given = config.model_copy(update={"parallel": config.parallel.model_copy(update={"precision": "f32"})})
    assert with_begun_precision(given) is given
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ConfigError, match=r"run: was begun with parallel.precision=bf16, which this device lacks"):
        with_begun_precision(config)

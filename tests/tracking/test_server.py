"""Test complete runs against a real MLflow server on loopback, and runs whose server stops or hangs."""

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from factories import CohortFiles, make_cohort
from mlflow import MlflowClient
from mlflow_server import MlflowServer
from rival import KINDS

from cfusion.config import Config, TrackingConfig
from cfusion.errors import ConfigError
from cfusion.runs.crossval import cross_validate
from cfusion.tracking import TrackedRun
from cfusion.tracking import tracked_run as run
from cfusion.tracking.delivery import send, unsent
from cfusion.tracking.sender import Pace
from cfusion.tracking.sender_process import end_sender

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=60)


def settings(files: CohortFiles, server: MlflowServer, output: Path, **tracking: object) -> Config:
    values = {"enabled": True, "uri": server.uri, "experiment": "sweep one", **tracking}
    return files.config(output, tracking=values, train={"epochs": 3}, evaluation={"bootstrap": 20})


@pytest.fixture(scope="module")
def finished(server, files, tmp_path_factory) -> Config:
    config = settings(files, server, tmp_path_factory.mktemp("finished") / "run", register_as="served")
    cross_validate(config)
    return config


def runs_of(server: MlflowServer, experiment: str) -> tuple[MlflowClient, list]:
    client = MlflowClient(server.uri, server.uri)
    found = client.get_experiment_by_name(experiment)
    return client, client.search_runs([found.experiment_id]) if found else []


def artifacts(client: MlflowClient, run_id: str, path: str | None = None) -> set[str]:
    found = set()
    for item in client.list_artifacts(run_id, path):
        found |= artifacts(client, run_id, item.path) if item.is_dir else {item.path}
    return found


def test_the_server_has_the_complete_run(server, finished):
    client, runs = runs_of(server, "sweep one")
    (parent,) = (r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    children = {r.info.run_name: r for r in runs if r is not parent}
    assert parent.info.run_name == "made_up-made-up-amil-seed7"
    assert sorted(children) == ["fold_0", "fold_1", "fold_2"]
    assert all(r.data.tags["mlflow.parentRunId"] == parent.info.run_id for r in children.values())
    assert {r.info.status for r in runs} == {"FINISHED"}
    tags = {"cohort": "made_up", "encoder": "made-up", "model": "amil", "seed": "7", "protocol": "strict"}
    assert tags.items() <= parent.data.tags.items()
    assert parent.data.params["train.lr"] == "0.003"
    assert len(parent.data.params["shards_digest"]) == 64
    assert 0 < parent.data.metrics["system/process_memory_usage_megabytes"] < 1e5
    assert "cindex_pooled" in parent.data.metrics
    for child in children.values():
        history = client.get_metric_history(child.info.run_id, "train_loss")
        assert [(m.step, m.value > 0) for m in history] == [(0, True), (1, True), (2, True)]


def test_the_data_are_logged_as_inputs_with_their_digests(server, finished):
    _, runs = runs_of(server, "sweep one")
    parent = next(r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    inputs = {i.tags[0].value: i.dataset for i in parent.inputs.dataset_inputs}
    assert sorted(inputs) == ["bags", "folds", "outcomes"]
    provenance = json.loads((finished.output / "run.json").read_text())["provenance"]
    assert provenance["shards_digest"].startswith(inputs["bags"].digest)
    assert provenance["table_sha256"].startswith(inputs["outcomes"].digest)
    assert json.loads(inputs["bags"].profile)["slides"] == 61
    assert json.loads(inputs["outcomes"].profile)["patients"] == 60


def test_predictions_curves_configuration_and_environment_are_kept(server, finished, tmp_path):
    client, runs = runs_of(server, "sweep one")
    parent = next(r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    child = next(r for r in runs if r.info.run_name == "fold_1")
    assert {
        "config.yaml", "predictions.csv", "summary.csv", "figures/kaplan_meier.svg", "figures/learning_curves.svg",
        "environment/requirements.txt", "environment/environment.json", "splits/splits_0.csv",
    } <= artifacts(client, parent.info.run_id)  # fmt: skip
    assert {"predictions.csv", "history.csv", "model/model.safetensors", "learning_curves.svg"} <= artifacts(
        client, child.info.run_id
    )
    got = client.download_artifacts(parent.info.run_id, "predictions.csv", str(tmp_path))
    assert Path(got).read_bytes() == (finished.output / "predictions.csv").read_bytes()
    svg = client.download_artifacts(parent.info.run_id, "figures/kaplan_meier.svg", str(tmp_path))
    text = Path(svg).read_text()
    assert text.startswith("<svg xmlns=")
    assert "Kaplan–Meier" in text


def test_the_registered_model_is_the_candidate_and_says_what_it_reads(server, finished):
    client = MlflowClient(server.uri, server.uri)
    version = client.get_model_version_by_alias("served", "candidate")
    assert version.tags["cfusion.contract"] == "made-up, 8 wide, at x20, x10, x5"
    assert version.tags["cfusion.cohort"] == "made_up"
    within = pd.read_csv(finished.output / "summary.csv")["cindex_within"].iloc[0]
    assert float(version.tags["cfusion.cindex"]) == pytest.approx(within, abs=1e-4)
    assert "champion" not in client.get_registered_model("served").aliases
    assert json.loads((finished.output / "done.json").read_text())["registered_version"] == version.version


def test_a_name_taken_by_a_model_of_another_encoder_is_refused_before_training(server, finished, tmp_path):
    other = make_cohort(tmp_path / "other", patients=60, dim=6)
    config = settings(other, server, tmp_path / "run", register_as="served")
    with pytest.raises(ConfigError, match=r"served.*reads made-up, 8 wide.*this one reads made-up, 6 wide"):
        cross_validate(config)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_sends_nothing_when_started_again(server, finished):
    client, before = runs_of(server, "sweep one")
    size = (finished.output / "tracking.jsonl").stat().st_size
    cross_validate(finished)
    _, after = runs_of(server, "sweep one")
    assert {r.info.run_id for r in after} == {r.info.run_id for r in before}
    assert {r.info.status for r in after} == {"FINISHED"}
    child = next(r for r in after if r.info.run_name == "fold_0")
    assert len(client.get_metric_history(child.info.run_id, "train_loss")) == 3
    assert len(client.search_model_versions("name='served'")) == 1
    lines = (finished.output / "tracking.jsonl").read_bytes()[size:].splitlines()
    assert all(set(json.loads(line)["values"]) >= {"system/cpu_utilization_percentage"} for line in lines)


def begun(server: MlflowServer, output: Path, experiment: str) -> tuple[TrackedRun, TrackedRun]:
    (output / "fold_0").mkdir(parents=True)
    (output / "fold_0" / "history.csv").write_text("epoch\n0\n")
    tracking = TrackingConfig(uri=server.uri, experiment=experiment)
    parent = TrackedRun.begin(tracking, output, "parent", {"lr": 0.1})
    child = parent.child("fold_0", {})
    for step in range(3):
        child.log({"loss": 1 / (step + 1)}, step)
    for _ in range(600):
        if not unsent(output, server.uri):
            return parent, child
        time.sleep(0.1)
    raise AssertionError("nothing was sent")


def has_everything_once(server: MlflowServer, experiment: str, steps: int) -> None:
    client, runs = runs_of(server, experiment)
    assert sorted(r.info.run_name for r in runs) == ["fold_0", "parent"]
    assert {r.info.status for r in runs} == {"FINISHED"}
    found = next(r for r in runs if r.info.run_name == "fold_0")
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(step, 1 / (step + 1)) for step in range(steps)]
    assert artifacts(client, found.info.run_id) == {"history.csv"}


def test_a_conflict_with_another_writer_is_resolved(files, tmp_path, caplog):
    (tmp_path / "sitecustomize.py").write_text("import rival\nheld = rival.earlier_writer()\nheld.__enter__()\n")
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    server = MlflowServer(tmp_path, PYTHONPATH=paths)
    server.start()
    try:
        config = settings(files, server, tmp_path / "run", register_as="shared")
        cross_validate(config)
        log = (tmp_path / "server.log").read_text()
        assert all(f"an earlier writer made {kind}" in log for kind in KINDS)
        assert unsent(config.output, server.uri) == 0
        assert "track" not in caplog.text, "nothing was refused, and no second delivery was needed"
        _, runs = runs_of(server, "sweep one")
        parent = next(r for r in runs if "mlflow.parentRunId" not in r.data.tags)
        assert len(parent.inputs.dataset_inputs) == 3
        version = MlflowClient(server.uri, server.uri).get_model_version_by_alias("shared", "candidate")
        assert version.run_id == parent.info.run_id
    finally:
        server.kill()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(run, "PACE", Pace(seconds=0.1, longest=0.2))


def test_a_server_killed_in_mid_run_gets_the_rest_later_and_once(tmp_path, impatient, caplog):
    server = MlflowServer(tmp_path)
    server.start()
    output = tmp_path / "run"
    try:
        with caplog.at_level(logging.INFO):
            parent, child = begun(server, output, "lost")
            server.kill()
            for step in range(3, 1203):
                child.log({"loss": 1 / (step + 1)}, step)
            child.artifacts(output / "fold_0")
            child.close()
            parent.close()
        assert unsent(output, server.uri)
        assert "does not answer" in caplog.text
        assert f"cfusion track send {output}" in caplog.text
        assert "Traceback" not in caplog.text
        server.start()
        send(output, server.uri)
        assert unsent(output, server.uri) == 0
        has_everything_once(server, "lost", 1203)
        send(output, server.uri)
        has_everything_once(server, "lost", 1203)
    finally:
        server.kill()


def test_a_server_that_hangs_gets_the_rest_when_it_answers_again(server, tmp_path, impatient, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    end_sender()  # the next one has these limits
    output = tmp_path / "run"
    with caplog.at_level(logging.INFO):
        parent, child = begun(server, output, "hung")
        server.stop()
        try:
            for step in range(3, 50):
                child.log({"loss": 1 / (step + 1)}, step)
            for _ in range(300):
                if "does not answer" in caplog.text:
                    break
                time.sleep(0.1)
        finally:
            server.go_on()
        for step in range(50, 60):
            child.log({"loss": 1 / (step + 1)}, step)
        child.artifacts(output / "fold_0")
        child.close()
        parent.close()
    assert "does not answer" in caplog.text
    has_everything_once(server, "hung", 60)

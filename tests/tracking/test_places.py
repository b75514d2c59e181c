"""Databases and files of runs in other places: moved folders, odd names, object stores, slow servers."""

import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cfusion.config import TrackingConfig
from cfusion.errors import ConfigError
from cfusion.tracking import address
from cfusion.tracking.address import (
    TIMEOUT_VARIABLE,
    TrackingUnavailableError,
    checked_uri,
    connect,
    experiment_id,
    patient,
    tracking_uri,
    unavailable,
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with a run that has a file and a registered version, in `runs`; made once, since MLflow takes long."""
    folder = tmp_path_factory.mktemp("template") / "runs"
    folder.mkdir()
    client = connect(f"sqlite:///{folder / 'mlflow.db'}")
    run = client.create_run(experiment_id(client, "study"))
    (folder / "model.txt").write_text("weights")
    client.log_artifact(run.info.run_id, str(folder / "model.txt"), "model")
    client.create_registered_model("m")
    client.create_model_version("m", f"{run.info.artifact_uri}/model", run.info.run_id)
    return folder


@pytest.fixture
def moved(template: Path, tmp_path: Path) -> Path:
    """A copy of the folder, whose database names a place that is gone."""
    scratch = tmp_path / "a b" / "scratch" / "runs"
    shutil.copytree(template, scratch)
    rename(scratch / "mlflow.db", template, scratch)
    scratch.rename(tmp_path / "project")
    shutil.rmtree(tmp_path / "a b")
    return tmp_path / "project"


def rename(database: Path, old: Path, new: Path) -> None:
    with sqlite3.connect(database) as connection:
        for table, column in address._PLACES:
            columns = [row[1] for row in connection.execute(f"pragma table_info({table})")]
            if column in columns:
                connection.execute(
                    f"update {table} set {column} = replace({column}, ?, ?)", (old.as_uri(), new.as_uri())
                )
                connection.execute(f"update {table} set {column} = replace({column}, ?, ?)", (str(old), str(new)))
    connection.close()


@pytest.mark.slow
def test_a_moved_folder_gives_its_files_and_takes_new_ones(moved, tmp_path):
    client = connect(f"sqlite:///{moved / 'mlflow.db'}")
    (run,) = client.search_runs([experiment_id(client, "study")])
    fetched = client.download_artifacts(run.info.run_id, "model", str(tmp_path))
    assert (Path(fetched) / "model.txt").read_text() == "weights"
    version = client.get_model_version("m", "1")
    assert version.source.startswith((moved / "mlartifacts").as_uri())
    other = client.create_run(experiment_id(client, "study"))
    client.log_artifact(other.info.run_id, str(moved / "model.txt"))
    assert (moved / "mlartifacts" / other.info.run_id / "artifacts" / "model.txt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "project"], "no old folder is made again"


def test_a_copy_next_to_the_first_keeps_the_files_of_the_first(template, tmp_path):
    shutil.copytree(template, tmp_path / "copy")
    before = (tmp_path / "copy" / "mlflow.db").read_bytes()
    client = connect(f"sqlite:///{tmp_path / 'copy' / 'mlflow.db'}")
    (run,) = client.search_runs([experiment_id(client, "study")])
    assert run.info.artifact_uri.startswith(template.as_uri())
    assert (tmp_path / "copy" / "mlflow.db").read_bytes() == before


@pytest.mark.parametrize("name", ["what?", "50%", "a%20b"])
def test_a_path_that_mlflow_would_read_otherwise_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"cannot use a database whose path has a \? or %\. Rename the folder"):
        tracking_uri(TrackingConfig(), tmp_path / name / "run")
    with pytest.raises(ConfigError, match=r"has a \? or %"):
        checked_uri(f"sqlite:///{name}.db")
    assert checked_uri("postgresql://h/db?sslmode=require")


class NoCredentialsError(Exception):
    """As botocore's."""


NoCredentialsError.__module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'boto3'"),
            r"store of files cannot be used from here .*pip install boto3",
        ),
        (NoCredentialsError("Unable to locate credentials"), r"store of files .*AWS_ACCESS_KEY_ID.*--serve-artifacts"),
        (MlflowException("Read timed out. (read timeout=10)"), rf"does not answer .*set {TIMEOUT_VARIABLE} to more"),
        (FileNotFoundError(2, "No such file or directory", "/old"), r"files of the run are not where it says .*/old"),
    ],
)
def test_what_a_store_of_files_lacks_is_one_line(error, message):
    with pytest.raises(TrackingUnavailableError, match=message), unavailable("http://host:5000"):
        raise error


def test_a_defect_is_not_taken_for_a_store_that_does_not_answer():
    with pytest.raises(ZeroDivisionError), unavailable("http://host:5000"):
        raise ZeroDivisionError


def test_files_may_take_longer_than_other_requests(monkeypatch):
    monkeypatch.setenv(TIMEOUT_VARIABLE, "10")
    with patient():
        assert os.environ[TIMEOUT_VARIABLE] == "120"
    assert os.environ[TIMEOUT_VARIABLE] == "10"
    monkeypatch.setenv(TIMEOUT_VARIABLE, "3")
    with patient():
        assert os.environ[TIMEOUT_VARIABLE] == "3", "the user's"


def test_a_client_without_a_database_is_not_touched(tmp_path):
    assert isinstance(connect("http://127.0.0.1:9"), MlflowClient)
    assert not list(tmp_path.iterdir())

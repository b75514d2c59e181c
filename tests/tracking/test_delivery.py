"""Test that the journal reaches a database in order, each record once, whatever interrupts it."""

import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy
from factories import CohortFiles, make_cohort
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from rival import KINDS, earlier_writer
from typer.testing import CliRunner

from cfusion.cli.main import app
from cfusion.config import TrackingConfig
from cfusion.errors import ConfigError, DataError, RequeueError
from cfusion.runs.crossval import cross_validate
from cfusion.secret_text import without_secrets
from cfusion.tracking import TrackedRun, delivery, sender
from cfusion.tracking import tracked_run as run
from cfusion.tracking.address import TrackingUnavailableError, connect, tracking_uri
from cfusion.tracking.delivery import delivery_of, send, unsent
from cfusion.tracking.journal import Journal
from cfusion.tracking.sender import Follower, Pace
from cfusion.tracking.sender_process import SenderProcess, end_sender, sender_process

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Create one database for the module; each test uses its own experiment. `empty.db` next to it has no runs."""
    folder = tmp_path_factory.mktemp("database")
    connect(f"sqlite:///{folder / 'empty.db'}")
    shutil.copy(folder / "empty.db", folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


def empty(database: str, target: Path) -> str:
    """Copy the database without runs; creating a new one takes seconds."""
    shutil.copy(Path(database.removeprefix("sqlite:///")).with_name("empty.db"), target)
    return f"sqlite:///{target}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=60)


class SenderHere:
    """Sends at the end of a run, in the process of the test, where MLflow and the network can be replaced."""

    def follow(self, folder: Path, uri: str, pace: Pace) -> None:
        pass

    def finish(self, folder: Path, uri: str, pace: Pace) -> ConfigError | None:
        follower = Follower(folder, uri, pace)
        follower.finish()
        return follower.refused


@pytest.fixture
def sends_here(monkeypatch):
    monkeypatch.setattr(run, "sender_process", SenderHere)


@pytest.fixture
def new_sender():
    """Take the environment of the test, and leave no process behind that has it."""
    end_sender()
    yield
    end_sender()


def journal_of(folder: Path, experiment: str, steps: int = 3) -> Journal:
    journal = Journal(folder / "tracking.jsonl")
    journal.start("", experiment=experiment, name="parent", params={"lr": "0.1"}, tags={"cohort": "a"})
    journal.start("fold_0", experiment=experiment, name="fold_0", params={}, tags={})
    for step in range(steps):
        journal.metrics("fold_0", {"loss": 1 / (step + 1), "cindex": float("nan")}, step)
    return journal


def runs_of(uri: str, experiment: str) -> dict:
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return {r.info.run_name: r for r in found}


def history(uri: str, run_id: str, name: str = "loss") -> list[int]:
    return [metric.step for metric in MlflowClient(uri).get_metric_history(run_id, name)]


@pytest.mark.parametrize("stops_at", ["create_run", "log_batch", "after the batch"])
def test_a_sender_that_dies_anywhere_sends_the_rest_once(database, tmp_path, monkeypatch, stops_at):
    """A run or metrics stored just before the process died are found again, not duplicated."""
    journal_of(tmp_path, stops_at).close()
    target = {"create_run": "create_run", "log_batch": "log_batch", "after the batch": "log_batch"}[stops_at]
    original = getattr(MlflowClient, target)

    def dies(self, *arguments, **options):
        if stops_at != "log_batch":
            original(self, *arguments, **options)
        if stops_at == "after the batch" and not options.get("metrics"):
            return None
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowClient, target, dies)
    with pytest.raises(KeyboardInterrupt):
        send(tmp_path, database)
    monkeypatch.undo()
    send(tmp_path, database)
    runs = runs_of(database, stops_at)
    assert sorted(runs) == ["fold_0", "parent"]
    assert history(database, runs["fold_0"].info.run_id) == [0, 1, 2]
    assert history(database, runs["fold_0"].info.run_id, "cindex") == [0, 1, 2]
    assert runs["parent"].data.params == {"lr": "0.1"}


def test_thousands_of_metrics_go_in_batches_that_mlflow_takes(database, tmp_path, monkeypatch):
    journal_of(tmp_path, "many", steps=1300).close()
    sizes = []
    original = MlflowClient.log_batch

    def counted(self, run_id, **options):
        sizes.append(len(options.get("metrics", [])))
        original(self, run_id, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    send(tmp_path, database)
    assert [size for size in sizes if size] == [1000, 1000, 600]


def test_another_server_gets_all_records_of_a_run(database, tmp_path):
    journal_of(tmp_path, "moved").close()
    send(tmp_path, database)
    other = empty(database, tmp_path / "other.db")
    send(tmp_path, other)
    assert history(other, runs_of(other, "moved")["fold_0"].info.run_id) == [0, 1, 2]
    again = empty(database, tmp_path / "again.db")
    state = json.loads((tmp_path / "tracking.json").read_text())
    (tmp_path / "tracking.json").write_text(json.dumps({again: state[other]}))
    send(tmp_path, again)
    assert sorted(runs_of(again, "moved")) == ["fold_0", "parent"], "a new database gets the run again"


def test_refused_records_are_reported_and_do_not_block_the_rest(database, tmp_path, caplog):
    journal = journal_of(tmp_path, "refused", steps=0)
    journal.metrics("fold_0", {"a name that is \\ not allowed?": 1.0}, 0)
    journal.once("fold_0", "artifacts", path="gone.csv", under=None)
    journal.metrics("fold_0", {"loss": 1.0}, 1)
    journal.close()
    state = send(tmp_path, database)
    assert unsent(tmp_path, database) == 0
    assert len(state.refused) == 2
    assert "gone.csv: the file no longer exists" in caplog.text
    assert history(database, runs_of(database, "refused")["fold_0"].info.run_id) == [1]


@pytest.mark.slow
def test_a_conflict_with_another_writer_is_resolved(files, database, tmp_path, caplog, sends_here):
    uri = empty(database, tmp_path / "mlflow.db")
    tracking = {"enabled": True, "uri": uri, "experiment": "shared", "register_as": "shared"}
    config = files.config(tmp_path / "run", tracking=tracking, evaluation={"bootstrap": 0}, splits={"folds": 2})
    with earlier_writer() as met:
        cross_validate(config)
    assert met == KINDS
    assert unsent(config.output, uri) == 0
    assert delivery_of(config.output, uri).refused == []
    assert "tracking" not in caplog.text
    client = MlflowClient(uri, uri)
    parent = runs_of(uri, "shared")["made_up-made-up-amil-seed7"]
    assert len(parent.inputs.dataset_inputs) == 3
    assert client.get_model_version_by_alias("shared", "candidate").run_id == parent.info.run_id
    assert len(client.search_model_versions("name='shared'")) == 1


def test_the_attempts_end_if_every_one_conflicts(database, tmp_path, monkeypatch):
    journal_of(tmp_path, "in the way").close()
    tried = []

    def log_batch(*_, **__):
        tried.append(1)
        error = sqlalchemy.exc.IntegrityError("INSERT", {}, Exception("UNIQUE constraint failed"))
        raise MlflowException(str(error))

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    with pytest.raises(TrackingUnavailableError, match="UNIQUE constraint failed"):
        send(tmp_path, database)
    assert len(tried) == delivery.ATTEMPTS


def test_the_end_of_a_run_retries_an_unreachable_server(database, tmp_path, monkeypatch, caplog, sends_here):
    asked = []

    def busy_once(folder, uri):
        asked.append(uri)
        if len(asked) == 1:
            raise TrackingUnavailableError("busy")
        return send(folder, uri)

    monkeypatch.setattr(run, "PACE", Pace(last_pause=0.01))
    monkeypatch.setattr(sender, "send", busy_once)
    with TrackedRun.begin(TrackingConfig(uri=database, experiment="busy"), tmp_path, "parent", {}):
        pass
    assert len(asked) == 2
    assert unsent(tmp_path, database) == 0
    assert "records of this run are unsent and kept" not in caplog.text
    monkeypatch.setattr(run, "PACE", Pace(last_pause=0.01, last_seconds=-1))
    del asked[:]
    with TrackedRun.begin(TrackingConfig(uri=database, experiment="busy"), tmp_path / "slow", "parent", {}):
        pass
    assert len(asked) == 1, "after one attempt that took long, no other starts"
    assert "records of this run are unsent and kept" in caplog.text


@pytest.mark.slow
def test_a_deleted_experiment_keeps_its_runs_until_it_is_restored(database, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(run, "PACE", Pace(last_pause=0.01))
    tracking = TrackingConfig(uri=database, experiment="deleted")
    client = MlflowClient(database)
    found = client.create_experiment("deleted")
    client.delete_experiment(found)
    with TrackedRun.begin(tracking, tmp_path, "parent", {}) as parent:
        parent.child("fold_0", {}).log({"loss": 1.0}, 0)
    assert f"'deleted' is deleted. Restore it (mlflow experiments restore --experiment-id {found})" in caplog.text
    assert "Traceback" not in caplog.text
    client.restore_experiment(found)
    send(tmp_path, database)
    assert history(database, runs_of(database, "deleted")["fold_0"].info.run_id) == [0]


def test_nothing_is_sent_of_a_run_that_the_server_refused(database, tmp_path, monkeypatch):
    journal_of(tmp_path, "refused run").close()

    def create_run(*_, **__):
        raise MlflowException("no such run here", error_code=INVALID_PARAMETER_VALUE)

    monkeypatch.setattr(MlflowClient, "create_run", create_run)
    refused = send(tmp_path, database).refused
    assert unsent(tmp_path, database) == 0
    assert [line.partition(":")[0] for line in refused] == ["run, start", "fold_0, start", "fold_0, metrics"]


@pytest.mark.slow
def test_a_locked_database_is_reported_and_nothing_is_lost(database, tmp_path, caplog):
    uri = empty(database, tmp_path / "mlflow.db")
    holder = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    tracking = TrackingConfig(uri=uri, experiment="locked")
    with caplog.at_level(logging.INFO):
        parent = TrackedRun.begin(tracking, tmp_path / "run", "parent", {})
        child = parent.child("fold_0", {})
        for step in range(5):
            child.log({"loss": 1.0}, step)
        child.close()
        parent.close()
    assert "mlflow.db: is locked by another process" in caplog.text
    assert "Traceback" not in caplog.text
    assert unsent(tmp_path / "run", uri) == 10
    holder.execute("ROLLBACK")
    holder.close()
    send(tmp_path / "run", uri)
    runs = runs_of(uri, "locked")
    assert history(uri, runs["fold_0"].info.run_id) == [0, 1, 2, 3, 4]
    assert {r.info.status for r in runs.values()} == {"FINISHED"}


@pytest.mark.slow
def test_a_training_never_waits_for_a_server(tmp_path, monkeypatch, new_sender, caplog):
    """While a request hangs, every call except the end of the parent returns."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        uri = f"http://127.0.0.1:{listening.getsockname()[1]}"
        parent = TrackedRun.begin(TrackingConfig(uri=uri), tmp_path / "run", "parent", {})
        connection, _ = listening.accept()
        child = parent.child("fold_0", {})
        for step in range(100):
            child.log({"loss": 1.0}, step)
        child.artifacts(tmp_path)
        child.close()
        assert connection.recv(1)
        assert not caplog.text, "the request still hangs"
    connection.close()
    parent.close()
    assert "does not answer" in caplog.text


@pytest.mark.slow
def test_a_lost_sender_loses_no_record(database, tmp_path, new_sender, caplog):
    tracking = TrackingConfig(uri=database, experiment="lost sender")
    with TrackedRun.begin(tracking, tmp_path, "parent", {}) as parent:
        parent.child("fold_0", {}).log({"loss": 1.0}, 0)
        lost = sender_process()
        os.kill(lost.pid, signal.SIGKILL)
        lost.wait()
    assert unsent(tmp_path, database) == 0, "another process has sent them"
    assert {r.info.status for r in runs_of(database, "lost sender").values()} == {"FINISHED"}


_DIES = """
import os, signal, sys
from pathlib import Path
from cfusion.config import TrackingConfig
from cfusion.tracking import TrackedRun
from cfusion.tracking.sender_process import sender_process
run = TrackedRun.begin(TrackingConfig(uri=sys.argv[2], experiment="killed"), Path(sys.argv[1]), "parent", {})
run.child("fold_0", {}).log({"loss": 1.0}, 0)
print(sender_process().pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_what_a_killed_program_has_recorded_is_sent_and_no_process_stays(database, tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", _DIES, str(tmp_path), database], cwd=ROOT, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    sender_pid = Path("/proc") / killed.stdout.strip()
    while sender_pid.exists() and "Z" not in (sender_pid / "stat").read_text().rpartition(")")[2].split()[0]:
        time.sleep(0.05)
    assert unsent(tmp_path, database) == 0
    assert {r.info.status for r in runs_of(database, "killed").values()} == {"RUNNING"}


def test_the_sender_imports_no_torch():
    code = "import sys, cfusion.tracking.sender; print('torch' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.slow
@pytest.mark.parametrize(("error", "status"), [(RequeueError("stopped"), "KILLED"), (DataError("broke"), "FAILED")])
def test_the_end_of_a_run_and_its_cause_are_recorded(database, tmp_path, error, status):
    tracking = TrackingConfig(uri=database, experiment=f"ends {status}")

    def trains():
        with TrackedRun.begin(tracking, tmp_path / "run", "parent", {}) as parent:
            parent.child("fold_0", {})
            raise error

    with pytest.raises(type(error)):
        trains()
    runs = runs_of(database, f"ends {status}")
    assert {r.info.status for r in runs.values()} == {status}
    assert runs["parent"].data.tags["cause"] == f"{type(error).__name__}: {error}"
    with TrackedRun.begin(tracking, tmp_path / "run", "parent", {}) as parent:
        parent.child("fold_0", {}).close()
    runs = runs_of(database, f"ends {status}")
    assert [r.info.status for r in runs.values()] == ["FINISHED", "FINISHED"], "resumed, not started again"


_KILLED = """
import os, signal, sys, time
from cfusion.runs import crossval
from cfusion.config import load_config
from cfusion.tracking import TrackedRun, tracked_run
from cfusion.tracking.delivery import unsent
from cfusion.tracking.address import tracking_uri
from cfusion.tracking.sender import Pace
tracked_run.PACE = Pace(seconds=0.1)
config = load_config(sys.argv[1])
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
original = TrackedRun.log
def log(self, metrics, step=0):
    original(self, metrics, step)
    if sys.argv[2] == "in an epoch" and self._key == "fold_1" and step == 1:
        while unsent(config.output, tracking_uri(config.tracking, config.output)):
            time.sleep(0.05)
        die()
TrackedRun.log = log
if sys.argv[2] == "behind a fold":
    TrackedRun.artifacts = die
crossval.cross_validate(config)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in an epoch", "behind a fold"])
def test_a_run_killed_by_sigkill_goes_on_in_the_same_mlflow_runs(files, database, tmp_path, where):
    tracking = {"enabled": True, "uri": database, "experiment": where}
    config = files.config(tmp_path / "run", tracking=tracking, evaluation={"bootstrap": 0}, splits={"folds": 2})
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(path), where], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    before = delivery_of(config.output, database).runs
    assert where == "behind a fold" or {
        r.info.status for n, r in runs_of(database, where).items() if n != "fold_0"
    } == {"RUNNING"}
    cross_validate(config)
    after = delivery_of(config.output, database).runs
    assert before.items() <= after.items()
    runs = runs_of(database, where)
    assert sorted(r.info.run_name for r in runs.values()) == sorted(["fold_0", "fold_1", "made_up-made-up-amil-seed7"])
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    for fold in range(2):
        assert history(database, after[f"fold_{fold}"], "train_loss") == [0, 1, 2, 3]
        kept = {item.path for item in MlflowClient(database).list_artifacts(after[f"fold_{fold}"])}
        assert {"predictions.csv", "history.csv"} <= kept


def test_only_one_process_sends_a_run(database, tmp_path, monkeypatch):
    journal_of(tmp_path, "two").close()
    inside = []
    original = delivery._Sender.take

    def take(self, records):
        with pytest.raises(DataError, match="another process is sending this run"):
            send(tmp_path, database)
        inside.append(records)
        original(self, records)

    monkeypatch.setattr(delivery._Sender, "take", take)
    send(tmp_path, database)
    assert inside


def test_a_folder_without_a_journal_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no tracking\.jsonl"):
        send(tmp_path, "http://127.0.0.1:9")


def test_track_send_sends_the_rest_of_a_run(database, tmp_path, files, monkeypatch):
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    tracking = {"enabled": True, "uri": "http://127.0.0.1:9", "experiment": "command"}
    config = files.config(tmp_path / "run", tracking=tracking)
    config.output.mkdir()
    (config.output / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    journal = journal_of(config.output, "command")
    journal.status("", "FINISHED")
    journal.close()
    away = CliRunner().invoke(app, ["track", "send", str(config.output)])
    assert isinstance(away.exception, TrackingUnavailableError)
    assert "http://127.0.0.1:9: does not answer" in away.exception.message
    for count in (6, 0):
        sent = CliRunner().invoke(app, ["track", "send", str(config.output), "--uri", database])
        assert sent.exit_code == 0, sent.output
        assert f"{config.output}: {count} records sent to {database}" in sent.stdout
    assert runs_of(database, "command")["parent"].info.status == "FINISHED"


def test_addresses(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(TrackingConfig(), tmp_path / "run") == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example")
    assert tracking_uri(TrackingConfig(), tmp_path / "run") == "https://tracking.example"
    assert tracking_uri(TrackingConfig(uri="postgresql+psycopg2://db/x"), tmp_path) == "postgresql+psycopg2://db/x"
    for wrong in ("mlruns", "file:///mlruns", "ftp://host"):
        with pytest.raises(ConfigError, match="expected http"):
            tracking_uri(TrackingConfig(uri=wrong), tmp_path)


def test_a_password_in_the_address_is_not_stored(tmp_path):
    assert without_secrets("https://ann:secret@host:5000/x") == "https://host:5000/x"
    journal_of(tmp_path, "secret").close()
    with pytest.raises(TrackingUnavailableError) as caught:
        send(tmp_path, "http://ann:secret@127.0.0.1:9")
    assert "secret" not in caught.value.message.split("(")[0]
    assert all("secret" not in path.read_text() for path in tmp_path.glob("tracking.json"))


def test_a_sender_that_was_asked_for_nothing_is_not_waited_for():
    sender = SenderProcess()
    sender.end()
    assert not sender.alive
    assert sender._process.returncode == -9, "killed, not waited for until MLflow is imported"

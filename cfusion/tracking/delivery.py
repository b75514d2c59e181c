"""Upload a run's journal to MLflow: in order, each record once, resuming where the last attempt stopped.

A record is marked as sent after the server accepted it. If the process dies in between, the record is sent again. This
is harmless: a run is found by its id, and MLflow stores equal metrics, parameters and inputs only once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cfusion.errors import ConfigError, DataError
from cfusion.files import read_json, write_json
from cfusion.locks import HeldError, hold
from cfusion.secret_text import without_secrets
from cfusion.tracking.address import REFUSALS, connect, experiment_id, met_another_writer, patient, unavailable
from cfusion.tracking.journal import JOURNAL_NAME, PARENT, Record, read_records

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

STATE_NAME = "tracking.json"
LOCK_NAME = "tracking.lock"

METRICS_AT_ONCE = 1000
"""Maximum number of metrics that MLflow accepts in one request."""

PARAMS_AT_ONCE = 100
"""Maximum number of parameters that MLflow accepts in one request."""

ATTEMPTS = 5
"""Maximum number of attempts to send a record that conflicts with another writer, such as a run on the same data that
ends at the same time."""


@dataclass
class Delivery:
    """How much of a journal one server has received.

    Attributes:
        position: Number of bytes of the journal that have been sent.
        runs: MLflow's run id of each run of the journal.
        versions: Registered versions, by model name.
        refused: Records that the server rejected, and why.
    """

    position: int = 0
    runs: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


def delivery_of(folder: Path, uri: str) -> Delivery:
    """Read how much of the journal in a run's folder the server at `uri` has received."""
    path = folder / STATE_NAME
    known = read_json(path) if path.exists() else {}
    return Delivery(**known.get(without_secrets(uri), {}))


def unsent(folder: Path, uri: str) -> int:
    """Count the records of a run's journal that the server has not received."""
    return sum(1 for _ in read_records(folder / JOURNAL_NAME, delivery_of(folder, uri).position))


def send(folder: Path, uri: str) -> Delivery:
    """Send the records of a run's journal that the server has not received.

    Args:
        folder: The run's output folder.
        uri: Tracking server or database; one that no longer has the run receives all records again.

    Raises:
        DataError: The folder has no journal, or another process is sending it.
        TrackingUnavailableError: The server does not answer. Records that it accepted are not sent again.
        ConfigError: The run's model cannot be registered under its name. Everything else was sent.
    """
    with _locked(folder):
        client = connect(uri)
        state = delivery_of(folder, uri)
        with unavailable(uri):
            if state.runs and not _exists(client, state.runs[PARENT]):
                logger.warning("%s: the run no longer exists there; sending all records again", without_secrets(uri))
                state = Delivery()
        sender = _Sender(client, folder, state)
        for records, end in _units(folder / JOURNAL_NAME, state.position):
            with unavailable(uri):
                sender.take(records)
                state.position = end
                _save(folder, uri, state)
    if sender.name_taken is not None:
        raise sender.name_taken
    return state


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        (folder / JOURNAL_NAME).open("rb").close()
    except OSError as error:
        raise DataError(
            f"{folder}: has no {JOURNAL_NAME} ({error.strerror}).", "Give the output folder of a tracked run."
        ) from error
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(folder / LOCK_NAME))
        except HeldError as error:
            raise DataError(
                f"{folder}: another process is sending this run ({error.message}).", "Wait until it is done."
            ) from None
        yield


def _save(folder: Path, uri: str, state: Delivery) -> None:
    path = folder / STATE_NAME
    known = read_json(path) if path.exists() else {}
    write_json(path, {**known, without_secrets(uri): state.__dict__})


def _exists(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _units(journal: Path, position: int) -> Iterator[tuple[list[Record], int]]:
    """Group records into requests: consecutive metrics together up to the limit, every other record separately."""
    waiting: list[Record] = []
    count = 0
    for record, end in read_records(journal, position):
        size = len(record["values"]) if record["kind"] == "metrics" else 0
        if waiting and (not size or count + size > METRICS_AT_ONCE):
            yield waiting, position
            waiting, count = [], 0
        position = end
        if size:
            waiting.append(record)
            count += size
        else:
            yield [record], end
    if waiting:
        yield waiting, position


class _Sender:
    """Sends records to one server."""

    def __init__(self, client: MlflowClient, folder: Path, state: Delivery) -> None:
        self.client, self.folder, self.state = client, folder, state
        self.name_taken: ConfigError | None = None
        self._takers: dict[str, Callable[[str, Record], None]] = {
            "start": self._start, "inputs": self._inputs, "artifacts": self._artifacts, "status": self._status,
            "register": self._register,
        }  # fmt: skip

    def take(self, records: list[Record]) -> None:
        """Send records of one kind; record and skip those that the server rejects."""
        from mlflow.exceptions import MlflowException

        first = records[0]
        try:
            for attempt in range(ATTEMPTS):
                try:
                    self._hand_over(records)
                    break
                except MlflowException as error:
                    if attempt + 1 == ATTEMPTS or not met_another_writer(error):
                        raise
        except (MlflowException, DataError) as error:
            if isinstance(error, MlflowException) and error.error_code not in REFUSALS:
                raise
            self._refuse(first, " ".join(str(error).split())[:300])
        except ConfigError as error:
            self.name_taken = error
            self._refuse(first, str(error))

    def _hand_over(self, records: list[Record]) -> None:
        first = records[0]
        needed = PARENT if first["kind"] == "start" else first["run"]
        if needed not in self.state.runs and (first["run"], first["kind"]) != (PARENT, "start"):
            raise DataError("the server rejected the run it belongs to.")
        if first["kind"] == "metrics":
            self._metrics(records)
        else:
            self._takers[first["kind"]](self.state.runs.get(first["run"], ""), first)

    def _refuse(self, record: Record, why: str) -> None:
        line = f"{record['run'] or 'run'}, {record['kind']}: {why}"
        logger.warning("not tracked: %s", line)
        self.state.refused.append(line)

    def _start(self, _: str, record: Record) -> None:
        """Create the MLflow run, or find the one that an interrupted attempt created."""
        from mlflow.entities import Param

        experiment = experiment_id(self.client, record["experiment"])
        found = self.client.search_runs([experiment], f"tags.`cfusion.id` = '{record['id']}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
        else:
            tags = {**record["tags"], "cfusion.id": record["id"]}
            if record["run"] != PARENT:
                tags["mlflow.parentRunId"] = self.state.runs[PARENT]
            created = self.client.create_run(experiment, start_time=record["time"], tags=tags, run_name=record["name"])
            run_id = created.info.run_id
        self.state.runs[record["run"]] = run_id
        items = [Param(key, value) for key, value in record["params"].items()]
        for start in range(0, len(items), PARAMS_AT_ONCE):
            self.client.log_batch(run_id, params=items[start : start + PARAMS_AT_ONCE])

    def _metrics(self, records: list[Record]) -> None:
        from mlflow.entities import Metric

        by_run: dict[str, list[Metric]] = {}
        for record in records:
            by_run.setdefault(record["run"], []).extend(
                Metric(name, float(value), record["time"], record["step"]) for name, value in record["values"].items()
            )
        for run, metrics in by_run.items():
            self.client.log_batch(self.state.runs[run], metrics=metrics)

    def _inputs(self, run_id: str, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        datasets = [
            DatasetInput(
                Dataset(data["name"], data["digest"][:36], data["kind"], data["source"], profile=data["profile"]),
                [InputTag("mlflow.data.context", data["context"])],
            )
            for data in record["datasets"]
        ]
        self.client.log_inputs(run_id, datasets=datasets)

    def _artifacts(self, run_id: str, record: Record) -> None:
        path = self.folder / record["path"]
        if not path.exists():
            raise DataError(f"{path}: the file no longer exists.")
        with patient():
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), record["under"])
            else:
                self.client.log_artifact(run_id, str(path), record["under"])

    def _status(self, run_id: str, record: Record) -> None:
        if record["status"] == "RUNNING":
            self.client.update_run(run_id, "RUNNING")
            return
        if record["cause"]:
            self.client.set_tag(run_id, "cause", record["cause"])
        self.client.set_terminated(run_id, record["status"], end_time=record["time"])

    def _register(self, run_id: str, record: Record) -> None:
        from cfusion.tracking.model_registry import register_ensemble

        with patient():
            version = register_ensemble(self.client, run_id, self.folder, record["name"], record["about"])
        self.state.versions[record["name"]] = version

"""Resolve the tracking address, create the default sqlite database, and translate errors of MLflow."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cfusion.addresses import without_secrets
from cfusion.config import TrackingConfig
from cfusion.errors import CfusionError, ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"

_CONNECTING = threading.Lock()
"""Alembic, which MLflow uses to create and check a database, keeps its state in globals: one thread at a time."""

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow would print the address of a run with its password.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow's default limits (7 retries of 120 s) would let a hanging server block a run for a quarter of an hour.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}

REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"})
"""MLflow's error codes for requests that a server will never accept; requests with other codes are retried."""


class TrackingUnavailableError(CfusionError):
    """The tracking server or database is unavailable at the moment."""

    topic = "network"


def tracking_uri(tracking: TrackingConfig, output: Path) -> str:
    """Return the configured address, else `MLFLOW_TRACKING_URI`, else a sqlite file next to the run's folder.

    Raises:
        ConfigError: MLflow has no tracking store for this kind of address.
    """
    given = tracking.uri.reveal() if tracking.uri else os.environ.get("MLFLOW_TRACKING_URI")
    return checked_uri(given or f"{SQLITE}{(output.parent / 'mlflow.db').resolve()}")


def given_uri(uri: str | None) -> str:
    """Return the address of an existing registry: from the command line, else `MLFLOW_TRACKING_URI`.

    Raises:
        ConfigError: Neither is given, or the sqlite file does not exist.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise ConfigError(
            "No model registry is given.",
            "Give --uri, such as sqlite:///runs/mlflow.db, or set MLFLOW_TRACKING_URI.",
        )
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        raise ConfigError(
            f"{without_secrets(uri)}: database file not found.",
            "The database of a sweep is mlflow.db in the folder of its runs.",
        )
    return checked_uri(uri)


def checked_uri(uri: str) -> str:
    """Return `uri` if MLflow has a tracking store for this kind of address.

    Raises:
        ConfigError: It has none, as for a folder of files, MLflow's old store.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme not in ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks"):
        raise ConfigError(
            f"tracking.uri={without_secrets(uri)!r}: expected http(s)://HOST, sqlite:///FILE or another SQL database.",
            "MLflow no longer supports plain folders as a store.",
        )
    return uri


def connect(uri: str) -> MlflowClient:
    """Return a client of the server or database; create a missing sqlite file.

    Raises:
        TrackingUnavailableError: The database cannot be opened at the moment.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # MLflow logs a database error with its traceback and also raises it; the one line from us is enough.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    with unavailable(uri), _CONNECTING:
        _make_database(uri)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def met_another_writer(error: Exception) -> bool:
    """Return whether the error is a conflict: another writer inserted the row that MLflow was about to insert.

    The message of MLflow or its server then contains SQLAlchemy's code for an integrity error, which is the same for
    every database. On a retry MLflow finds the row.
    """
    import sqlalchemy

    return f"/{sqlalchemy.exc.IntegrityError.code}" in str(error)


@contextlib.contextmanager
def unavailable(uri: str) -> Iterator[None]:
    """Convert MLflow's errors for an unreachable server or a locked database into one error.

    Errors with a code in `REFUSALS` pass through unchanged, since sending the request again would not help.

    Raises:
        TrackingUnavailableError: The server or database is unavailable at the moment.
    """
    import sqlalchemy
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
        if isinstance(error, MlflowException) and error.error_code in REFUSALS:
            raise
        # MLflow's message quotes the address, including user and password.
        text = " ".join(without_secrets(str(error).replace(uri, without_secrets(uri))).split())
        why = "is locked by another process" if "database is locked" in text else f"does not answer ({text[:200]})"
        raise TrackingUnavailableError(f"{without_secrets(uri)}: {why}.") from error


def _make_database(uri: str) -> None:
    """Create a missing sqlite database atomically, safe against other processes that do the same or are killed."""
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder:
        made = Path(folder) / "mlflow.db"
        SqlAlchemyStore(f"{SQLITE}{made}", str(path.parent / "mlartifacts")).engine.dispose()
        # A link, unlike a rename, never replaces a database that another process has created and uses.
        with contextlib.suppress(FileExistsError):
            os.link(made, path)


def experiment_id(client: MlflowClient, name: str) -> str:
    """Return the id of the experiment `name`; create a missing one, even if other processes do the same.

    Artifacts are stored in `mlartifacts` next to a sqlite file; a server chooses its own location.

    Raises:
        TrackingUnavailableError: The experiment is deleted; its name stays taken until it is restored or purged.
    """
    from mlflow.exceptions import MlflowException

    uri = client.tracking_uri
    found = client.get_experiment_by_name(name)
    if found is None:
        artifacts = Path(uri.removeprefix(SQLITE)).resolve().parent / "mlartifacts" if uri.startswith(SQLITE) else None
        try:
            return client.create_experiment(name, artifact_location=artifacts.as_uri() if artifacts else None)
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingUnavailableError(
            f"{without_secrets(uri)}: its experiment {name!r} is deleted.",
            f"Restore it (mlflow experiments restore --experiment-id {found.experiment_id}), or set "
            "tracking.experiment to another name.",
        )
    return found.experiment_id

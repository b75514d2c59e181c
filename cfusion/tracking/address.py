"""Where runs are tracked: the address, the sqlite file behind the default one, and what its errors mean."""

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
from urllib.parse import urlsplit, urlunsplit

from cfusion.config import TrackingConfig
from cfusion.errors import CfusionError, ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"

_CONNECTING = threading.Lock()
"""Alembic, with which MLflow makes and checks a database, keeps its state in globals: one thread at a time."""

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow's own limits (7 retries of 120 s) would let a server that hangs hold a run for a quarter of an hour.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}

REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"})
"""MLflow's codes for what a server understood and will never take; all others are worth another try."""


class TrackingUnavailableError(CfusionError):
    """The tracking server or database does not take anything now."""

    topic = "network"


def tracking_uri(tracking: TrackingConfig, output: Path) -> str:
    """The configured server, else `MLFLOW_TRACKING_URI`, else a sqlite file beside the run's folder.

    Raises:
        ConfigError: It is an address that MLflow has no store for.
    """
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{(output.parent / 'mlflow.db').resolve()}"
    return checked_uri(uri)


def given_uri(uri: str | None) -> str:
    """The address given on the command line, else `MLFLOW_TRACKING_URI`, of a registry that is read.

    Raises:
        ConfigError: Neither is given, or no database is there.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise ConfigError(
            "Which registry? No tracking server is given.",
            "Give --uri, such as sqlite:///runs/mlflow.db, or set MLFLOW_TRACKING_URI.",
        )
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        raise ConfigError(f"{uri}: there is no such database.", "A sweep's is mlflow.db in the folder of its runs.")
    return checked_uri(uri)


def checked_uri(uri: str) -> str:
    """`uri`, if MLflow can have a tracking store there.

    Raises:
        ConfigError: It cannot; a folder of files, MLflow's old store, is among those.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme not in ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks"):
        raise ConfigError(
            f"tracking.uri={uri!r}: expected http(s)://HOST, sqlite:///FILE or another SQL database.",
            "MLflow keeps no runs in plain folders any more.",
        )
    return uri


def public_name(uri: str) -> str:
    """The address without the user and password it may carry."""
    parts = urlsplit(uri)
    if parts.username is None and parts.password is None:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def connect(uri: str) -> MlflowClient:
    """A client of the server or database; a sqlite file is made where it is missing.

    Raises:
        TrackingUnavailableError: The database cannot be opened now.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # MLflow logs a database error with its traceback and raises it as well; the one line of ours is enough.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    with unavailable(uri), _CONNECTING:
        _make_database(uri)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def met_another_writer(error: Exception) -> bool:
    """Whether another writer made the row that MLflow looked for, did not find and was about to make itself.

    The database then refuses the second row; MLflow, or its server, tells it with the code by which SQLAlchemy names
    such a refusal for every database. Asked again, MLflow finds the row.
    """
    import sqlalchemy

    return f"/{sqlalchemy.exc.IntegrityError.code}" in str(error)


@contextlib.contextmanager
def unavailable(uri: str) -> Iterator[None]:
    """Turn what MLflow raises for a server that is away, or a database that is locked, into one error.

    What the server understood and refused passes through: sending it again would not help.

    Raises:
        TrackingUnavailableError: The block met a server or database that does not take anything now.
    """
    import sqlalchemy
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
        if isinstance(error, MlflowException) and error.error_code in REFUSALS:
            raise
        # MLflow quotes the address it asked, user and password included.
        text = " ".join(str(error).replace(uri, public_name(uri)).split())
        why = "is locked by another process" if "database is locked" in text else f"does not answer ({text[:200]})"
        raise TrackingUnavailableError(f"{public_name(uri)}: {why}.") from error


def _make_database(uri: str) -> None:
    """Make the sqlite database where it is missing: whole, whoever else does the same or is killed doing it."""
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder:
        made = Path(folder) / "mlflow.db"
        SqlAlchemyStore(f"{SQLITE}{made}", str(path.parent / "mlartifacts")).engine.dispose()
        # A link, unlike a rename, never takes the place of a database that another process has made and uses.
        with contextlib.suppress(FileExistsError):
            os.link(made, path)


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment of that name; it is made where it is missing, by whichever process comes first.

    A sqlite file keeps artifacts in `mlartifacts` beside it, a server where it says.

    Raises:
        TrackingUnavailableError: It was deleted, which keeps its name until it is restored or gone for good.
    """
    from mlflow.exceptions import MlflowException

    uri = client.tracking_uri
    found = client.get_experiment_by_name(name)
    if found is None:
        beside = Path(uri.removeprefix(SQLITE)).resolve().parent / "mlartifacts" if uri.startswith(SQLITE) else None
        try:
            return client.create_experiment(name, artifact_location=beside.as_uri() if beside else None)
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingUnavailableError(
            f"{public_name(uri)}: its experiment {name!r} is deleted.",
            f"Restore it (mlflow experiments restore --experiment-id {found.experiment_id}), or name another in "
            "tracking.experiment.",
        )
    return found.experiment_id

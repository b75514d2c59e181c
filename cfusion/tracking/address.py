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
from urllib.parse import unquote, urlsplit

from cfusion.config import TrackingConfig
from cfusion.errors import CfusionError, ConfigError
from cfusion.secret_text import without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

SQLITE = "sqlite:///"

_CONNECTING = threading.Lock()
"""Alembic, which MLflow uses to create and check a database, keeps its state in globals: one thread at a time."""

TIMEOUT_VARIABLE = "MLFLOW_HTTP_REQUEST_TIMEOUT"
"""Seconds that a request to a server may take."""

_STORING_SECONDS = "120"
"""Value of that variable while files are sent."""

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow would print the address of a run with its password.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow's default limits (7 retries of 120 s) would let a hanging server block a run for a quarter of an hour.
    TIMEOUT_VARIABLE: "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}

_STORES = ("botocore", "boto3", "google.", "azure.")
"""Beginnings of the modules whose errors are those of a store of files."""

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
    if scheme == "sqlite" and set(uri) & set("?%"):
        raise ConfigError(
            f"{uri}: MLflow cannot use a database whose path has a ? or %.",
            "Rename the folder, or set tracking.uri to a database elsewhere.",
        )
    return uri


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Within the block, give the server time to store files, unless the user has set how long a request may take."""
    if os.environ.get(TIMEOUT_VARIABLE) != _QUIET[TIMEOUT_VARIABLE]:
        yield
        return
    os.environ[TIMEOUT_VARIABLE] = _STORING_SECONDS
    try:
        yield
    finally:
        os.environ[TIMEOUT_VARIABLE] = _QUIET[TIMEOUT_VARIABLE]


def client_class() -> type[MlflowClient]:
    """Import MLflow, which takes seconds, and return its client."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient


def connect(uri: str) -> MlflowClient:
    """Return a client of the server or database; create a missing sqlite file.

    Raises:
        TrackingUnavailableError: The database cannot be opened at the moment.
    """
    client = client_class()
    # MLflow logs a database error with its traceback and also raises it; the one line from us is enough.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    with unavailable(uri), _CONNECTING:
        _make_database(uri)
        _follow_move(uri)
        return client(tracking_uri=uri, registry_uri=uri)


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
    except CfusionError:
        raise
    except Exception as error:
        known = (MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError, ImportError)
        # A store's own errors, such as that there are no credentials, come from the store's library.
        if not isinstance(error, known) and not type(error).__module__.startswith(_STORES):
            raise
        if isinstance(error, MlflowException) and error.error_code in REFUSALS:
            raise
        # MLflow's message quotes the address, including user and password.
        text = " ".join(without_secrets(str(error).replace(uri, without_secrets(uri))).split())
        raise TrackingUnavailableError(f"{without_secrets(uri)}: {_why(error, text[:200])}.", _remedy(text)) from error


def _why(error: Exception, text: str) -> str:
    if "database is locked" in text:
        return "is locked by another process"
    if isinstance(error, ImportError) or type(error).__module__.startswith(_STORES):
        return f"its store of files cannot be used from here ({text})"
    if isinstance(error, FileNotFoundError) or "No such artifact" in text:
        return f"files of the run are not where it says ({text})"
    return f"does not answer ({text})"


def _remedy(text: str) -> str:
    if "timed out" in text.lower():
        return f"If the server is only slow, set {TIMEOUT_VARIABLE} to more seconds."
    package = next((name for name in ("boto3", "google", "azure") if f"'{name}" in text or f"named {name}" in text), "")
    if package:
        name = {"google": "google-cloud-storage", "azure": "azure-storage-blob"}.get(package, package)
        return f"Install it with: pip install {name}"
    if "redential" in text:
        return (
            "Give credentials of the store in the environment, such as AWS_ACCESS_KEY_ID, or start the server with "
            "--serve-artifacts, which stores files itself."
        )
    return ""


def _make_database(uri: str) -> None:
    """Create a missing sqlite database atomically, safe against other processes that do the same or are killed."""
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder:
        made = Path(folder) / "mlflow.db"
        SqlAlchemyStore(f"{SQLITE}{made}", str(_artifacts_of(path))).engine.dispose()
        # A link, unlike a rename, never replaces a database that another process has created and uses.
        with contextlib.suppress(FileExistsError):
            os.link(made, path)


def _artifacts_of(database: Path) -> Path:
    """Return the folder of the files that belong to a sqlite database."""
    return database.resolve().parent / "mlartifacts"


_PLACES = (
    ("experiments", "artifact_location"), ("runs", "artifact_uri"), ("model_versions", "source"),
    ("model_versions", "storage_location"), ("logged_models", "artifact_location"),
)  # fmt: skip
"""Columns of MLflow's database that hold the complete path of files."""


def _follow_move(uri: str) -> None:
    """After a sqlite database was moved with the folder of its files, replace the old paths of the files in it.

    MLflow stores complete paths, would not find the files, and would put new ones into the old folder.
    """
    database = Path(uri.removeprefix(SQLITE))
    here = _artifacts_of(database)
    if not uri.startswith(SQLITE) or not here.is_dir():
        return
    with contextlib.closing(sqlite3.connect(database, timeout=10)) as connection, connection:
        locations = {text for (text,) in connection.execute("select artifact_location from experiments") if text}
        for old in sorted(locations - {here.as_uri(), str(here)}):
            folder = Path(unquote(urlsplit(old).path))
            if folder.name != here.name or folder.exists() or not old.startswith(("file:", "/")):
                continue
            new = here.as_uri() if old.startswith("file:") else str(here)
            logger.info("%s: its files were moved with it from %s", database, folder)
            for table, column in _PLACES:
                if not connection.execute(
                    "select 1 from pragma_table_info(?) where name = ?", (table, column)
                ).fetchone():
                    continue
                connection.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) where {column} = ? "  # noqa: S608 - names above
                    f"or substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
                )


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
        artifacts = _artifacts_of(Path(uri.removeprefix(SQLITE))) if uri.startswith(SQLITE) else None
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

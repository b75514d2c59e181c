"""The one door to MLflow: what a run was, how it went, and the registered model."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfusion.config import TrackingConfig
from cfusion.errors import CfusionError

if TYPE_CHECKING:
    from mlflow.entities import Metric

FLUSH_SECONDS = 5.0
"""Metrics are sent in batches this long apart, so that a short epoch does not wait for the server."""

SERVED_MODEL = Path(__file__).with_name("serving.py")


class TrackedRun:
    """One MLflow run, or nothing at all where tracking is off: the calls are the same.

    Args:
        tracking: Where to.
        output: Folder of the run; the default database lies in it.
        name: Name of the run.
        params: Flat parameters.
        parent: The run this one belongs to.
    """

    def __init__(
        self,
        tracking: TrackingConfig,
        output: Path,
        name: str,
        params: Mapping[str, Any],
        parent: TrackedRun | None = None,
    ) -> None:
        self.tracking = tracking
        self.output = output
        self.run_id: str | None = None
        self._pending: list[Metric] = []
        self._sent = time.monotonic()
        if not tracking.enabled:
            return
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = tracking_uri(tracking, output)
        _make_database(uri)
        self._client = MlflowClient(tracking_uri=uri)
        tags = {"mlflow.runName": name}
        if parent is not None and parent.run_id is not None:
            tags["mlflow.parentRunId"] = parent.run_id
        run = self._client.create_run(_experiment_id(self._client, tracking.experiment, output), tags=tags)
        self.run_id = run.info.run_id
        self._client.log_batch(self.run_id, params=[Param(k, str(v)[:6000]) for k, v in params.items()])

    def child(self, name: str, params: Mapping[str, Any]) -> TrackedRun:
        """A run below this one."""
        return TrackedRun(self.tracking, self.output, name, params, parent=self)

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record metrics; they are sent now and then, and by `close`."""
        if self.run_id is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        if time.monotonic() - self._sent > FLUSH_SECONDS:
            self._flush()

    def artifacts(self, folder: Path) -> None:
        """Keep the files of `folder` with the run."""
        if self.run_id is not None:
            self._client.log_artifacts(self.run_id, str(folder))

    def artifact(self, file: Path) -> None:
        """Keep one file with the run."""
        if self.run_id is not None:
            self._client.log_artifact(self.run_id, str(file))

    def close(self, status: str = "FINISHED") -> None:
        """Send what is pending and end the run as FINISHED, FAILED or KILLED."""
        self._flush()
        if self.run_id is not None:
            self._client.set_terminated(self.run_id, status)

    def _flush(self) -> None:
        if self.run_id is None:
            return
        pending, self._pending = self._pending, []
        for start in range(0, len(pending), 1000):
            self._client.log_batch(self.run_id, metrics=pending[start : start + 1000])
        self._sent = time.monotonic()


def tracking_uri(tracking: TrackingConfig, output: Path) -> str:
    """The configured server, else `MLFLOW_TRACKING_URI`, else a sqlite file beside the run's folder."""
    return (
        tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(output.parent / 'mlflow.db').resolve()}"
    )


def _make_database(uri: str) -> None:
    """Make the sqlite database where it is missing: whole, whoever else does the same or is killed doing it."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder:
        made = Path(folder) / "mlflow.db"
        SqlAlchemyStore(f"sqlite:///{made}", str(path.parent / "mlartifacts")).engine.dispose()
        # A link, unlike a rename, never takes the place of a database that another process has made and uses.
        with contextlib.suppress(FileExistsError):
            os.link(made, path)


def _experiment_id(client: Any, name: str, output: Path) -> str:
    """The experiment of that name; it is made where it is missing, by whichever process comes first."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            local = client.tracking_uri.startswith("sqlite")
            artifacts = (output.parent / "mlartifacts").resolve().as_uri() if local else None
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def register_ensemble(run: TrackedRun, folds: Path, name: str, alias: str) -> str:
    """Register the fold models below `folds` as one served model and point `alias` at the new version.

    Args:
        run: The finished parent run that the model belongs to.
        folds: Folder whose sub-folders hold `model.json` and `model.safetensors`.
        name: Name in the registry.
        alias: Alias for the new version.

    Returns:
        The version.

    Raises:
        CfusionError: Tracking is off.
    """
    if run.run_id is None:
        raise CfusionError("tracking.register_as needs tracking.enabled=true.")
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from cfusion.prediction import FoldEnsemble
    from cfusion.types import magnification_name

    card = FoldEnsemble.load(folds).models[0].card
    names = [magnification_name(m) for m in card.magnifications]
    schema = Schema([TensorSpec(np.dtype("float32"), (-1, card.backbone_dim), n) for n in names])
    mlflow.set_tracking_uri(tracking_uri(run.tracking, run.output))
    with mlflow.start_run(run_id=run.run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(SERVED_MODEL),
            artifacts={"folds": str(folds)},
            signature=ModelSignature(inputs=schema),
            registered_model_name=name,
            metadata={"encoder": card.encoder, "cohort": card.cohort, "endpoint": card.endpoint},
            pip_requirements=["cfusion"],
        )
    version = str(logged.registered_model_version)
    run._client.set_registered_model_alias(name, alias, version)
    return version

"""Load a fold ensemble by its name: a registered model, or the folder of a run or a fold."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.apply.ranking import RunRanking, run_ranking
from cfusion.run_folder import check_all_models, find_run
from cfusion.tracking.address import connect, given_uri, unavailable
from cfusion.tracking.model_registry import fetch_ensemble, fetch_predictions, model_address


def load_ensemble(model: str, uri: str | None = None, trust_code: str | None = None) -> FoldEnsemble:
    """Load the models that `--model` names.

    Args:
        model: models:/NAME@ALIAS, models:/NAME/VERSION, the folder of a finished run, or that of one fold.
        uri: MLflow server; None: MLFLOW_TRACKING_URI.
        trust_code: Digest of the code in the model that may run.

    Raises:
        ConfigError: The name is not an address in the registry, or no registry is configured.
        DataError: There is no such model, its run is not finished, or the folder holds models of several runs.
        UntrustedCodeError: The models include code, and `trust_code` does not match it.
    """
    if not model.startswith("models:"):
        return _load_finished(Path(model), trust_code)
    name, which = model_address(model)
    address = given_uri(uri)
    client = connect(address)
    with tempfile.TemporaryDirectory() as scratch, unavailable(address):
        return fetch_ensemble(client, name, which, Path(scratch), trust_code=trust_code)


def load_ranking(model: str, uri: str | None = None) -> RunRanking | None:
    """Test how the run of the models that `--model` names ranks held-out patients; None if it has no predictions.

    Args:
        model: See `load_ensemble`.
        uri: MLflow server; None: MLFLOW_TRACKING_URI.
    """
    if not model.startswith("models:"):
        return run_ranking(find_run(Path(model)))
    address = given_uri(uri)
    client = connect(address)
    with tempfile.TemporaryDirectory() as scratch, unavailable(address):
        return run_ranking(fetch_predictions(client, *model_address(model), Path(scratch)))


def _load_finished(folder: Path, trust_code: str | None) -> FoldEnsemble:
    check_all_models(find_run(folder))
    return FoldEnsemble.load(folder, trust_code=trust_code)

"""Register fold ensembles as versions of a served model in MLflow's registry, and list and fetch them."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfusion.apply.ensemble import FoldEnsemble, mean_cutoff
from cfusion.config import Config
from cfusion.data.shard_index import ShardIndex
from cfusion.errors import ConfigError, DataError, UntrustedCodeError
from cfusion.run_folder import CONFIG, PREDICTIONS, fold_models
from cfusion.tracking.address import TrackingUnavailableError, connect, tracking_uri, unavailable
from cfusion.training.fitted import ModelCard
from cfusion.types import magnification_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

logger = logging.getLogger(__name__)

SERVED_MODEL = Path(__file__).parents[1] / "apply" / "serving.py"
CANDIDATE, CHAMPION = "candidate", "champion"
MODEL_PATH, FOLDS = "model", "folds"
_FOLDS_PATH = f"{MODEL_PATH}/artifacts/{FOLDS}"
_TAG = "cfusion."


@dataclass(frozen=True)
class Contract:
    """The inputs of a registered model; all versions of a name have the same.

    Attributes:
        encoder: Encoder of the embeddings.
        dim: Width of the embeddings.
        magnifications: Names, finest first.
    """

    encoder: str
    dim: int
    magnifications: tuple[str, ...]

    @classmethod
    def of(cls, card: ModelCard) -> Contract:
        """Return the inputs of a card's model."""
        return cls(card.encoder, card.backbone_dim, tuple(magnification_name(m) for m in card.magnifications))

    def __str__(self) -> str:
        return f"{self.encoder}, {self.dim} wide, at {', '.join(self.magnifications)}"


def check_name(client: MlflowClient, name: str, contract: Contract) -> None:
    """Reject a name whose versions have other inputs.

    Raises:
        ConfigError: The inputs differ; the message names both.
    """
    newest = _newest(client, name)
    if newest is None:
        return
    taken = newest.tags.get(f"{_TAG}contract", "a model that cfusion did not register")
    if taken != str(contract):
        raise ConfigError(
            f"tracking.register_as={name}: the registry has a model of that name that reads {taken}; this one reads "
            f"{contract}.",
            "Use another name.",
        )


def check_registration(config: Config, name: str, index: ShardIndex) -> None:
    """Check the name to register under before a training, so that its model can be registered afterwards.

    Raises:
        ConfigError: The name belongs to a model that reads other embeddings.
    """
    names = tuple(magnification_name(m) for m in config.data.magnifications)
    uri = tracking_uri(config.tracking, config.output)
    try:
        client = connect(uri)
        with unavailable(uri):
            check_name(client, name, Contract(index.encoder, index.dim, names))
    except TrackingUnavailableError as error:
        logger.warning("%s The name %s is checked when the server answers.", error.message, name)


def register_ensemble(client: MlflowClient, run_id: str, folder: Path, name: str, about: Mapping[str, str]) -> str:
    """Register the fold models in `folder` as one served model; the newest version has the alias `candidate`.

    A run's model is registered only once; later calls return the existing version.

    Args:
        client: Client of the server.
        run_id: The MLflow run it belongs to, which stores its files.
        folder: Folder whose sub-folders contain `model.json` and `model.safetensors`.
        name: Name in the registry.
        about: Tags of the version: cohort, protocol, score.

    Returns:
        The number of the version.

    Raises:
        ConfigError: The name belongs to a model that reads other embeddings.
        DataError: There are no fold models.
    """
    cards = FoldEnsemble.cards(folder)
    check_name(client, name, Contract.of(cards[0]))
    known = client.search_model_versions(f"name='{_quoted(name)}' and run_id='{run_id}'")
    version = str(known[0].version) if known else _new_version(client, run_id, cards, folder, name, about)
    newest = _newest(client, name)
    if newest is not None and str(newest.version) == version:
        client.set_registered_model_alias(name, CANDIDATE, version)
    return version


def _new_version(
    client: MlflowClient, run_id: str, cards: Sequence[ModelCard], folder: Path, name: str, about: Mapping[str, str]
) -> str:
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as scratch:
        _save_served(cards, folder, Path(scratch))
        client.log_artifacts(run_id, str(Path(scratch) / MODEL_PATH), MODEL_PATH)
    with contextlib.suppress(MlflowException):  # the name exists, or another process has just created it
        client.create_registered_model(name)
    facts = {**about, "contract": str(Contract.of(cards[0]))}
    if cards[0].code is not None:
        facts["code_sha256"] = cards[0].code["sha256"]
    tags = {f"{_TAG}{key}": value for key, value in facts.items()}
    source = f"{client.get_run(run_id).info.artifact_uri}/{MODEL_PATH}"
    return str(client.create_model_version(name, source, run_id, tags=tags).version)


def _newest(client: MlflowClient, name: str) -> ModelVersion | None:
    found = client.search_model_versions(f"name='{_quoted(name)}'", max_results=1, order_by=["version_number DESC"])
    return found[0] if found else None


def _save_served(cards: Sequence[ModelCard], folder: Path, scratch: Path) -> None:
    """Write the model in MLflow's format: fold models, `serving.py`, signature, input example and metadata."""
    import mlflow.pyfunc

    folds = scratch / FOLDS
    for path in fold_models(folder):
        shutil.copytree(path, folds / path.relative_to(folder))
    card = cards[0]
    example = {
        magnification_name(m): np.zeros((count, card.backbone_dim), np.float32)
        for m, count in zip(card.magnifications, (16, 4, 1), strict=False)
    }
    # MLflow warns that it cannot infer a signature from type hints, although one is given. It sets its own warning
    # filter, so the warning must be recorded, not ignored.
    with warnings.catch_warnings(record=True):
        mlflow.pyfunc.save_model(
            path=str(scratch / MODEL_PATH),
            python_model=str(SERVED_MODEL),
            artifacts={FOLDS: str(folds)},
            signature=_signature(card),
            input_example=example,
            metadata=_metadata(cards),
            pip_requirements=["cfusion"],
        )


def _signature(card: ModelCard) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    inputs: list[ColSpec | TensorSpec] = [
        TensorSpec(np.dtype("float32"), (-1, card.backbone_dim), magnification_name(m)) for m in card.magnifications
    ]
    outputs: list[ColSpec | TensorSpec] = [
        *(ColSpec("double", name) for name in ("months", "survival", "risk", "risk_sd")),
        ColSpec("long", "unseen_folds"),
    ]
    of_cohort = [ParamSpec("cohort", "string", "")] if card.strata else []
    params = ParamSchema([ParamSpec("positions", "string", ""), ParamSpec("slide", "string", ""), *of_cohort])
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs), params=params)


def _metadata(cards: Sequence[ModelCard]) -> dict[str, Any]:
    card = cards[0]
    return {
        "encoder": {"name": card.encoder, "dim": card.backbone_dim, **card.embeddings},
        "magnifications": list(card.magnifications),
        "cohort": card.cohort,
        "endpoint": card.endpoint,
        "model": card.model["name"],
        "risk_cutoff": mean_cutoff(cards),
        "edges_months": {f"fold_{card.fold}": list(card.edges_months) for card in cards},
        **({} if card.code is None else {"model_code": card.code}),
    }


def find_version(client: MlflowClient, name: str, which: str) -> ModelVersion:
    """Return a version by its number or alias.

    Raises:
        DataError: The registry has no such version.
    """
    from mlflow.exceptions import MlflowException

    try:
        if which.isdigit():
            return client.get_model_version(name, which)
        return client.get_model_version_by_alias(name, which)
    except MlflowException as error:
        raise DataError(
            f"The registry has no version {which} of a model {name} ({' '.join(str(error).split())[:120]}).",
            "Run cfusion registry list to see the registered versions.",
        ) from error


def model_address(text: str) -> tuple[str, str]:
    """Return the name, and the version or alias, of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        ConfigError: The address has neither form.
    """
    found = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", text)
    if found is None:
        raise ConfigError(f"--model {text}: expected models:/NAME@ALIAS or models:/NAME/VERSION.")
    return found[1], found[2] or found[3]


def fetch_ensemble(
    client: MlflowClient, name: str, which: str, folder: Path, *, trust_code: str | None = None
) -> FoldEnsemble:
    """Download a version of a registered model into `folder` and load it as a fold ensemble.

    Only the fold models are downloaded: cards as JSON and weights as safetensors; nothing is unpickled. If the models
    were trained with a user's code, it is downloaded too, and runs only if `trust_code` gives its digest.

    Raises:
        DataError: There is no such version, or it is not a fold ensemble.
        UntrustedCodeError: The models include code, and `trust_code` does not give its digest.
    """
    version = find_version(client, name, which)
    fetched = _download(client, name, version, folder)
    try:
        return FoldEnsemble.load(fetched, trust_code=trust_code)
    except UntrustedCodeError as error:
        raise UntrustedCodeError(
            f"models:/{name}/{version.version}: {error.message}",
            f"Read the file first: mlflow artifacts download --run-id {version.run_id} --artifact-path {_FOLDS_PATH} "
            "--dst-path FOLDER. If you trust it, add --trust-code with the first 12 digits of its SHA-256.",
        ) from error


def fetch_predictions(client: MlflowClient, name: str, which: str, folder: Path) -> Path:
    """Download predictions and settings of a version's run into `folder`, as far as it has them, and return `folder`.

    Raises:
        DataError: There is no such version.
    """
    run_id = str(find_version(client, name, which).run_id)
    for wanted in {artifact.path for artifact in client.list_artifacts(run_id)} & {PREDICTIONS, CONFIG}:
        client.download_artifacts(run_id, wanted, str(folder))
    return folder


def fetch_models(client: MlflowClient, name: str, which: str, folder: Path) -> Path:
    """Download the fold models of a version into `folder`, and return the folder that holds them; none is loaded.

    Raises:
        DataError: There is no such version, or cfusion did not register it.
    """
    return _download(client, name, find_version(client, name, which), folder)


def _download(client: MlflowClient, name: str, version: ModelVersion, folder: Path) -> Path:
    if f"{_TAG}contract" not in version.tags:
        raise DataError(f"models:/{name}/{version.version}: was not registered by cfusion.")
    folder.mkdir(parents=True, exist_ok=True)
    return Path(client.download_artifacts(str(version.run_id), _FOLDS_PATH, str(folder)))


@dataclass(frozen=True)
class Registered:
    """A version in the registry.

    Attributes:
        name: Name of the registered model.
        version: Number of the version.
        aliases: Its aliases, such as candidate and champion.
        tags: Its tags without prefix: contract, cohort, protocol, cindex, low, high.
    """

    name: str
    version: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]


def list_versions(client: MlflowClient) -> list[Registered]:
    """List all versions that cfusion registered, sorted by name, newest first."""
    found = []
    for model in _pages(client.search_registered_models):
        names_of: dict[str, list[str]] = {}
        for alias, version in model.aliases.items():
            names_of.setdefault(str(version), []).append(alias)
        for version in _pages(client.search_model_versions, f"name='{_quoted(model.name)}'"):
            tags = {k.removeprefix(_TAG): v for k, v in version.tags.items() if k.startswith(_TAG)}
            if tags:
                aliases = tuple(sorted(names_of.get(str(version.version), [])))
                found.append(Registered(model.name, str(version.version), aliases, tags))
    return sorted(found, key=lambda r: (r.name, -int(r.version)))


def _pages(search: Any, *arguments: str) -> list[Any]:
    found, token = [], None
    while True:
        page = search(*arguments, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _quoted(name: str) -> str:
    """Check a name for use in a search filter.

    Raises:
        ConfigError: It contains a character that a filter or an address cannot represent.
    """
    if not name or set(name) & set("'\"/:@%") or json.dumps(name)[1:-1] != name:
        raise ConfigError(f"{name!r}: is not a valid name for a registered model.", "Use letters, digits, - and _.")
    return name

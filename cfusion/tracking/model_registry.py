"""The model registry: fold ensembles as versions of a served model, and which of them is the champion."""

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
from cfusion.run_folder import fold_models
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
_TAG = "cfusion."


@dataclass(frozen=True)
class Contract:
    """What a registered model reads; all versions of a name read the same.

    Attributes:
        encoder: Encoder of the embeddings.
        dim: Their width.
        magnifications: Names, finest first.
    """

    encoder: str
    dim: int
    magnifications: tuple[str, ...]

    @classmethod
    def of(cls, card: ModelCard) -> Contract:
        """What the model of a card reads."""
        return cls(card.encoder, card.backbone_dim, tuple(magnification_name(m) for m in card.magnifications))

    def __str__(self) -> str:
        return f"{self.encoder}, {self.dim} wide, at {', '.join(self.magnifications)}"


def check_name(client: MlflowClient, name: str, contract: Contract) -> None:
    """Refuse a name whose versions read something else.

    Raises:
        ConfigError: They do; both are named.
    """
    newest = _newest(client, name)
    if newest is None:
        return
    taken = newest.tags.get(f"{_TAG}contract", "a model that cfusion did not register")
    if taken != str(contract):
        raise ConfigError(
            f"tracking.register_as={name}: the registry has a model of that name that reads {taken}; this one reads "
            f"{contract}.",
            "Give another name.",
        )


def check_registration(config: Config, index: ShardIndex) -> None:
    """Refuse `tracking.register_as` before a training that could not be registered under it.

    Raises:
        ConfigError: The name belongs to a model that reads other embeddings.
    """
    tracking = config.tracking
    if not (tracking.enabled and tracking.register_as):
        return
    names = tuple(magnification_name(m) for m in config.data.magnifications)
    uri = tracking_uri(tracking, config.output)
    try:
        client = connect(uri)
        with unavailable(uri):
            check_name(client, tracking.register_as, Contract(index.encoder, index.dim, names))
    except TrackingUnavailableError as error:
        logger.warning("%s Whether %s is free will show when it answers.", error.message, tracking.register_as)


def register_ensemble(client: MlflowClient, run_id: str, folder: Path, name: str, about: Mapping[str, str]) -> str:
    """Register the fold models below `folder` as one served model, with the alias `candidate` while none is newer.

    A run's model is registered once: asked again, its version is given.

    Args:
        client: Of the server.
        run_id: The MLflow run it belongs to, which keeps its files.
        folder: Folder whose sub-folders hold `model.json` and `model.safetensors`.
        name: Name in the registry.
        about: Tags of the version: cohort, protocol, score.

    Returns:
        The version.

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
    with contextlib.suppress(MlflowException):  # another process may have made the name meanwhile
        client.create_registered_model(name)
    told = {**about, "contract": str(Contract.of(cards[0]))}
    if cards[0].code is not None:
        told["code_sha256"] = cards[0].code["sha256"]
    tags = {f"{_TAG}{key}": value for key, value in told.items()}
    source = f"{client.get_run(run_id).info.artifact_uri}/{MODEL_PATH}"
    return str(client.create_model_version(name, source, run_id, tags=tags).version)


def _newest(client: MlflowClient, name: str) -> ModelVersion | None:
    found = client.search_model_versions(f"name='{_quoted(name)}'", max_results=1, order_by=["version_number DESC"])
    return found[0] if found else None


def _save_served(cards: Sequence[ModelCard], folder: Path, scratch: Path) -> None:
    """Write the model as MLflow serves it: the fold models, `serving.py`, signature, example and what it reads."""
    import mlflow.pyfunc

    folds = scratch / FOLDS
    for path in fold_models(folder):
        shutil.copytree(path, folds / path.relative_to(folder))
    card = cards[0]
    example = {
        magnification_name(m): np.zeros((count, card.backbone_dim), np.float32)
        for m, count in zip(card.magnifications, (16, 4, 1), strict=False)
    }
    # MLflow asks for annotations to infer a signature from; this one is given. Recorded, since it sets its own filter.
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
        ColSpec("double", name) for name in ("months", "survival", "risk", "risk_sd")
    ]
    params = ParamSchema([ParamSpec("positions", "string", "")])
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
    """A version by its number or alias.

    Raises:
        DataError: The registry has none such.
    """
    from mlflow.exceptions import MlflowException

    try:
        if which.isdigit():
            return client.get_model_version(name, which)
        return client.get_model_version_by_alias(name, which)
    except MlflowException as error:
        raise DataError(
            f"The registry has no version {which} of a model {name} ({' '.join(str(error).split())[:120]}).",
            "cfusion registry list shows what there is.",
        ) from error


def model_address(text: str) -> tuple[str, str]:
    """Name, and version or alias, of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        ConfigError: It is neither.
    """
    found = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", text)
    if found is None:
        raise ConfigError(f"--model {text}: expected models:/NAME@ALIAS or models:/NAME/VERSION.")
    return found[1], found[2] or found[3]


def fetch_ensemble(
    client: MlflowClient, name: str, which: str, folder: Path, *, trust_code: str | None = None
) -> FoldEnsemble:
    """The fold ensemble that is a version of a registered model, its files put into `folder`.

    Only the fold models are fetched: cards as JSON and weights as safetensors; nothing is unpickled. Code that the
    models were trained with is fetched with them, and runs only where `trust_code` names its digest.

    Raises:
        DataError: There is no such version, or it is no fold ensemble.
        UntrustedCodeError: The models come with code of their own, and `trust_code` does not name it.
    """
    version = find_version(client, name, which)
    if f"{_TAG}contract" not in version.tags:
        raise DataError(f"models:/{name}/{version.version}: is not a model that cfusion registered.")
    folder.mkdir(parents=True, exist_ok=True)
    where = f"{MODEL_PATH}/artifacts/{FOLDS}"
    fetched = Path(client.download_artifacts(str(version.run_id), where, str(folder)))
    try:
        return FoldEnsemble.load(fetched, trust_code=trust_code)
    except UntrustedCodeError as error:
        raise UntrustedCodeError(
            f"models:/{name}/{version.version}: {error.message}",
            f"Read the file first: mlflow artifacts download --run-id {version.run_id} --artifact-path {where} "
            "--dst-path FOLDER. If you trust it, add --trust-code with the first 12 digits of its SHA-256.",
        ) from error


@dataclass(frozen=True)
class Registered:
    """A version in the registry.

    Attributes:
        name: Its model.
        version: Its number.
        aliases: Such as candidate and champion.
        tags: What is told of it: contract, cohort, protocol, cindex, low, high.
    """

    name: str
    version: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]


def list_versions(client: MlflowClient) -> list[Registered]:
    """All versions that cfusion registered, by name, newest first."""
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
    """A name within a filter.

    Raises:
        ConfigError: It holds what a filter or an address cannot carry.
    """
    if not name or set(name) & set("'\"/:@%") or json.dumps(name)[1:-1] != name:
        raise ConfigError(f"{name!r}: is not a name for a registered model.", "Use letters, digits, - and _.")
    return name

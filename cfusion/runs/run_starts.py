"""Reads the models that the folds of a run start from, also registered ones."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from cfusion.config import Config
from cfusion.errors import ConfigError
from cfusion.run_folder import REGISTRY, fold_models
from cfusion.tracking.address import connect, given_uri, tracking_uri, unavailable
from cfusion.tracking.model_registry import fetch_models, model_address
from cfusion.training.start import StartModel, read_starts


def run_starts(config: Config) -> tuple[StartModel, ...]:
    """Read the models of `train.start_from`: of a folder, or of the registry that tracks the run.

    Raises:
        ConfigError: The address is not one of a registered model, or the registry does not exist.
        DataError: There is no such model, or a file is damaged.
    """
    place = config.train.start_from
    assert place is not None
    if not place.startswith(REGISTRY):
        return read_starts(place)
    try:
        name, which = model_address(place)
    except ConfigError as error:
        raise ConfigError(error.message.replace("--model ", "train.start_from="), error.remedy) from error
    address = given_uri(tracking_uri(config.tracking, config.output))
    client = connect(address)
    with tempfile.TemporaryDirectory() as scratch, unavailable(address):
        fetched = fetch_models(client, name, which, Path(scratch))
        models = [StartModel.read(folder) for folder in fold_models(fetched)]
    return tuple(dataclasses.replace(model, where=f"{place}, fold {model.card.fold}") for model in models)

"""Files in the folder of a run: their names, reading and writing them, and whether the run is done.

The only owner of these names. It is importable without torch, so that a launcher or a status page can read ten thousand
folders. A run's folder has the files below and a folder for each fold, which appears complete or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cfusion.config import Config, validate
from cfusion.errors import DataError
from cfusion.files import check_format, digest_file, read_json, write_json, write_text
from cfusion.locks import HeldError, Holder, held_above, hold, holder, launch_name, named
from cfusion.yaml_files import read_yaml

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

RUN_FORMAT = 1
"""Format of the folder, as `run.json` carries it. A folder without a number was written by 0.1.0 and is read as 1."""

RUN = "run.json"
"""Which run the folder belongs to: `format`, `identity`, `provenance`, and `continued_by` where other code did."""
DONE = "done.json"
"""Marker of a finished run, written last."""
CONFIG = "config.yaml"
"""The configuration, resolved."""
AUDIT = "audit.json"
"""What the audit found, `Audit.to_json()`."""
OUTCOMES = "outcomes.csv"
"""The patients' outcomes, as the run is scored on them."""
COVARIATES = "covariates.csv"
"""The patients' clinical covariates as numbers; missing where the cohort has none."""
SPLITS = "splits"
"""Folder of the folds' patients."""
PREDICTIONS = "predictions.csv"
"""Out-of-fold predictions; in a fold's folder, those of the fold."""
SCORES = "scores.csv"
"""Scores by fold."""
SUMMARY = "summary.csv"
"""Scores of the run."""
FIGURES = "figures"
"""Folder of the figures of the run."""
ENVIRONMENT = "environment"
"""Folder that describes the machine and the installed packages."""
REPORT = "report"
"""Folder of the report of the run."""
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints of unfinished folds."""
GROUP = "group"
"""Checkpoints of folds that are trained together, below `CHECKPOINTS`."""
FOLD = "fold.json"
"""In a fold's folder: `fold` and `best_epoch`."""
HISTORY = "history.csv"
"""In a fold's folder: metrics by epoch."""
MODEL = "model"
"""In a fold's folder: the model's folder."""
SEARCH = "search"
"""Folder of the trials of a search, with a folder for each fold."""
TRIALS = "trials.json"
"""In a fold's folder of a search: the trials."""
LOCK = "run.lock"
"""Lock of the process that trains the run; it names that process."""
REGISTRY = "models:"
"""Beginning of the address of a registered model, which has no folder here."""
CARD = "model.json"
"""In a model's folder: the model card."""
WEIGHTS = "model.safetensors"
"""In a model's folder: the weights."""
SEEN = "training.npz"
"""In a model's folder: digests of the patients it has seen, and the region of their embeddings."""

_FOLD_NAME = re.compile(r"(repeat_\d+_)?fold_\d+")
_SPLIT_NAME = re.compile(r"splits_(?:(?P<repeat>\d+)_)?(?P<fold>\d+)\.csv")
_ANY_FOLD = "*fold_*"
_PREDICTIONS_DIGEST = "predictions_sha256"


@contextlib.contextmanager
def claim(folder: Path, *, nested: bool = False) -> Iterator[tuple[int, ...]]:
    """Lock a run within the block; yields descriptors, and a child process that inherits them holds the lock too.

    A process of the same launch takes over, since torchrun starts it only after the node of the holder is lost.

    Args:
        folder: The run's folder.
        nested: Accept the lock of this process or of one that it descends from, as where a sweep starts a training;
            a lock that is taken here leaves no file behind, by which a sweep knows its runs.

    Raises:
        HeldError: Another process holds it.
    """
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        descriptors: tuple[int, ...] = ()
        if not (nested and held_above(path)):
            try:
                descriptors = stack.enter_context(hold(path, keep=not nested))
            except HeldError as error:
                who = named(path)
                if who is None or not who.launch or who.launch != launch_name():
                    raise HeldError(
                        f"{folder}: {error.message} trains it.", "Wait for it, or end that process.", topic="held"
                    ) from None
                logger.warning("%s: takes over from %s of this launch, whose node is lost", folder, who)
        yield descriptors


def trainer(folder: Path) -> tuple[Holder | None, bool]:
    """Return who trains a run, or was killed while training it, and whether that process still holds it."""
    return holder(folder / LOCK)


def is_run(folder: Path) -> bool:
    """Return whether `folder` belongs to a run, finished or not."""
    return (folder / RUN).is_file()


def is_done(folder: Path) -> bool:
    """Return whether `folder` holds a finished run."""
    return (folder / DONE).is_file()


def fold_name(fold: int, repeat: int, repeats: int) -> str:
    """Return the name of a fold's folder; the repeat is part of it where the run has several."""
    return _fold_name(fold, None if repeats == 1 else repeat)


def _fold_name(fold: int | str, repeat: int | str | None) -> str:
    return f"fold_{fold}" if repeat is None else f"repeat_{repeat}_fold_{fold}"


def is_fold_name(name: str) -> bool:
    """Return whether a file of this name in a run's folder is a fold; the temporary file of a killed writer is not."""
    return _FOLD_NAME.fullmatch(name) is not None


def fold_folders(run: Path) -> list[Path]:
    """Return the folders of the finished folds of a run, sorted by name."""
    return sorted(path for path in run.glob(_ANY_FOLD) if is_fold_name(path.name) and is_complete(path))


def is_complete(fold: Path) -> bool:
    """Return whether a fold is finished; its folder appears only then."""
    return (fold / FOLD).is_file()


def predictions_digest(folder: Path) -> dict[str, str]:
    """Return what the marker of a finished run or fold records of the predictions in its folder."""
    return {_PREDICTIONS_DIGEST: digest_file(folder / PREDICTIONS)}


def predictions_file(folder: Path) -> Path:
    """Return the file of the predictions in a folder of a run or fold.

    Raises:
        DataError: It is not what the run or fold wrote. Older programs recorded no digest, and theirs pass.
    """
    path = folder / PREDICTIONS
    markers = [folder / name for name in (DONE, FOLD) if (folder / name).is_file()]
    recorded = [digest for marker in markers if (digest := read_json(marker).get(_PREDICTIONS_DIGEST))]
    if path.is_file() and any(digest != digest_file(path) for digest in recorded):
        command = shlex.join(["cfusion", "train", str(folder / CONFIG), f"output={folder}"])
        again = f"{command} writes it again from the folds."
        if (folder / FOLD).is_file():
            again = (
                f"Restore the file, or delete {folder} and run the same `cfusion train` again, which trains the fold."
            )
        raise DataError(
            f"{path}: was changed after the training wrote it (SHA-256 in {markers[0].name}).",
            f"{again} Predictions of your own are evaluated by `cfusion score --predictions`.",
            topic="predictions",
        )
    return path


def _missing_models(run: Path) -> list[str]:
    """Return the names of a run's folds whose model is not in its folder, as after an incomplete copy."""
    splits = [match for path in sorted((run / SPLITS).glob("*.csv")) if (match := _SPLIT_NAME.fullmatch(path.name))]
    names = [_fold_name(match["fold"], match["repeat"]) for match in splits]
    return [name for name in names if not (run / name / MODEL / CARD).is_file()]


def check_all_models(run: Path) -> None:
    """Refuse the models of a run that is unfinished or not completely here; other folders pass.

    Raises:
        DataError: It is, or a newer program wrote it.
    """
    if not is_run(run):
        return
    read_marker(run)
    if not is_done(run):
        raise DataError(f"{run}: its run is not finished.", "Finish it, or give the folder of one of its folds.")
    if missing := _missing_models(run):
        raise DataError(
            f"{run}: has no model of {', '.join(missing)}, as after an incomplete copy.",
            "Copy the folder again, or give the folder of one of its folds.",
        )


def read_marker(folder: Path) -> dict[str, Any]:
    """Read `run.json` of a run's folder: `identity` and `provenance`, among others.

    Raises:
        DataError: It cannot be read, or a newer program wrote it.
    """
    marker = read_json(folder / RUN)
    check_format(folder / RUN, marker, RUN_FORMAT)
    return dict(marker)


def write_marker(folder: Path, identity: str, provenance: dict[str, Any], same_code: str | None = None) -> None:
    """Write `run.json` of a run's folder; `same_code` is the digest of other code that may continue it."""
    same = {} if same_code is None else {"same_code": same_code}
    write_json(folder / RUN, {"format": RUN_FORMAT, "identity": identity, "provenance": provenance, **same})


def codes(marker: dict[str, Any]) -> list[str]:
    """Return the digests of the code that began or continued a run, or counts as the same, from its `run.json`."""
    continued = [entry["code"] for entry in marker.get("continued_by", [])]
    return [code for code in (marker["provenance"].get("code"), marker.get("same_code"), *continued) if code]


def add_continuation(folder: Path, by: dict[str, Any]) -> None:
    """Record in `run.json` the code, and versions of packages, that continue a run which others began."""
    marker = read_marker(folder)
    write_json(folder / RUN, {**marker, "continued_by": [*marker.get("continued_by", []), by]})


def write_done(folder: Path, identity: str, registered_version: str | None) -> None:
    """Mark the run in `folder`, whose predictions are written, as finished."""
    marker = {"identity": identity, "registered_version": registered_version, **predictions_digest(folder)}
    write_json(folder / DONE, marker)


def read_config(folder: Path) -> Config:
    """Read the configuration of the run in `folder`.

    Raises:
        ConfigError: It cannot be read, or has a key that this program does not know.
    """
    values = read_yaml(folder / CONFIG)
    if isinstance(values.get("train"), dict):
        # Every setting was written; a run from before this one does not have these errors, whatever its recipe.
        values["train"].setdefault("published_errors", False)
    return validate(Config, values, str(folder / CONFIG))


def write_config(folder: Path, config: Config) -> None:
    """Write the resolved configuration of a run to its folder."""
    write_text(folder / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as read from its folder.

    Attributes:
        folder: The run's folder.
        config: Its configuration.
        audit: What the audit found, `Audit.to_json()`.
        provenance: Digests, versions and seeds.
    """

    folder: Path
    config: Config
    audit: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        """Cohort, model and protocol."""
        return self.config.cohort.name, self.config.model.name, self.config.evaluation.protocol

    def curves(self) -> pd.DataFrame:
        """Learning curves of its folds, with the run's cohort, model and protocol."""
        import pandas as pd

        frames = histories(self.folder)
        cohort, model, protocol = self.key
        table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"fold": [], "epoch": []})
        return table.assign(cohort=cohort, model=model, protocol=protocol)


def histories(run: Path) -> list[pd.DataFrame]:
    """Read the metrics by epoch of each fold of a run that has them; `trained` is the fold's folder."""
    import pandas as pd

    folds = sorted(path for path in run.glob(_ANY_FOLD) if is_fold_name(path.name))
    return [pd.read_csv(fold / HISTORY).assign(trained=str(fold)) for fold in folds if (fold / HISTORY).is_file()]


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
        DataError: The folder holds no finished run, or a newer program wrote it.
    """
    if not is_done(folder):
        raise DataError(f"{folder}: holds no finished run.", "Give the output folder of cfusion train.")
    provenance = read_marker(folder)["provenance"]
    return FinishedRun(folder, read_config(folder), read_json(folder / AUDIT), provenance)


def find_run(folder: Path) -> Path:
    """Return the folder of the one run whose fold models lie at or below `folder`; `folder` itself if it has none.

    Raises:
        DataError: The fold models belong to several runs; two are named.
    """
    if is_run(folder):
        return folder
    runs = sorted({_run_of(model, folder) for model in _model_folders(folder.glob(f"**/{CARD}"), folder)})
    if len(runs) > 1:
        raise DataError(
            f"{folder}: holds fold models of {len(runs)} runs, such as {runs[0]} and {runs[1]}, which are no ensemble.",
            "Give the folder of one run, or of one of its folds.",
        )
    return runs[0] if runs else folder


def fold_models(folder: Path) -> list[Path]:
    """Return the folders of the fold models of the run at or below `folder`, sorted.

    Raises:
        DataError: There are fold models of several runs.
    """
    run = find_run(folder)
    # Anything else in a run's folder, such as another run, is not one of its folds.
    pattern = f"{_ANY_FOLD}/{MODEL}" if is_run(run) else "**"
    return _model_folders(run.glob(f"{pattern}/{CARD}"), run)


def _model_folders(cards: Iterable[Path], top: Path) -> list[Path]:
    """Folders of model cards, sorted; a hidden one was left by a killed writer."""
    found = (card.parent for card in cards)
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(top).parts))


def _run_of(model: Path, top: Path) -> Path:
    """The run of a model at or below `top`: the nearest folder with a run.json, or else that of its fold's folder."""
    for parent in model.parents:
        if parent.is_relative_to(top) and is_run(parent):
            return parent
    run = model.parents[1] if model.name == MODEL else model.parent
    return run if run.is_relative_to(top) else top

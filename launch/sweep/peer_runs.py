"""Predictions of other programs in a sweep's comparison, each as one more model on the sweep's own patients and folds.

They are kept in `imported/` of the sweep's folder, in the files of a run that its scores come from. Outcomes and folds
are the sweep's: what another program says of them must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cfusion.cohort.portals import DAYS_PER_MONTH
from cfusion.cohort.read import write_covariates, write_outcomes
from cfusion.cohort.splits import read_splits, write_splits
from cfusion.errors import ConfigError, DataError, PredictionsError
from cfusion.files import atomic_path, check_format, digest_file, digest_json, read_json, write_json
from cfusion.report.comparison.cells import ComparedRun, Cost
from cfusion.report.runs import outcomes_and_splits
from cfusion.run_folder import COVARIATES, OUTCOMES, PREDICTIONS, SPLITS
from cfusion.survival.predictions import KNOWN_PROTOCOLS
from cfusion.types import Cohort, Split
from launch.sweep.peer_tables import PeerFold, layout_named, read_peer

IMPORTED = "imported.json"
"""In the folder of imported predictions: where they came from, and their cell."""

_FOLDER = "imported"
_FORMAT = 1
_UNKNOWN = Cost(float("nan"), float("nan"))
_UNITS = {"months": 1.0, "days": DAYS_PER_MONTH}


@dataclass(frozen=True)
class PeerCell:
    """Where imported predictions stand in the comparison; None: see `import_peer`.

    Attributes:
        model: Name of the model.
        cohort: Cohort of the sweep.
        encoder: Encoder of the embeddings that the other program read.
        protocol: How its epoch was chosen.
        seed: Seed of the sweep whose runs it is paired with.
    """

    model: str | None = None
    cohort: str | None = None
    encoder: str | None = None
    protocol: str | None = None
    seed: int | None = None


def import_peer(output: Path, members: Sequence[ComparedRun], source: Path, layout_name: str, cell: PeerCell) -> str:
    """Add the predictions of another program to a sweep.

    Args:
        output: Folder of the sweep.
        members: Its comparison so far.
        source: Folder of the other program's results.
        layout_name: A name of `launch.sweep.peer_tables.LAYOUTS`.
        cell: What the caller says. Otherwise: the program's name as the model, the sweep's only cohort, the cohort's
            only encoder, the program's protocol, and the lowest seed of the cohort's runs.

    Returns:
        What was imported, in a sentence.

    Raises:
        ConfigError: The cohort or encoder is unknown or must be named, or the sweep has this model already.
        DataError, PredictionsError: The predictions cannot be read, or their patients, outcomes or folds do not fit
            the sweep's.
    """
    layout = layout_named(layout_name)
    runs = _finished(members, cell.cohort)
    cohort = runs[0].cohort
    model, protocol = cell.model or layout.title, cell.protocol or layout.protocol
    if protocol not in KNOWN_PROTOCOLS:
        raise ConfigError(f"--protocol {protocol}: expected one of {', '.join(KNOWN_PROTOCOLS)}.")
    runs = [run for run in runs if run.protocol == protocol] or runs
    encoder = cell.encoder or _only("encoder", [run.encoder for run in members if run.cohort == cohort])
    seed = min(run.seed for run in runs) if cell.seed is None else cell.seed
    taken = [run for run in members if (run.cohort, run.encoder, run.model) == (cohort, encoder, model)]
    if [run for run in taken if not _is_imported(run)]:
        raise ConfigError(f"--model {model}: the sweep trains a model of this name on {cohort}.", "Give another name.")
    truth, splits = outcomes_and_splits([run.folder for run in runs], cohort)
    _check_same_folds(runs, splits)
    folds = read_peer(source, layout)
    unit = _checked_outcomes(folds, truth)
    numbered = _numbered(folds, splits, truth)
    shared = {"model": model, "cohort": cohort, "protocol": protocol, "seed": seed}
    frame = pd.concat([_rows(fold, split, truth, shared) for fold, split in numbered], ignore_index=True)
    facts = {
        "format": _FORMAT, **shared, "encoder": encoder, "program": layout.title, "endpoint": runs[0].endpoint,
        "sources": {fold.path.relative_to(source).as_posix(): digest_file(fold.path) for fold in folds},
    }  # fmt: skip
    folder = output / _FOLDER / f"imported-{digest_json([cohort, encoder, model, protocol, seed])[:10]}"
    if folder.exists() and read_json(folder / IMPORTED).get("sources") != facts["sources"]:
        raise ConfigError(
            f"{folder}: has other predictions of {model} (seed {seed}) on {cohort}.",
            "Give another --model or --seed, or delete this folder.",
        )
    _write(folder, frame, truth, splits, facts)
    return (
        f"imported {model} ({encoder}) on {cohort}: {len(frame)} patients in {len(folds)} folds, protocol {protocol}, "
        f"paired with seed {seed}; times in {unit}"
    )


def _is_imported(run: ComparedRun) -> bool:
    return (run.folder / IMPORTED).is_file()


def _finished(members: Sequence[ComparedRun], cohort: str | None) -> list[ComparedRun]:
    """Return the sweep's own finished runs on real outcomes of the cohort: their folds are the sweep's."""
    name = cohort or _only("cohort", [member.cohort for member in members])
    if name not in {member.cohort for member in members}:
        known = ", ".join(dict.fromkeys(member.cohort for member in members))
        raise ConfigError(f"--cohort {name}: the sweep has no such cohort. It has {known}.")
    runs = [
        run
        for run in members
        if run.cohort == name and run.state == "done" and run.permuted is None and not _is_imported(run)
    ]
    if not runs:
        raise DataError(f"{name}: no run on real outcomes is done, so its folds are unknown.", "Run one first.")
    return runs


def _only(what: str, found: Sequence[str]) -> str:
    names = list(dict.fromkeys(found))
    if len(names) != 1:
        raise ConfigError(f"the sweep has the {what}s {', '.join(names)}.", f"Name one with --{what}.")
    return names[0]


def _check_same_folds(runs: Sequence[ComparedRun], splits: Sequence[Split]) -> None:
    tested = {(split.repeat, split.fold): set(split.test) for split in splits}
    for run in runs:
        for split in read_splits(run.folder / SPLITS):
            if set(split.test) != tested[split.repeat, split.fold]:
                raise ConfigError(
                    f"the sweep's runs on {run.cohort} have different folds, as {run.name} has.",
                    "Choose runs with --only axis=value.",
                )


def _checked_outcomes(folds: Sequence[PeerFold], truth: Cohort) -> str:
    """Check the patients and their outcomes; return the unit of the times.

    Raises:
        PredictionsError: A patient is not in the cohort or has another outcome there.
    """
    for fold in folds:
        unknown = [name for name in fold.patients.index if name not in truth.cases.index]
        if unknown:
            raise PredictionsError(
                f"{fold.path}: {len(unknown)} patients are not among the {len(truth.cases)} of {truth.name}, such as "
                f"{unknown[0]}.",
                "The sweep drops patients without usable slides or outcomes: see its audit.",
            )
        wrong = fold.patients["event"].astype(bool) != truth.cases.loc[fold.patients.index, "event"]
        if wrong.any():
            raise PredictionsError(
                f"{fold.path}: {int(wrong.sum())} patients have another event in {truth.name}, such as "
                f"{wrong.index[wrong][0]}.",
                "Is 1 a death? Do both use the same end point?",
            )
    return _unit(folds, truth)


def _unit(folds: Sequence[PeerFold], truth: Cohort) -> str:
    """Return the unit in which all times are those of the cohort, to a day or a hundredth."""
    wrong: dict[str, pd.Series] = {}
    theirs = pd.concat([fold.patients["time"] for fold in folds])
    months = truth.cases.loc[theirs.index, "time_months"].astype(float)
    for unit, factor in _UNITS.items():
        off = ~np.isclose(theirs, months * factor, rtol=0.01, atol=factor / DAYS_PER_MONTH)
        if not off.any():
            return unit
        wrong[unit] = theirs[off]
    unit = min(wrong, key=lambda name: len(wrong[name]))
    case = wrong[unit].index[0]
    raise PredictionsError(
        f"{len(wrong[unit])} of {len(theirs)} patients have another time in {truth.name}, such as {case}: "
        f"{wrong[unit].iloc[0]:g}, and {months[case]:g} months there, read as {unit}.",
        "Do both use the same table and end point? Times may be in months or days.",
    )


def _numbered(folds: Sequence[PeerFold], splits: Sequence[Split], truth: Cohort) -> list[tuple[PeerFold, Split]]:
    """Return the fold of the sweep that each fold is: the one that scores the same patients, whatever its number."""
    by_patients = {frozenset(split.test): split for split in splits}
    found: dict[tuple[int, int], tuple[PeerFold, Split]] = {}
    for fold in folds:
        mine = frozenset(fold.patients.index)
        split = by_patients.get(mine)
        if split is None:
            raise PredictionsError(_other_patients(fold, mine, splits), "Train it on the sweep's folds (RUN/splits).")
        if (split.repeat, split.fold) in found:
            raise PredictionsError(
                f"{fold.path}: scores the same patients as {found[split.repeat, split.fold][0].path}."
            )
        found[split.repeat, split.fold] = fold, split
    for split in splits:
        if (split.repeat, split.fold) not in found:
            raise PredictionsError(
                f"no predictions for fold {split.fold} of {truth.name}, which scores {len(split.test)} patients, such "
                f"as {split.test[0]}.",
                "Predict every fold.",
            )
    return [found[key] for key in sorted(found)]


def _other_patients(fold: PeerFold, mine: frozenset[str], splits: Sequence[Split]) -> str:
    nearest = max(splits, key=lambda split: len(mine & set(split.test)))
    more, lacking = sorted(mine - set(nearest.test)), sorted(set(nearest.test) - mine)
    parts = [f"{len(more)} patients are not in it, such as {more[0]}"] if more else []
    parts += [f"{len(lacking)} of its patients are missing, such as {lacking[0]}"] if lacking else []
    return f"{fold.path}: fold {nearest.fold} of the sweep is the nearest, and {'; '.join(parts)}."


def _rows(fold: PeerFold, split: Split, truth: Cohort, shared: dict[str, Any]) -> pd.DataFrame:
    cases = truth.cases.loc[fold.patients.index]
    cutoff = {} if fold.cutoff is None else {"risk_cutoff": fold.cutoff}
    return pd.DataFrame({
        **{name: [value] * len(cases) for name, value in shared.items()}, "repeat": split.repeat, "fold": split.fold,
        "case_id": cases.index, "risk": fold.patients["risk"].to_numpy(),
        "survival_months": cases["time_months"].to_numpy(), "event": cases["event"].to_numpy(), **cutoff,
    })  # fmt: skip


def _write(folder: Path, frame: pd.DataFrame, truth: Cohort, splits: Sequence[Split], facts: dict[str, Any]) -> None:
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        frame.to_csv(temporary / PREDICTIONS, index=False)
        write_outcomes(truth, temporary / OUTCOMES)
        write_covariates(truth, temporary / COVARIATES)
        write_splits(splits, temporary / SPLITS)
        write_json(temporary / IMPORTED, facts)


def imported(output: Path) -> list[ComparedRun]:
    """Return what was imported into a sweep, sorted by cohort, encoder and model.

    Raises:
        DataError: A newer program wrote it.
    """
    found = []
    for path in (output / _FOLDER).glob(f"imported-*/{IMPORTED}"):
        facts = read_json(path)
        check_format(path, facts, _FORMAT)
        found.append(
            ComparedRun(
                path.parent.name, path.parent, facts["cohort"], facts["encoder"], facts["model"], facts["protocol"],
                facts["seed"], None, "done", f"imported from {facts['program']}", _UNKNOWN, facts["endpoint"],
            )
        )  # fmt: skip
    return sorted(found, key=lambda run: (run.cohort, run.encoder, run.model, run.seed))

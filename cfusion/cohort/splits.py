"""Read published folds or draw new ones by patient: training, validation and test patients.

The protocol decides which patients choose the model: under `strict`, patients held out of the training side; under
`fixed-epoch`, none; under `published`, the scored fold itself, which is optimistic.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from cfusion.cohort.identifiers import Names, patient_of, slide_stem
from cfusion.cohort.parsing import read_table
from cfusion.config import Protocol, SplitsConfig
from cfusion.errors import ConfigError, DataError
from cfusion.files import atomic_path, digest_json, read_json, write_json
from cfusion.types import Cohort, Split

logger = logging.getLogger(__name__)

_FILE = re.compile(r"splits_(?:(\d+)_)?(\d+)\.csv")
_DIGEST = "splits.json"
_SIDES = ("train", "validation", "test")


def make_splits(cohort: Cohort, config: SplitsConfig, protocol: Protocol = "strict") -> list[Split]:
    """Read or draw the folds of a cohort under a protocol.

    Published files name patients, or slides, which are mapped to their patients. Names that are not in the cohort, and
    patients on both sides, are kept here; `cfusion.cohort.audit.audit` drops and reports them. Drawn folds are
    stratified by event and by quantiles of the time. The inner validation is drawn in the same way, and never splits a
    tissue source site under `scheme: site`.

    In a cohort with strata (`cfusion.cohort.joint.read_cohorts`) folds are read or drawn in each cohort as if it were
    trained by itself, and joined by their number; `scheme: cohort` scores one cohort in each fold.

    Raises:
        ConfigError: The folder has no split files, two cohorts have other folds, or `within` or `fold` is not the
            number of a fold.
        DataError: A file is not a split file, or the cohort has too few events or sites for the folds.
    """
    return inner_folds(cohort, outer_folds(cohort, config), config, protocol)


def outer_folds(cohort: Cohort, config: SplitsConfig) -> list[Split]:
    """Read or draw who is scored in which fold, before any protocol; see `make_splits`."""
    outer = _left_out(cohort, config.repeats) if config.scheme == "cohort" else _outer(cohort, config)
    if config.within is not None:
        outer = _within(cohort, outer, config)
    return outer if config.fold is None else _select_fold(outer, config.fold)


def inner_folds(cohort: Cohort, outer: Sequence[Split], config: SplitsConfig, protocol: Protocol) -> list[Split]:
    """Draw who chooses the model in each of the outer folds, as the protocol says; see `make_splits`."""
    return [_under_protocol(cohort, split, config, protocol) for split in outer]


def fold_count(config: SplitsConfig) -> int:
    """Return the number of folds that `make_splits` returns, without reading a cohort."""
    directory = next(iter(config.directory.values())) if isinstance(config.directory, dict) else config.directory
    if config.within is not None:
        numbers = list(range(config.folds))
    elif directory is not None:
        numbers = [int(match[2]) for path in directory.glob("*.csv") if (match := _FILE.fullmatch(path.name))]
    else:
        numbers = list(range(1 if config.test_cases is not None else config.folds)) * config.repeats
    return len(numbers) if config.fold is None else numbers.count(config.fold)


def _left_out(cohort: Cohort, repeats: int) -> list[Split]:
    """Return folds that each score one cohort and train on the others, in the order of the cohorts.

    Raises:
        ConfigError: The cohort is not several.
    """
    if cohort.strata is None:
        raise ConfigError(
            f"splits.scheme=cohort leaves out one of several cohorts; {cohort.name} is one.",
            "Read them with read_cohorts(config), or set splits.scheme=stratified.",
        )
    everyone = cohort.cases.index
    of = cohort.strata_of(list(everyone))
    return [
        Split(fold, tuple(everyone[of != name]), (), tuple(everyone[of == name]), repeat)
        for repeat in range(repeats)
        for fold, name in enumerate(cohort.stratum_names)
    ]


def _of_each_cohort(cohort: Cohort, config: SplitsConfig) -> list[Split]:
    """Read the folds of each cohort, and join those of the same number.

    Raises:
        ConfigError, DataError: Two cohorts have other folds, or see `read_splits`.
    """
    assert isinstance(config.directory, dict)
    joined: dict[tuple[int, int], Split] = {}
    for part in cohort.parts():
        directory = config.directory[part.name]
        folds = {(split.repeat, split.fold): split for split in _of_patients(part, read_splits(directory), directory)}
        if joined and folds.keys() != joined.keys():
            raise ConfigError(
                f"{directory}: has the folds {_fold_names(folds)}, and {cohort.stratum_names[0]} has "
                f"{_fold_names(joined)}.",
                "Cohorts that are trained as one need the same folds; leave out splits.directory to draw them.",
                topic="splits",
            )
        joined = {key: join_sides(joined[key], split) if joined else split for key, split in folds.items()}
    return list(joined.values())


def _fold_names(folds: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{repeat}.{fold}" if repeat else str(fold) for repeat, fold in sorted(folds))


def join_sides(one: Split, other: Split) -> Split:
    """Return a fold with the patients of two on each side; number and repeat are those of the first."""
    return dataclasses.replace(one, **{side: getattr(one, side) + getattr(other, side) for side in _SIDES})


def _outer(cohort: Cohort, config: SplitsConfig) -> list[Split]:
    if isinstance(config.directory, dict):
        return _of_each_cohort(cohort, config)
    if config.directory is not None:
        return _of_patients(cohort, read_splits(config.directory), config.directory)
    if config.test_cases is not None:
        return _external(cohort, config.test_cases, config.repeats)
    return [
        dataclasses.replace(split, repeat=repeat)
        for repeat in range(config.repeats)
        for split in _draw(cohort, tuple(cohort.cases.index), config, config.folds, config.seed + repeat)
    ]


def _of_patients(cohort: Cohort, splits: Sequence[Split], source: Path) -> list[Split]:
    """Replace names of slides, and patients written in another case or as `12.0`, by the patients of the cohort.

    Names that fit none stay as they are, for the audit to report.
    """
    known = Names({**cohort.slides["case_id"], **{case: case for case in cohort.cases.index}})
    named = dict.fromkeys(case for split in splits for side in _SIDES for case in getattr(split, side))
    meant = {name: known.find(name) or known.find(slide_stem(name)) or name for name in named}
    differ = [name for name in named if meant[name] != name]
    if not differ:
        return list(splits)
    logger.warning(
        "%s: %d names of the splits are not written as the patients of the cohort, such as %s, taken as %s",
        source, len(differ), differ[0], meant[differ[0]],
    )  # fmt: skip

    def patients(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(meant[name] for name in names))

    return [
        dataclasses.replace(
            split, train=patients(split.train), validation=patients(split.validation), test=patients(split.test)
        )
        for split in splits
    ]


def _within(cohort: Cohort, outer: Sequence[Split], config: SplitsConfig) -> list[Split]:
    chosen = [split for split in outer if split.fold == config.within and split.repeat == 0]
    if not chosen:
        raise ConfigError(f"splits.within={config.within}: no such fold; expected 0 to {len(outer) - 1}.")
    known = set(cohort.cases.index)
    side = tuple(c for c in (*chosen[0].train, *chosen[0].validation) if c in known)
    return _draw(cohort, side, config, config.folds, config.seed)


def _select_fold(splits: Sequence[Split], fold: int) -> list[Split]:
    chosen = [split for split in splits if split.fold == fold]
    if not chosen:
        last = max(split.fold for split in splits)
        raise ConfigError(f"splits.fold={fold}: no such fold; expected 0 to {last}.")
    return chosen


def _under_protocol(cohort: Cohort, split: Split, config: SplitsConfig, protocol: Protocol) -> Split:
    if protocol == "published":
        return dataclasses.replace(split, train=split.train + split.validation, validation=split.test)
    if protocol == "fixed-epoch":
        return dataclasses.replace(split, train=split.train + split.validation, validation=())
    validation = _inner_validation(cohort, split, config)
    train = tuple(case for case in split.train if case not in validation)
    drawn = tuple(case for case in split.train if case in validation)
    return dataclasses.replace(split, train=train, validation=split.validation + drawn)


def _inner_validation(cohort: Cohort, split: Split, config: SplitsConfig) -> set[str]:
    """Draw the patients of the training side who choose the model, in each cohort by itself that has none yet."""
    drawn = set[str]()
    for part in cohort.parts():
        given = split.validation if cohort.strata is None else part.cases.index.intersection(list(split.validation))
        if not len(given) and len(part.cases.index.intersection(list(split.train))):
            drawn |= _validation_of(part, split, config)
    return drawn


def _validation_of(cohort: Cohort, split: Split, config: SplitsConfig) -> set[str]:
    """Draw the patients of one cohort's training side who choose the model.

    Sites differ in size and in follow-up, so with `scheme: site` the drawn part is taken whose patients and events are
    closest to the configured fraction.
    """
    side = tuple(case for case in split.train if case in cohort.cases.index)
    folds = max(2, round(1 / config.validation_fraction))
    seed = config.seed + 1000 * split.repeat + split.fold
    cases = cohort.cases.loc[list(side)]
    if config.scheme == "site":
        folds = max(2, min(folds, _sites(cohort, cases, 2).nunique()))
    _check_enough_to_choose(cohort, cases, folds)
    if config.scheme != "site":
        return set(_draw(cohort, side, config, folds, seed)[0].test)

    def distance(part: Split) -> float:
        inside = cases.loc[list(part.test), "event"]
        shares = (len(inside) / len(cases), float(inside.sum()) / max(float(cases["event"].sum()), 1.0))
        return sum(abs(np.log(max(share, 1e-9) / config.validation_fraction)) for share in shares)

    return set(min(_draw(cohort, side, config, folds, seed), key=distance).test)


def _check_enough_to_choose(cohort: Cohort, cases: pd.DataFrame, folds: int) -> None:
    """Refuse an inner validation of one in `folds` of a training side that is too small for it.

    Raises:
        DataError: It is.
    """
    events = int(cases["event"].sum())
    if events and _too_few(cases, folds):
        raise DataError(
            f"cohort {cohort.name}: a training side has {len(cases)} patients with {events} events, too few to set "
            f"1 in {folds} apart to choose the epoch.",
            "Set evaluation.protocol=fixed-epoch, which needs no such patients, or raise splits.validation_fraction.",
        )


def _too_few(cases: pd.DataFrame, folds: int) -> bool:
    """Return whether some fold would have no event, or fewer than two patients."""
    return int(cases["event"].sum()) < folds or len(cases) < 2 * folds


def _draw(cohort: Cohort, case_ids: tuple[str, ...], config: SplitsConfig, folds: int, seed: int) -> list[Split]:
    """Draw folds of the given patients, as each cohort gets them by itself."""
    if cohort.strata is None:
        return _draw_of(cohort, case_ids, config, folds, seed)
    of = cohort.strata_of(case_ids)
    drawn = [
        _draw_of(part, tuple(np.array(case_ids, dtype=object)[of == part.name]), config, folds, seed)
        for part in cohort.parts()
        if (of == part.name).any()
    ]
    return [functools.reduce(join_sides, splits) for splits in zip(*drawn, strict=True)]


def _draw_of(cohort: Cohort, case_ids: tuple[str, ...], config: SplitsConfig, folds: int, seed: int) -> list[Split]:
    cases = cohort.cases.loc[list(case_ids)]
    events = int(cases["event"].sum())
    if _too_few(cases, folds):
        raise DataError(
            f"cohort {cohort.name}: {len(cases)} patients with {events} events are too few for {folds} folds.",
            "Use fewer folds (splits.folds)."
            if events
            else "Check the column of the event: no patient has it, and nothing can be scored without events.",
        )
    strata = _strata(cases, folds)
    if config.scheme == "site":
        sites = _sites(cohort, cases, folds).to_numpy()
        sides = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(cases, strata, sites)
    else:
        sides = StratifiedKFold(folds, shuffle=True, random_state=seed).split(cases, strata)
    ids = np.array(case_ids)
    with warnings.catch_warnings():
        # scikit-learn warns if a stratum has fewer patients than folds; some folds then have none of it, which is fine.
        warnings.simplefilter("ignore", UserWarning)
        splits = [Split(fold, tuple(ids[a]), (), tuple(ids[b])) for fold, (a, b) in enumerate(sides)]
    for split in splits:
        if not cases.loc[list(split.test), "event"].any():
            raise DataError(
                f"cohort {cohort.name}, fold {split.fold}: the drawn test side has no event.",
                "Use fewer folds (splits.folds), another splits.seed, or splits.scheme=stratified.",
            )
    return splits


def _strata(cases: pd.DataFrame, folds: int) -> np.ndarray:
    """Return a stratum per patient: event × quartile of the time within the group (fewer quantiles if it is small)."""
    strata = np.zeros(len(cases), dtype=int)
    event = cases["event"].fillna(False).to_numpy(bool)
    for happened in (False, True):
        rows = np.flatnonzero(event == happened)
        quantiles = int(np.clip(len(rows) // folds, 1, 4))
        order = cases["time_months"].iloc[rows].rank(method="first", na_option="bottom").to_numpy() - 1
        strata[rows] = 4 * happened + (order * quantiles // max(len(rows), 1)).astype(int)
    return strata


def _sites(cohort: Cohort, cases: pd.DataFrame, folds: int) -> pd.Series:
    if "site" not in cases.columns or cases["site"].isna().any():
        raise DataError(
            f"cohort {cohort.name}: splits.scheme=site needs the site of every patient.",
            "Add a column site to the clinical table, or set splits.scheme=stratified.",
        )
    if cases["site"].nunique() < folds:
        found = cases["site"].nunique()
        raise DataError(
            f"cohort {cohort.name}: {found} sites are too few for {folds} folds that keep sites together.",
            f"Set splits.folds to {found} or fewer, splits.scheme=stratified, or evaluation.protocol=fixed-epoch, "
            "which needs no inner validation."
            if found > 1
            else "Set splits.scheme=stratified.",
            topic="splits",
        )
    return cases["site"]


def _external(cohort: Cohort, path: Path, repeats: int) -> list[Split]:
    table = read_table(path)
    if "case_id" not in table.columns:
        raise DataError(f"{path}: expected a column case_id.")
    (named,) = _of_patients(cohort, [Split(0, (), (), _patients(table["case_id"]))], path)
    test = named.test
    unknown = [case for case in test if case not in cohort.cases.index]
    if unknown:
        hint = Names(cohort.cases.index).nearest(unknown[0])
        raise DataError(
            f"{path}: {len(unknown)} patients are not in cohort {cohort.name}, such as {unknown[0]}{hint}.",
            "Correct the names, or remove the patients from the table.",
            topic="splits",
        )
    train = tuple(case for case in cohort.cases.index if case not in set(test))
    if not train:
        raise DataError(f"{path}: names every patient of cohort {cohort.name}; no training patients are left.")
    return [Split(0, train, (), test, repeat) for repeat in range(repeats)]


def read_splits(directory: Path) -> list[Split]:
    """Read `splits_K.csv` or `splits_R_K.csv`: columns train and val (scored), or train, val and test (scored).

    If val and test are the same patients, as in files written under `published`, the split has no validation side.

    Raises:
        ConfigError: The folder has no such file.
        DataError: A file lacks the columns, a side is empty, or the folds do not match the digest in `splits.json`.
    """
    files = [(match, path) for path in directory.glob("*.csv") if (match := _FILE.fullmatch(path.name))]
    if not files:
        raise ConfigError(f"{directory}: has no splits_K.csv.", "Set splits.directory to a folder of split files.")
    splits, written = [], []
    for match, path in sorted(files, key=lambda item: (int(item[0][1] or 0), int(item[0][2]))):
        table = read_table(path)
        if not {"train", "val"} <= set(table.columns):
            raise DataError(f"{path}: expected the columns train and val, found {', '.join(table.columns)}.")
        nested = "test" in table.columns and table["test"].notna().any()
        sides = ("train", "val", "test") if nested else ("train", "val")
        patients = [_patients(table[side]) for side in sides]
        validation = patients[1] if nested and set(patients[1]) != set(patients[2]) else ()
        if not patients[0] or not patients[-1]:
            raise DataError(f"{path}: the {'train' if not patients[0] else sides[-1]} column is empty.")
        splits.append(Split(int(match[2]), patients[0], validation, patients[-1], int(match[1] or 0)))
        written.append(dataclasses.replace(splits[-1], validation=patients[1] if nested else ()))
    _check_digest(directory, written)
    return splits


def _check_digest(directory: Path, written: Sequence[Split]) -> None:
    path = directory / _DIGEST
    if path.exists() and read_json(path).get("digest") != splits_digest(written):
        raise DataError(
            f"{directory}: the folds do not match the digest in {_DIGEST}.",
            f"Write them again, or delete {_DIGEST} if they were changed on purpose.",
            topic="splits",
        )


def _patients(names: pd.Series) -> tuple[str, ...]:
    return tuple(dict.fromkeys(patient_of(name.strip()) for name in names.dropna()))


def write_splits(splits: Sequence[Split], directory: Path) -> str:
    """Write splits as `splits_K.csv` (columns train, val, test) for `make_splits`, and return their digest.

    With several repeats the names are `splits_R_K.csv`. `splits.json` holds the digest.
    """
    repeated = any(split.repeat for split in splits)
    digest = splits_digest(splits)
    with atomic_path(directory) as folder:
        folder.mkdir()
        for split in splits:
            name = f"splits_{split.repeat}_{split.fold}.csv" if repeated else f"splits_{split.fold}.csv"
            sides = {"train": split.train, "val": split.validation, "test": split.test}
            pd.DataFrame({k: pd.Series(v, dtype=object) for k, v in sides.items()}).to_csv(folder / name)
        write_json(folder / _DIGEST, {"digest": digest, "splits": len(splits)})
    return digest


def splits_digest(splits: Sequence[Split]) -> str:
    """Return the SHA-256 of folds, sides and patients; the order of patients within a side does not matter."""
    ordered = sorted(splits, key=lambda split: (split.repeat, split.fold))
    return digest_json([
        [split.repeat, split.fold, *(sorted(getattr(split, side)) for side in _SIDES)] for split in ordered
    ])  # fmt: skip

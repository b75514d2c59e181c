"""Which version of a registered model becomes champion: a rule on the strict C-index, applied when it is asked for."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cfusion.run_folder import PREDICTIONS
from cfusion.survival.paired import compare
from cfusion.survival.predictions import read_predictions
from cfusion.survival.score import score
from cfusion.tracking.model_registry import CANDIDATE, CHAMPION, find_version

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

RULE = (
    "A version becomes champion if its patients were scored once, under the strict protocol and with their real "
    "outcomes, and its pooled C-index is higher than the champion's on the same patients of the same cohort; the first "
    "one if its interval lies above .5."
)

CHANCE = 0.5
"""C-index of risks that tell nothing."""


@dataclass(frozen=True)
class Verdict:
    """What the rule says of a version.

    Attributes:
        name: The registered model.
        version: The version that was judged.
        passes: Whether it may become champion.
        reasons: What was looked at, a line each.
    """

    name: str
    version: str
    passes: bool
    reasons: tuple[str, ...]


def judge(client: MlflowClient, name: str, version: str | None = None, *, replicates: int = 1000) -> Verdict:
    """Hold a version against the champion.

    Both are scored anew from the out-of-fold predictions that their runs keep; nothing in the registry is changed.

    Args:
        client: Of the server.
        name: The registered model.
        version: Version to judge; none: the candidate.
        replicates: Bootstrap replicates of the intervals.

    Raises:
        DataError: There is no such version, or its run's predictions cannot be had.
    """
    challenger = find_version(client, name, version or CANDIDATE)
    number = str(challenger.version)
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if champion is not None and str(champion) == number:
        return Verdict(name, number, False, (f"Version {number} is the champion already.",))
    table = _predictions(client, challenger)
    wrong = _unfit(challenger, table)
    if wrong:
        return Verdict(name, number, False, (wrong,))
    pooled, low, told = _scored(table, f"Version {number}", replicates)
    if champion is None:
        chance = "Its interval lies above .5." if low > CHANCE else "Its interval reaches .5: no better than chance."
        return Verdict(name, number, low > CHANCE, (told, "There is no champion to hold it against.", chance))
    other = _predictions(client, find_version(client, name, str(champion)))
    differs = _differs(table, other, str(champion))
    if differs:
        return Verdict(name, number, False, (told, differs))
    best, _, best_told = _scored(other, f"Champion {champion}", replicates)
    comparison = "Higher" if pooled > best else "Not higher"
    reasons = (told, best_told, f"{comparison} by {pooled - best:+.3f}.", _paired(table, other, replicates))
    return Verdict(name, number, pooled > best, reasons)


def promote(client: MlflowClient, verdict: Verdict) -> None:
    """Give a version that passed the alias `champion`, and write the reasons beside it."""
    assert verdict.passes
    client.set_model_version_tag(verdict.name, verdict.version, "cfusion.promoted", " ".join(verdict.reasons)[:5000])
    client.set_registered_model_alias(verdict.name, CHAMPION, verdict.version)


def _predictions(client: MlflowClient, version: ModelVersion) -> pd.DataFrame:
    with tempfile.TemporaryDirectory() as scratch:
        return read_predictions(Path(client.download_artifacts(str(version.run_id), PREDICTIONS, scratch)))


def _unfit(version: ModelVersion, table: pd.DataFrame) -> str:
    """Why a version's score supports no claim; empty where it does."""
    protocols = sorted(set(table["protocol"]))
    if protocols != ["strict"]:
        return f"Version {version.version} was scored under {', '.join(protocols)}, not strict."
    if version.tags.get("cfusion.outcomes", "real") != "real":
        return f"Version {version.version} was trained on permuted outcomes."
    return ""


def _differs(table: pd.DataFrame, other: pd.DataFrame, champion: str) -> str:
    """Why two tables cannot be compared; empty where they can."""
    cohorts = [", ".join(sorted(set(frame["cohort"]))) for frame in (table, other)]
    if cohorts[0] != cohorts[1]:
        return f"It was scored on {cohorts[0]}, champion {champion} on {cohorts[1]}: not comparable."
    columns = ["case_id", "survival_months", "event"]
    patients = [set(frame[columns].itertuples(index=False, name=None)) for frame in (table, other)]
    if patients[0] != patients[1]:
        only = [len(patients[0] - patients[1]), len(patients[1] - patients[0])]
        return (
            f"Its patients are not those of champion {champion}: {only[0]} of {len(patients[0])} are missing there or "
            f"have another outcome, {only[1]} of {len(patients[1])} here: not comparable."
        )
    return ""


def _scored(table: pd.DataFrame, what: str, replicates: int) -> tuple[float, float, str]:
    """The pooled C-index, the lower end of its interval, and both in a sentence."""
    row = score(table, bootstrap=replicates).summary.iloc[0]
    pooled = float(row["cindex_pooled"])
    told = (
        f"{what}: pooled strict C {pooled:.3f} [{row['cindex_low']:.3f}, {row['cindex_high']:.3f}] on {row['n']} "
        f"patients of {row['cohort']} with {row['events']} events."
    )
    return pooled, float(row["cindex_low"]), told


def _paired(table: pd.DataFrame, other: pd.DataFrame, replicates: int) -> str:
    """The comparison on the same resampled patients; runs that differ in seed are taken as two models."""
    frames = [frame.assign(model=name, seed=0) for frame, name in ((other, "champion"), (table, "challenger"))]
    row = compare(pd.concat(frames, ignore_index=True), reference="champion", replicates=replicates).iloc[0]
    sure = "more than chance would give" if row["p"] < 0.05 else "within what chance would give"
    return (
        f"Paired, within folds: {row['difference']:+.3f} [{row['low']:.3f}, {row['high']:.3f}], p = {row['p']:.3f}, "
        f"{sure}."
    )

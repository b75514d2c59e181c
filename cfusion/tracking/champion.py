"""Decide whether a version of a registered model may become champion, by a rule on the strict C-index (`RULE`).

The rule is applied only on request (`cfusion registry promote`).
"""

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
    "outcomes, and if its C-index within folds is higher than the champion's on the same patients of the same cohort. "
    "The first champion needs a confidence interval above .5."
)

CHANCE = 0.5
"""C-index of random risks."""


@dataclass(frozen=True)
class Verdict:
    """The result of the rule for one version.

    Attributes:
        name: The registered model.
        version: The version that was evaluated.
        passes: Whether it may become champion.
        reasons: The scores and comparisons behind the result, one line each.
    """

    name: str
    version: str
    passes: bool
    reasons: tuple[str, ...]


def compare_with_champion(
    client: MlflowClient, name: str, version: str | None = None, *, replicates: int = 1000
) -> Verdict:
    """Compare a version with the champion.

    Both are scored again from the out-of-fold predictions of their runs. Nothing in the registry is changed.

    Args:
        client: Client of the server.
        name: The registered model.
        version: Version to evaluate; none: the candidate.
        replicates: Number of bootstrap replicates for the intervals.

    Raises:
        DataError: There is no such version, or its run's predictions are unavailable.
    """
    challenger = find_version(client, name, version or CANDIDATE)
    number = str(challenger.version)
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if champion is not None and str(champion) == number:
        return Verdict(name, number, False, (f"Version {number} is already the champion.",))
    table = _predictions(client, challenger)
    wrong = _unfit(challenger, table)
    if wrong:
        return Verdict(name, number, False, (wrong,))
    value, low, line = _scored(table, f"Version {number}", replicates)
    if champion is None:
        chance = (
            "Its interval is above .5." if low > CHANCE else "Its interval is not above .5: not better than chance."
        )
        return Verdict(name, number, low > CHANCE, (line, "There is no champion to compare it with.", chance))
    other = _predictions(client, find_version(client, name, str(champion)))
    differs = _differs(table, other, str(champion))
    if differs:
        return Verdict(name, number, False, (line, differs))
    best, _, best_line = _scored(other, f"Champion {champion}", replicates)
    comparison = "Higher" if value > best else "Not higher"
    reasons = (line, best_line, f"{comparison}: {value - best:+.3f}.", _paired(table, other, replicates))
    return Verdict(name, number, value > best, reasons)


def promote(client: MlflowClient, verdict: Verdict) -> None:
    """Give a version that passed the alias `champion`, and store the reasons in its tag `cfusion.promoted`."""
    assert verdict.passes
    client.set_model_version_tag(verdict.name, verdict.version, "cfusion.promoted", " ".join(verdict.reasons)[:5000])
    client.set_registered_model_alias(verdict.name, CHAMPION, verdict.version)


def _predictions(client: MlflowClient, version: ModelVersion) -> pd.DataFrame:
    with tempfile.TemporaryDirectory() as scratch:
        return read_predictions(Path(client.download_artifacts(str(version.run_id), PREDICTIONS, scratch)))


def _unfit(version: ModelVersion, table: pd.DataFrame) -> str:
    """Return why a version must not become champion whatever its score; empty if nothing forbids it."""
    protocols = sorted(set(table["protocol"]))
    if protocols != ["strict"]:
        return f"Version {version.version} was scored under {', '.join(protocols)}, not strict."
    if version.tags.get("cfusion.outcomes", "real") != "real":
        return f"Version {version.version} was trained on permuted outcomes."
    return ""


def _differs(table: pd.DataFrame, other: pd.DataFrame, champion: str) -> str:
    """Return why two tables cannot be compared; empty if they can."""
    cohorts = [", ".join(sorted(set(frame["cohort"]))) for frame in (table, other)]
    if cohorts[0] != cohorts[1]:
        return f"Not comparable: it was scored on {cohorts[0]}, champion {champion} on {cohorts[1]}."
    columns = ["case_id", "survival_months", "event"]
    patients = [set(frame[columns].itertuples(index=False, name=None)) for frame in (table, other)]
    if patients[0] != patients[1]:
        only = [len(patients[0] - patients[1]), len(patients[1] - patients[0])]
        return (
            f"Not comparable: its patients are not those of champion {champion}. {only[0]} of its {len(patients[0])} "
            f"are missing from the champion's or have another outcome there; {only[1]} of the champion's "
            f"{len(patients[1])} are missing here or have another outcome."
        )
    return ""


def _scored(table: pd.DataFrame, what: str, replicates: int) -> tuple[float, float, str]:
    """Return the C-index within folds, the lower end of its interval, and a line that reports both."""
    row = score(table, bootstrap=replicates).summary.iloc[0]
    value = float(row["cindex_within"])
    line = (
        f"{what}: strict C within folds {value:.3f} [{row['within_low']:.3f}, {row['within_high']:.3f}] on {row['n']} "
        f"patients of {row['cohort']} with {row['events']} events."
    )
    return value, float(row["within_low"]), line


def _paired(table: pd.DataFrame, other: pd.DataFrame, replicates: int) -> str:
    """Report the paired bootstrap comparison on the same patients; the seeds of the runs are ignored."""
    frames = [frame.assign(model=name, seed=0) for frame, name in ((other, "champion"), (table, "challenger"))]
    row = compare(pd.concat(frames, ignore_index=True), reference="champion", replicates=replicates).iloc[0]
    sure = "statistically significant" if row["p"] < 0.05 else "not statistically significant"
    return (
        f"Paired, within folds: {row['difference']:+.3f} [{row['low']:.3f}, {row['high']:.3f}], p = {row['p']:.3f}, "
        f"{sure}."
    )

"""A cohort with a known true risk, and predictions of a model that sees it."""

import numpy as np
import pandas as pd

from cfusion.survival.bins import TimeBins
from cfusion.types import Cohort, Split


def cohort(size: int, seed: int = 0) -> Cohort:
    """Patients p0, p1, … with one slide each; `truth` is the log hazard."""
    generator = np.random.default_rng(seed)
    index = pd.Index([f"p{i}" for i in range(size)], name="case_id")
    truth = generator.normal(size=size)
    happens, leaves = generator.exponential(30 * np.exp(-truth)), generator.exponential(40, size)
    cases = pd.DataFrame(
        {"time_months": np.minimum(happens, leaves), "event": happens < leaves, "truth": truth}, index=index
    )
    slides = pd.DataFrame({"case_id": index}, index=pd.Index([f"{c}-s" for c in index], name="slide_id"))
    return Cohort("made_up", cases, slides)


def predicted(full: Cohort, splits: list[Split], model: str, protocol: str, noise: float = 0.0) -> pd.DataFrame:
    """Out-of-fold predictions with discrete survival curves; `noise` hides the truth from the model."""
    generator = np.random.default_rng(len(model))
    frames = []
    for split in splits:
        train, test = full.cases.loc[list(split.train)], full.cases.loc[list(split.test)]
        edges = np.array(TimeBins.fit(train["time_months"], train["event"], 4).right_edges_months)
        seen = test["truth"].to_numpy() + noise * generator.normal(size=len(test))
        survival = np.exp(-np.outer(np.exp(np.clip(seen, -9, 9)), edges / 30))
        frame = pd.DataFrame({
            "model": model, "cohort": full.name, "protocol": protocol, "seed": 7,
            "repeat": split.repeat, "fold": split.fold,
            "case_id": test.index, "risk": -survival.sum(axis=1), "risk_cutoff": -2.0,
            "survival_months": test["time_months"].to_numpy(), "event": test["event"].to_numpy(),
        })  # fmt: skip
        columns = {f"survival_{k + 1}": survival[:, k] for k in range(4)} | {
            f"edge_{k + 1}": edges[k] for k in range(4)
        }
        frames.append(frame.assign(**columns))
    return pd.concat(frames, ignore_index=True)

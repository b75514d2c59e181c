"""The site of a patient is read from the shards' embeddings where it left its mark on them."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
from factories import make_cohort

from cfusion.cohort.read import read_cohort
from cfusion.data.shards import ShardDataset
from cfusion.runs.site_embeddings import sites_in_embeddings


def test_a_site_with_another_stain_is_read(tmp_path: Path) -> None:
    files = make_cohort(tmp_path / "cohort", patients=40)
    config = files.config(tmp_path / "run")
    cohort = read_cohort(config.cohort)
    dataset = ShardDataset.open(files.shards)
    first = {slide: float(dataset.read(slide, ["x20"])["x20"][:, 0].mean()) for slide in dataset.slide_ids}
    stain = pd.Series(first).groupby(cohort.slides["case_id"]).mean().loc[cohort.cases.index]
    marked = np.where(stain > stain.median(), "north", "south")
    planted = sites_in_embeddings(config, dataclasses.replace(cohort, cases=cohort.cases.assign(site=marked)))
    assert planted is not None
    assert planted.patients == 40
    assert planted.p < 0.01
    plain = np.random.default_rng(3).permutation(marked)
    without = sites_in_embeddings(config, dataclasses.replace(cohort, cases=cohort.cases.assign(site=plain)))
    assert without is not None
    assert without.accuracy < planted.accuracy
    assert without.p > 0.05
    assert sites_in_embeddings(config, cohort) is None

"""Test that folds which cannot be trained, or should not be trusted, are found by the audit."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from cfusion.cohort.audit import audit
from cfusion.cohort.splits import make_splits
from cfusion.config import SplitsConfig
from cfusion.errors import DataError
from cfusion.survival.bins import TimeBins
from cfusion.types import Cohort, Split


def cohort(sizes: list[int], share: list[float], seed: int = 0) -> Cohort:
    """Sites of the given sizes with the given shares of events."""
    generator = np.random.default_rng(seed)
    site = np.repeat([f"S{i}" for i in range(len(sizes))], sizes)
    event = np.concatenate([np.arange(n) < round(n * p) for n, p in zip(sizes, share, strict=True)])
    cases = pd.DataFrame(
        # The living are followed longer than the dead have lived, as in a real cohort.
        {"time_months": generator.uniform(1, 80, len(site)) * np.where(event, 0.5, 1), "event": event, "site": site},
        index=pd.Index([f"p{i}" for i in range(len(site))], name="case_id"),
    )
    return Cohort("made_up", cases, pd.DataFrame({"case_id": []}, index=pd.Index([], name="slide_id")))


def checked(made: Cohort, **settings: object) -> tuple[list[Split], dict[str, int], list[str]]:
    found = audit(made, lambda: make_splits(made, SplitsConfig(**settings)))
    return found.splits, found.counts(), [str(finding) for finding in found.findings]


def test_as_many_sites_as_folds_leave_an_inner_validation() -> None:
    splits, counts, _ = checked(cohort([24] * 5, [0.5] * 5), scheme="site")
    assert [(len(s.train), len(s.validation), len(s.test)) for s in splits] == [(72, 24, 24)] * 5
    assert counts == {}


def test_too_few_sites_are_refused_with_a_remedy() -> None:
    with pytest.raises(DataError, match=r"3 sites are too few for 5 folds.*Set splits\.folds to 3 or fewer"):
        checked(cohort([30] * 3, [0.5] * 3), scheme="site")
    with pytest.raises(DataError, match=r"1 sites are too few .*splits\.scheme=stratified"):
        checked(cohort([40, 40], [0.5, 0.5]), scheme="site", folds=2)


def test_a_site_larger_than_a_fold_is_doubted_and_does_not_choose() -> None:
    splits, counts, lines = checked(cohort([90, 6, 6, 6, 6, 6], [0.4] + [0.5] * 5), scheme="site")
    assert counts["uneven_folds"] == 1
    large = next(line for line in lines if "uneven_folds" in line)
    assert "scores 90 patients, where the mean fold scores 24; 90 of them are of one site, S0" in large
    for split in splits:
        assert len(split.validation) < len(split.train)


@pytest.mark.parametrize("seed", range(5))
def test_the_inner_validation_of_site_folds_has_its_share_of_events(seed: int) -> None:
    """As BRCA: many sites whose shares of events differ. The first drawn part had 8 of 90 events where 17 are due."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(5, 60, 30).tolist()
    made = cohort(sizes, generator.beta(1, 7, 30).tolist(), seed)
    for split in make_splits(made, SplitsConfig(scheme="site")):
        inner = made.cases.loc[[*split.train, *split.validation], "event"]
        due = 0.2 * inner.sum()
        assert 0.6 * due <= inner[list(split.validation)].sum() <= 1.5 * due


def test_a_side_with_too_few_events_for_its_size_is_doubted() -> None:
    made = cohort([400], [0.2])
    ids = made.cases.index
    happened, censored = ids[made.cases["event"]].tolist(), ids[~made.cases["event"]].tolist()
    split = Split(0, tuple(happened[:50] + censored[:180]), tuple(happened[50:58] + censored[180:250]),
                  tuple(happened[58:] + censored[250:]))  # fmt: skip
    (finding,) = audit(made, [split]).findings
    assert finding.kind == "few_events"
    assert finding.message.startswith("chooses with 8 events among 78 patients, where 15 would be their share")
    swapped = dataclasses.replace(split, validation=split.test, test=split.validation)
    assert [f.message.split(" ")[0] for f in audit(made, [swapped]).findings] == ["scores"]


def test_a_side_that_chooses_with_more_patients_than_train_is_doubted() -> None:
    made = cohort([200], [0.5])
    ids = tuple(np.random.default_rng(1).permutation(made.cases.index))
    found = audit(made, [Split(0, ids[:40], ids[40:140], ids[140:])]).findings
    (finding,) = [finding for finding in found if finding.kind == "uneven_folds"]
    assert finding.message == "trains with 40 patients and chooses the model with 100"


@pytest.mark.parametrize("times", [[12.0] * 30 + [1.0, 2.0, 3.0, 30.0], [6.0] * 12 + [12.0] * 12 + [18.0, 24.0, 30.0]])
def test_tied_times_that_training_refuses_are_found_by_the_audit(times: list[float]) -> None:
    made = cohort([200], [0.5])
    happened = np.flatnonzero(made.cases["event"])
    tied = made.cases.copy()
    tied.iloc[happened, 0] = np.resize(times, len(happened))
    ids = tied.index.to_numpy()
    split = Split(0, tuple(np.delete(ids, np.s_[::5])), (), tuple(ids[::5]))
    train = tied.loc[list(split.train)]
    with pytest.raises(DataError, match="coincide"):
        TimeBins.fit(train["time_months"], train["event"], 4)
    with pytest.raises(DataError, match=r"cohort made_up, fold 0: the quantiles of \d+ event times coincide"):
        audit(dataclasses.replace(made, cases=tied), [split])

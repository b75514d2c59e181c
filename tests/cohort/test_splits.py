"""Test that splits are disjoint, complete, balanced, reproducible, and unchanged by writing and reading."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cfusion.cohort.read import read_cohort
from cfusion.cohort.splits import fold_count, make_splits, read_splits, splits_digest, write_splits
from cfusion.config import CohortConfig, SplitsConfig
from cfusion.errors import ConfigError, DataError
from cfusion.types import Cohort, Split

COHORTS = ("blca", "brca", "coad", "gbmlgg", "luad", "ucec")


def cohort_of(tcga: Path, name: str) -> Cohort:
    return read_cohort(CohortConfig(name=name, table=tcga / f"clinical/tcga_{name}.csv"))


def made_up(size: int, event_rate: float, sites: int = 12, seed: int = 0) -> Cohort:
    generator = np.random.default_rng(seed)
    index = pd.Index([f"p{i:04d}" for i in range(size)], name="case_id")
    cases = pd.DataFrame(
        {
            "time_months": generator.exponential(30, size),
            "event": generator.random(size) < event_rate,
            "site": [f"s{i}" for i in generator.integers(0, sites, size)],
        },
        index=index,
    )
    slides = pd.DataFrame({"case_id": index}, index=pd.Index([f"{c}-1" for c in index], name="slide_id"))
    return Cohort("made_up", cases, slides)


@pytest.mark.parametrize("name", COHORTS)
@pytest.mark.parametrize("protocol", ["strict", "fixed-epoch", "published"])
def test_published_folds_under_each_protocol(tcga: Path, name: str, protocol: str) -> None:
    cohort = cohort_of(tcga, name)
    folds = make_splits(cohort, SplitsConfig(directory=tcga / f"splits/tcga_{name}"), protocol)
    assert [split.fold for split in folds] == [0, 1, 2, 3, 4]
    tested = [case for split in folds for case in split.test]
    assert len(tested) == len(set(tested))
    for split in folds:
        train, validation, test = set(split.train), set(split.validation), set(split.test)
        assert not train & test
        assert not train & validation
        if protocol == "published":
            assert validation == test
        elif protocol == "fixed-epoch":
            assert not validation
        else:
            assert not validation & test
            inner = cohort.cases.loc[list(split.validation)]
            outer = cohort.cases.loc[[c for c in split.train if c in cohort.cases.index]]
            assert 0.1 < len(inner) / (len(inner) + len(outer)) < 0.3
            assert abs(inner["event"].mean() - outer["event"].mean()) < 0.05


def test_protocols_share_the_outer_folds(tcga: Path) -> None:
    cohort = cohort_of(tcga, "blca")
    strict, fixed, published = (
        make_splits(cohort, SplitsConfig(), protocol) for protocol in ("strict", "fixed-epoch", "published")
    )
    for a, b, c in zip(strict, fixed, published, strict=True):
        assert a.test == b.test == c.test
        assert set(a.train) | set(a.validation) == set(b.train) == set(c.train)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(40, 300), rate=st.floats(0.3, 0.9), folds=st.integers(2, 6), seed=st.integers(0, 99))
def test_drawn_folds_partition_the_patients(size: int, rate: float, folds: int, seed: int) -> None:
    cohort = made_up(size, rate, seed=seed)
    # With fewer events, a part of the inner validation split has none, which is refused (tested elsewhere).
    assume(cohort.cases["event"].sum() >= max(4 * folds, 16))
    drawn = make_splits(cohort, SplitsConfig(folds=folds, seed=seed))
    tested = [case for split in drawn for case in split.test]
    assert sorted(tested) == sorted(cohort.cases.index)
    rates = []
    for split in drawn:
        sides = [set(split.train), set(split.validation), set(split.test)]
        assert sum(len(side) for side in sides) == len(cohort.cases) == len(set.union(*sides))
        rates.append(cohort.cases.loc[list(split.test), "event"].sum())
    assert max(rates) - min(rates) <= 4


def test_drawn_folds_are_stratified_by_time() -> None:
    cohort = made_up(500, 0.4)
    events = cohort.cases[cohort.cases["event"]]
    cut = events["time_months"].median()
    for split in make_splits(cohort, SplitsConfig()):
        happened = events.loc[[case for case in split.test if case in events.index], "time_months"]
        assert abs((happened > cut).mean() - 0.5) < 0.06


@pytest.mark.parametrize("name", COHORTS)
def test_site_preserving_folds(tcga: Path, name: str) -> None:
    cohort = cohort_of(tcga, name)
    site = cohort.cases["site"]
    for split in make_splits(cohort, SplitsConfig(scheme="site")):
        sides = [set(site[list(side)]) for side in (split.train, split.validation, split.test)]
        assert not sides[0] & sides[2]
        assert not sides[0] & sides[1]
        assert not sides[1] & sides[2]
        assert cohort.cases.loc[list(split.test), "event"].any()


def test_site_folds_need_sites() -> None:
    cohort = made_up(100, 0.5)
    bare = Cohort("bare", cohort.cases.drop(columns="site"), cohort.slides)
    with pytest.raises(DataError, match="needs the site of every patient"):
        make_splits(bare, SplitsConfig(scheme="site"))
    with pytest.raises(DataError, match="3 sites are too few for 5 folds"):
        make_splits(made_up(100, 0.5, sites=3), SplitsConfig(scheme="site"))


def test_repeats_differ_and_repeat() -> None:
    cohort = made_up(120, 0.4)
    config = SplitsConfig(repeats=3)
    first = make_splits(cohort, config)
    assert [(s.repeat, s.fold) for s in first] == [(r, f) for r in range(3) for f in range(5)]
    assert first[0].test != first[5].test
    assert splits_digest(first) == splits_digest(make_splits(cohort, config))
    assert splits_digest(first) != splits_digest(make_splits(cohort, SplitsConfig(repeats=3, seed=8)))


def test_nested_folds_never_touch_the_outer_test() -> None:
    cohort = made_up(200, 0.4)
    outer = make_splits(cohort, SplitsConfig(), "fixed-epoch")[2]
    inner = make_splits(cohort, SplitsConfig(within=2))
    everyone = {case for split in inner for case in (*split.train, *split.validation, *split.test)}
    assert everyone == set(outer.train)
    assert sorted(case for split in inner for case in split.test) == sorted(outer.train)
    with pytest.raises(ConfigError, match=r"splits\.within=9"):
        make_splits(cohort, SplitsConfig(within=9))


def test_fixed_external_test(tmp_path: Path) -> None:
    cohort = made_up(80, 0.5)
    chosen = list(cohort.cases.index[:20])
    table = tmp_path / "test.csv"
    table.write_text("case_id\n" + "\n".join(chosen), encoding="utf-8")
    (split,) = make_splits(cohort, SplitsConfig(test_cases=table))
    assert split.test == tuple(chosen)
    assert not set(chosen) & {*split.train, *split.validation}
    table.write_text("case_id\nnobody\n", encoding="utf-8")
    with pytest.raises(DataError, match="1 patients are not in cohort made_up, such as nobody"):
        make_splits(cohort, SplitsConfig(test_cases=table))


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("protocol", ["strict", "fixed-epoch", "published"])
def test_written_splits_read_back(tmp_path: Path, repeats: int, protocol: str) -> None:
    cohort = made_up(90, 0.5)
    drawn = make_splits(cohort, SplitsConfig(repeats=repeats), protocol)
    digest = write_splits(drawn, tmp_path / "splits")
    again = make_splits(cohort, SplitsConfig(directory=tmp_path / "splits"), protocol)
    assert splits_digest(again) == digest == splits_digest(drawn)
    assert digest in (tmp_path / "splits" / "splits.json").read_text()


def test_folds_that_do_not_match_their_digest_are_refused(tmp_path: Path) -> None:
    write_splits(make_splits(made_up(90, 0.5), SplitsConfig()), tmp_path / "splits")
    path = tmp_path / "splits" / "splits_1.csv"
    table = pd.read_csv(path, index_col=0, dtype=str)
    table.loc[0, ["train", "test"]] = table.loc[0, ["test", "train"]].to_numpy()
    table.to_csv(path)
    with pytest.raises(DataError, match=r"the folds do not match the digest in splits\.json"):
        read_splits(tmp_path / "splits")
    (tmp_path / "splits" / "splits.json").unlink()
    assert len(read_splits(tmp_path / "splits")) == 5


def test_optimistic_files_do_not_leak_into_other_protocols(tmp_path: Path) -> None:
    cohort = made_up(90, 0.5)
    write_splits(make_splits(cohort, SplitsConfig(), "published"), tmp_path / "splits")
    for protocol in ("strict", "fixed-epoch", "published"):
        for split in make_splits(cohort, SplitsConfig(directory=tmp_path / "splits"), protocol):
            assert not set(split.train) & set(split.test)
            if protocol == "strict":
                assert split.validation
                assert not set(split.validation) & set(split.test)


def test_digest_ignores_order_within_a_side() -> None:
    a = Split(0, ("p1", "p2"), ("p3",), ("p4", "p5"))
    b = Split(0, ("p2", "p1"), ("p3",), ("p5", "p4"))
    c = Split(0, ("p1", "p3"), ("p2",), ("p4", "p5"))
    assert splits_digest([a]) == splits_digest([b]) != splits_digest([c])


def test_too_few_events() -> None:
    cohort = made_up(60, 0.0)
    with pytest.raises(DataError, match=r"0 events are too few for 5 folds.*Check the column of the event"):
        make_splits(cohort, SplitsConfig())


def test_a_training_side_too_small_to_choose_the_epoch_names_the_protocol_that_needs_no_choice() -> None:
    cohort = made_up(36, 0.0)
    cohort.cases.iloc[::8, cohort.cases.columns.get_loc("event")] = True
    with pytest.raises(
        DataError, match=r"a training side has 18 patients with [23] events, too few to set 1 in 5"
    ) as no:
        make_splits(cohort, SplitsConfig(folds=2))
    assert "evaluation.protocol=fixed-epoch" in no.value.remedy
    assert len(make_splits(cohort, SplitsConfig(folds=2), "fixed-epoch")) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("train,test\na,b\n", "expected the columns train and val"), ("train,val\na,\n", "the val column is empty")],
)
def test_bad_split_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "splits_0.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_splits(tmp_path)
    with pytest.raises(ConfigError, match=r"has no splits_K\.csv"):
        read_splits(tmp_path / "nothing")


def test_one_selected_fold_equals_that_fold_of_all(tcga: Path):
    cohort = cohort_of(tcga, "blca")
    config = SplitsConfig(directory=tcga / "splits/tcga_blca")
    all_folds = make_splits(cohort, config)
    assert make_splits(cohort, config.model_copy(update={"fold": 3})) == [all_folds[3]]
    with pytest.raises(ConfigError, match=r"splits\.fold=5: no such fold; expected 0 to 4"):
        make_splits(cohort, config.model_copy(update={"fold": 5}))


def test_the_fold_count_matches_the_folds(tmp_path: Path) -> None:
    cohort = made_up(120, 0.7)
    (tmp_path / "test.csv").write_text("case_id\np0000\np0001\np0002\n")
    write_splits(make_splits(cohort, SplitsConfig(folds=4)), tmp_path / "drawn")
    write_splits(make_splits(cohort, SplitsConfig(folds=3, repeats=2)), tmp_path / "repeated")
    outer = [
        {}, {"folds": 3, "repeats": 2}, {"directory": tmp_path / "drawn"}, {"directory": tmp_path / "repeated"},
        {"test_cases": tmp_path / "test.csv"}, {"test_cases": tmp_path / "test.csv", "repeats": 3},
    ]  # fmt: skip
    counted = []
    for chosen in outer:
        for one in ({}, {"fold": 0}, {"within": 0}, {"within": 0, "fold": 1}):
            config = SplitsConfig(**chosen, **one)
            counted.append(fold_count(config))
            assert counted[-1] == len(make_splits(cohort, config)), config
    assert counted[:4] == [5, 1, 5, 1]
    assert counted[-4:-2] == [3, 3]


def test_a_split_with_one_patient_who_chooses_and_is_scored_is_optimistic():
    assert Split(0, ("p1",), ("p2",), ("p3", "p4")).protocol == "strict"
    assert Split(0, ("p1",), ("p2", "p3"), ("p3", "p4")).protocol == "published"
    assert Split(0, ("p1", "p2"), (), ("p3", "p4")).protocol == "fixed-epoch"

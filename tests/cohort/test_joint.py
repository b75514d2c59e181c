"""Several cohorts as one: whose patient is whose, and folds that join those of each cohort."""

import pandas as pd
import pytest
from factories import joint_config, make_cohorts

import cfusion
from cfusion.cohort.audited import audited
from cfusion.cohort.joint import join_cohorts, read_cohorts
from cfusion.cohort.permutation import permuted
from cfusion.cohort.read import read_cohort
from cfusion.cohort.splits import make_splits, write_splits
from cfusion.config import Config
from cfusion.errors import CohortError, ConfigError, DataError
from cfusion.types import Cohort

COHORTS = ("tcga_blca", "tcga_brca", "tcga_coad", "tcga_gbmlgg", "tcga_luad", "tcga_ucec")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_cohorts(tmp_path_factory.mktemp("cohorts"))


@pytest.fixture(scope="module")
def config(files, tmp_path_factory) -> Config:
    return joint_config(files, tmp_path_factory.mktemp("out"))


def cohort(name: str, cases: list[str], slides: dict[str, str] | None = None) -> Cohort:
    table = pd.DataFrame({"time_months": 1.0, "event": True}, index=pd.Index(cases, name="case_id"))
    slides = {f"{case}-1": case for case in cases} if slides is None else slides
    return Cohort(name, table, pd.DataFrame({"case_id": pd.Series(slides, dtype=object)}).rename_axis("slide_id"))


def test_the_parts_of_a_joint_cohort_are_the_cohorts(config):
    joint = read_cohorts(config)
    assert joint.name == "both"
    for part in joint.parts():
        single = read_cohort(config.cohorts[part.name])
        pd.testing.assert_frame_equal(part.cases, single.cases)
        pd.testing.assert_frame_equal(part.slides, single.slides)
    assert [part.name for part in joint.parts()] == ["short", "long"]


@pytest.mark.parametrize("twin", ["P2", "p2 "])
def test_a_patient_in_two_cohorts_is_refused_in_any_spelling(twin):
    with pytest.raises(
        CohortError, match=r"1 patients of two are in another cohort too, such as .2 ?, who is also in one"
    ):
        join_cohorts("both", [cohort("one", ["P1", "P2"]), cohort("two", ["P3", twin], {})])


def test_a_list_of_slides_that_cohorts_share_counts_once_and_a_contradiction_is_refused():
    shared = {"a": "P1", "b": "P2", "c": "P9"}
    joint = join_cohorts("both", [cohort("one", ["P1"], shared), cohort("two", ["P2"], shared)])
    assert list(joint.slides.index) == ["a", "b", "c"]
    one, two = joint.parts()
    assert list(two.slides.index) == ["b"]
    assert "a" in one.slides.index
    with pytest.raises(CohortError, match="slide a belongs to P1 in one cohort and to P2 in two"):
        join_cohorts("both", [cohort("one", ["P1"], {"a": "P1"}), cohort("two", ["P2"], {"a": "P2"})])


@pytest.mark.parametrize("protocol", ["strict", "fixed-epoch", "published"])
def test_each_cohort_has_the_folds_that_it_has_by_itself(config, protocol):
    joint = read_cohorts(config)
    splits = make_splits(joint, config.splits, protocol)
    for part in joint.parts():
        own = set(part.cases.index)
        for together, single in zip(splits, make_splits(part, config.splits, protocol), strict=True):
            for side in ("train", "validation", "test"):
                assert {case for case in getattr(together, side) if case in own} == set(getattr(single, side))


def test_published_folds_of_each_cohort_are_joined_by_their_number(files, tmp_path):
    drawn = joint_config(files, tmp_path)
    joint = read_cohorts(drawn)
    folders = {}
    for part in joint.parts():
        folders[part.name] = str(tmp_path / part.name)
        write_splits(make_splits(part, drawn.splits), tmp_path / part.name)
    published = joint_config(files, tmp_path, splits={"directory": folders})
    assert [set(s.test) for s in make_splits(joint, published.splits)] == [
        set(s.test) for s in make_splits(joint, drawn.splits)
    ]
    (tmp_path / "long" / "splits_2.csv").unlink()
    (tmp_path / "long" / "splits.json").unlink()
    with pytest.raises(ConfigError, match="long: has the folds 0, 1, and short has 0, 1, 2"):
        make_splits(joint, published.splits)


def test_a_cohort_left_out_is_scored_once_and_never_trained_on(files, tmp_path):
    config = joint_config(files, tmp_path, splits={"scheme": "cohort"})
    found = audited(config, read_cohorts(config))
    assert [split.protocol for split in found.splits] == ["strict", "strict"]
    for split, part in zip(found.splits, found.cohort.parts(), strict=True):
        own = set(part.cases.index)
        assert set(split.test) == own
        assert own.isdisjoint((*split.train, *split.validation))
    assert not [finding for finding in found.findings if finding.kind == "uneven_folds"]
    one = read_cohort(config.cohorts["short"])
    with pytest.raises(ConfigError, match="leaves out one of several cohorts; short is one"):
        make_splits(one, config.splits)


def test_outcomes_are_permuted_within_each_cohort(config):
    joint = read_cohorts(config)
    shuffled = permuted(joint, 3)
    assert not shuffled.cases["time_months"].equals(joint.cases["time_months"])
    for before, after in zip(joint.parts(), shuffled.parts(), strict=True):
        assert sorted(before.cases["time_months"]) == sorted(after.cases["time_months"])


def test_a_cohort_that_cannot_fill_its_bins_is_named(files, tmp_path):
    config = joint_config(files, tmp_path, evaluation={"n_bins": 20})
    with pytest.raises(DataError, match=r"cohort (short|long), fold 0: .* 20 time bins"):
        audited(config, read_cohorts(config))


@pytest.mark.slow
def test_the_shipped_configuration_joins_the_six_published_cohorts():
    config = cfusion.load_config("configs/pancancer.yaml")
    found = audited(config, cfusion.read_cohorts(config))
    assert found.cohort.stratum_names == COHORTS
    assert len(found.splits) == 5
    for part in found.cohort.parts():
        single = audited(config.of_cohort(part.name), read_cohort(config.cohorts[part.name]))
        assert set(part.cases.index) == set(single.cohort.cases.index)
        for together, own in zip(found.splits, single.splits, strict=True):
            assert set(own.test) == set(together.test) & set(part.cases.index)


REFUSED = {
    "splits.scheme=cohort needs cohorts": {"cohorts": {}, "splits": {"scheme": "cohort"}},
    "splits.directory by cohort needs cohorts": {"cohorts": {}, "splits": {"directory": {"a": "x"}}},
    "cohorts has only a": {"cohorts": {"a": {}}},
    "cohort.name=a is also one of cohorts": {"cohort": {"name": "a"}},
    "cohort.table does not go with cohorts; set cohorts.a.table": {"cohort": {"name": "both", "table": "x.csv"}},
    "cohorts.b='b.csv': Input should be": {"cohorts": {"a": {}, "b": "b.csv"}},
    "unknown key cohorts.b.tabel. Did you mean cohorts.b.table": {"cohorts": {"a": {}, "b": {"tabel": "b.csv"}}},
    "cohorts.a.name=b: a cohort is named by its key": {"cohorts": {"a": {"name": "b"}, "c": {}}},
    "one model has one end point": {"cohorts": {"a": {}, "b": {"endpoint": "DSS"}}},
    "splits.directory lacks b": {"splits": {"directory": {"a": "x"}}},
    "splits.directory names c": {"splits": {"directory": {"a": "x", "b": "y", "c": "z"}}},
    "a fold for each of the 2 cohorts": {"splits": {"scheme": "cohort", "folds": 5}},
    "splits.test_cases does not go with it": {"splits": {"scheme": "cohort", "test_cases": "x.csv"}},
    "does not go with evaluation.protocol=published": {
        "splits": {"scheme": "cohort"}, "evaluation": {"protocol": "published"},
    },
    "train.start_unchecked=true needs train.start_from": {"train": {"start_unchecked": True}},
    "one of the folders stands in the list twice": {"data": {"shards": ["a", "a"]}},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_contradictions_are_refused(message):
    from cfusion.config import validate

    values = {"cohort": {"name": "both"}, "cohorts": {"a": {}, "b": {}}, **REFUSED[message]}
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        validate(Config, values, "test")


def test_a_configuration_is_written_and_read_back_the_same(config):
    from cfusion.config import validate

    assert validate(Config, config.model_dump(mode="json"), "test") == config

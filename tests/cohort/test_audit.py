"""Test that the audit reports everything it drops, and that no patient is in both training and test."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cfusion.cohort.audit import audit
from cfusion.cohort.read import read_cohort
from cfusion.cohort.splits import make_splits
from cfusion.config import CohortConfig, SplitsConfig
from cfusion.errors import DataError
from cfusion.types import Cohort, Split


@pytest.fixture
def cohort() -> Cohort:
    generator = np.random.default_rng(1)
    index = pd.Index([f"p{i}" for i in range(60)], name="case_id")
    event = np.arange(60) % 2 == 0
    time = np.where(event, generator.uniform(1, 30, 60), generator.uniform(20, 90, 60))
    cases = pd.DataFrame({"time_months": time, "event": event}, index=index)
    slides = pd.DataFrame({"case_id": index}, index=pd.Index([f"{case}-s" for case in index], name="slide_id"))
    return Cohort("made_up", cases, slides)


@pytest.fixture
def split() -> Split:
    names = [f"p{i}" for i in range(60)]
    return Split(0, tuple(names[:36]), tuple(names[36:46]), tuple(names[46:]))


def with_cases(cohort: Cohort, **columns: dict[str, object]) -> Cohort:
    cases = cohort.cases.copy()
    for column, values in columns.items():
        if column == "event":
            cases["event"] = cases["event"].astype("boolean")
        for case, value in values.items():
            cases.loc[case, column] = value
    return dataclasses.replace(cohort, cases=cases)


def test_a_clean_cohort_passes_unchanged(cohort: Cohort, split: Split) -> None:
    found = audit(cohort, [split])
    assert not found.findings
    assert found.splits == [split]
    found.raise_if_strict()
    pd.testing.assert_frame_equal(found.cohort.cases, cohort.cases)


@pytest.mark.parametrize(
    ("column", "value", "kind"),
    [
        ("time_months", np.nan, "missing_time"),
        ("time_months", -2.0, "negative_time"),
        ("time_months", 0.0, "zero_time"),
        ("event", pd.NA, "unknown_event"),
    ],
)
def test_bad_outcomes_are_dropped_and_named(
    cohort: Cohort, split: Split, column: str, value: object, kind: str
) -> None:
    found = audit(with_cases(cohort, **{column: {"p3": value}}), [split])
    assert [(f.kind, f.subject, f.action) for f in found.findings] == [(kind, "p3", "dropped")]
    assert "p3" not in found.cohort.cases.index
    assert "p3" not in found.splits[0].train
    assert "p3-s" not in found.cohort.slides.index
    assert found.cohort.cases["event"].dtype == bool
    with pytest.raises(DataError, match=rf"1 findings \(1 {kind}\); first: p3"):
        found.raise_if_strict()


def test_lines_count_the_findings_they_omit(cohort: Cohort, split: Split) -> None:
    found = audit(with_cases(cohort, time_months={f"p{i}": 0.0 for i in range(5)} | {"p9": -1.0}), [split])
    lines = found.lines(2)
    assert len(lines) == 4
    assert lines[0].startswith("dropped: p0 has a follow-up of 0")
    assert lines[2] == "… and 3 more [zero_time]"
    assert lines[3] == "dropped: p9 has a follow-up of -1 months [negative_time]"


def test_zero_times_stay_where_asked(cohort: Cohort, split: Split) -> None:
    zero = with_cases(cohort, time_months={"p3": 0.0})
    assert not audit(zero, [split], keep_zero_times=True).findings


def test_missing_features_and_magnifications(cohort: Cohort, split: Split) -> None:
    available = {slide: {"x20", "x10", "x5"} for slide in cohort.slides.index}
    del available["p0-s"]
    available["p1-s"] = {"x20", "x5"}
    found = audit(cohort, [split], available=available, magnifications=("x20", "x10", "x5"))
    assert [(f.kind, f.subject) for f in found.findings] == [
        ("missing_features", "p0-s"),
        ("missing_magnification", "p1-s"),
        ("no_slides", "p0"),
        ("no_slides", "p1"),
    ]
    assert "x10" in found.findings[1].message
    assert found.flow == [
        ("in the tables", 60, 60), ("with a usable outcome", 60, 60), ("with features", 58, 58),
        ("in the splits", 58, 58),
    ]  # fmt: skip


def test_a_second_slide_keeps_its_patient(cohort: Cohort, split: Split) -> None:
    extra = pd.DataFrame({"case_id": ["p0"]}, index=pd.Index(["p0-t"], name="slide_id"))
    two = dataclasses.replace(cohort, slides=pd.concat([cohort.slides, extra]))
    available = {slide: {"x20"} for slide in two.slides.index if slide != "p0-s"}
    found = audit(two, [split], available=available, magnifications=("x20",))
    assert [f.kind for f in found.findings] == ["missing_features"]
    assert found.cohort.slides_of(["p0"]) == {"p0": ("p0-t",)}


def test_slides_by_their_names_where_the_tables_name_none() -> None:
    index = pd.Index([f"TCGA-AA-{i:04d}" for i in range(40)], name="case_id")
    cases = pd.DataFrame({"time_months": np.arange(1.0, 41), "event": np.arange(40) % 2 == 0}, index=index)
    bare = Cohort("bare", cases, pd.DataFrame({"case_id": []}, index=pd.Index([], name="slide_id")))
    available = {f"{case}-01Z-00-DX1.X": {"x20"} for case in index[:38]} | {"TCGA-ZZ-0001-01Z": {"x20"}}
    named = cases.set_axis(pd.Index([f"H{i}" for i in range(40)], name="case_id"))
    of_hospital = audit(
        dataclasses.replace(bare, cases=named),
        [],
        available={f"H{i}_2": {"x20"} for i in range(7, 38)} | {"H77": {"x20"}},
    )
    assert of_hospital.cohort.slides["case_id"].to_dict() == {f"H{i}_2": f"H{i}" for i in range(7, 38)}
    found = audit(bare, [], available=available, magnifications=("x20",))
    assert found.cohort.slides["case_id"].tolist() == index[:38].tolist()
    assert found.counts() == {"no_slides": 2}
    assert found.flow == [("in the tables", 40, 38), ("with a usable outcome", 40, 38), ("with features", 38, 38)]


def test_duplicates_and_slides_without_outcome(cohort: Cohort, split: Split) -> None:
    more = pd.DataFrame({"case_id": ["p0", "q"]}, index=pd.Index(["p0-s", "q-s"], name="slide_id"))
    found = audit(dataclasses.replace(cohort, slides=pd.concat([cohort.slides, more])), [split])
    assert found.counts() == {"duplicate_slide": 1, "no_outcome": 1}
    assert found.cohort.slides.index.is_unique


def test_patients_whose_names_differ_only_in_case_are_doubted(cohort: Cohort, split: Split) -> None:
    names = cohort.cases.index.to_series().replace({"p50": "P1"})
    renamed = dataclasses.replace(
        cohort, cases=cohort.cases.set_axis(pd.Index(names, name="case_id")),
        slides=cohort.slides.assign(case_id=cohort.slides["case_id"].replace({"p50": "P1"})),
    )  # fmt: skip
    swapped = dataclasses.replace(split, test=tuple("P1" if case == "p50" else case for case in split.test))
    (finding,) = audit(renamed, [swapped]).findings
    assert (finding.kind, finding.action) == ("spelling", "doubted")
    assert "such as p1 and P1; if they are one patient" in finding.message


def test_patients_on_both_sides_leave_the_training_side(cohort: Cohort, split: Split) -> None:
    leaking = dataclasses.replace(
        split, train=(*split.train, "p50", "p40"), validation=(*split.validation, "p51"), test=split.test
    )
    found = audit(cohort, [leaking])
    assert {f.subject for f in found.findings} == {"p50", "p40", "p51"}
    assert {f.kind for f in found.findings} == {"both_sides"}
    kept = found.splits[0]
    assert kept.test == split.test
    assert not set(kept.train) & set(kept.test)
    assert not set(kept.train) & set(kept.validation)
    assert not set(kept.validation) & set(kept.test)


def test_the_published_protocol_keeps_its_validation(cohort: Cohort, split: Split) -> None:
    optimistic = dataclasses.replace(split, train=split.train + split.validation, validation=split.test)
    found = audit(cohort, [optimistic])
    assert not found.findings
    assert found.splits[0].validation == split.test


def test_flipped_polarity_is_doubted_with_both_medians(cohort: Cohort, split: Split) -> None:
    flipped = dataclasses.replace(cohort, cases=cohort.cases.assign(event=~cohort.cases["event"]))
    (finding,) = audit(flipped, [split]).findings
    times, event = flipped.cases["time_months"], flipped.cases["event"]
    assert finding.kind == "polarity"
    assert finding.action == "doubted"
    assert f"{times[event].median():.1f}" in finding.message
    assert f"{times[~event].median():.1f}" in finding.message


@pytest.mark.parametrize(("factor", "word"), [(30.4, "days"), (1 / 30, "years")])
def test_wrong_units_are_doubted(cohort: Cohort, split: Split, factor: float, word: str) -> None:
    scaled = dataclasses.replace(cohort, cases=cohort.cases.assign(time_months=cohort.cases["time_months"] * factor))
    findings = audit(scaled, [split]).findings
    assert [f.kind for f in findings] == ["unit"]
    assert word in findings[0].message


def test_folds_that_cannot_be_trained_or_scored_stop_the_run(cohort: Cohort, split: Split) -> None:
    quiet = tuple(case for case in split.test if not cohort.cases.loc[case, "event"])
    with pytest.raises(DataError, match=r"fold 0: the test side has 7 patients and no event"):
        audit(cohort, [dataclasses.replace(split, test=quiet)])
    with pytest.raises(DataError, match=r"fold 0: the validation side has 5 patients and no event"):
        audit(cohort, [dataclasses.replace(split, validation=tuple(f"p{i}" for i in range(37, 46, 2)))])
    last = max(
        (c for c in split.test if cohort.cases.loc[c, "event"]), key=lambda c: cohort.cases.loc[c, "time_months"]
    )
    with pytest.raises(DataError, match="test side has 1 patients, 1 with the event, and no comparable pair"):
        audit(cohort, [dataclasses.replace(split, test=(last,))])
    with pytest.raises(DataError, match=f"{split.test[0]} is scored in fold 0 and in fold 1"):
        audit(cohort, [split, dataclasses.replace(split, fold=1)])
    with pytest.raises(DataError, match=r"18 distinct event times in training cannot fill 19 time bins"):
        audit(cohort, [split], n_bins=19)
    with pytest.raises(DataError, match="the audit leaves no patient"):
        audit(cohort, [split], available={}, magnifications=("x20",))
    censored = dataclasses.replace(cohort, cases=cohort.cases.assign(event=False))
    with pytest.raises(DataError, match="no event"):
        audit(censored, [split])


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("blca", {}), ("coad", {"zero_time": 23}), ("gbmlgg", {}), ("luad", {"not_in_cohort": 9}), ("ucec", {}),
        ("brca", {"not_in_cohort": 85}),
    ],
)  # fmt: skip
def test_published_cohorts(tcga: Path, name: str, counts: dict[str, int]) -> None:
    cohort = read_cohort(CohortConfig(name=name, table=tcga / f"clinical/tcga_{name}.csv"))
    found = audit(cohort, make_splits(cohort, SplitsConfig(directory=tcga / f"splits/tcga_{name}")))
    assert found.counts() == counts
    assert found.to_json()["flow"][0]["patients"] == len(cohort.cases)

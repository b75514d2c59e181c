"""Test that every supported table layout is read into the same cohort, and that errors name the row."""

import json
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from cfusion.cohort.identifiers import patient_of, slide_stem
from cfusion.cohort.portals import DAYS_PER_MONTH
from cfusion.cohort.read import read_cohort, read_outcomes, write_outcomes
from cfusion.config import CohortConfig
from cfusion.errors import ConfigError, DataError
from cfusion.types import Cohort

SIZES = {
    "blca": (373, 437, 169), "brca": (871, 931, 102), "coad": (416, 424, 95),
    "gbmlgg": (569, 1016, 187), "luad": (444, 507, 157), "ucec": (480, 539, 75),
}  # fmt: skip


def write(tmp_path: Path, text: str, name: str = "table.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path, **settings: object) -> Cohort:
    return read_cohort(CohortConfig(name="tcga_test", table=path, **settings))


@pytest.mark.parametrize("name", SIZES)
def test_published_tables(tcga: Path, name: str) -> None:
    cohort = read(tcga / f"clinical/tcga_{name}.csv")
    assert (len(cohort.cases), len(cohort.slides), int(cohort.cases["event"].sum())) == SIZES[name]
    assert cohort.cases["event"].dtype == bool
    assert cohort.cases["time_months"].between(0, 300).all()
    assert cohort.cases["site"].str.fullmatch(r"\w\w").all()
    assert set(cohort.slides["case_id"]) == set(cohort.cases.index)
    assert not cohort.slides.index.str.endswith(".svs").any()


def test_slide_named_table_becomes_patients(tcga: Path) -> None:
    cohort = read(tcga / "clinical/tcga_coad.csv")
    assert cohort.cases.index.str.len().unique().tolist() == [12]
    assert cohort.slides_of(["TCGA-A6-2683"])["TCGA-A6-2683"] == (
        "TCGA-A6-2683-01Z-00-DX1.0dfc5d0a-68f4-45e1-a879-0428313c6dbc",
    )


def test_names() -> None:
    assert patient_of("TCGA-A6-2683-01Z-00-DX1.0dfc5d0a") == "TCGA-A6-2683"
    assert patient_of("patient-7") == "patient-7"
    assert slide_stem("folder/a.b.c.svs") == "a.b.c"
    assert slide_stem("Jose\u0301.qptiff") == "Jos\u00e9"
    assert slide_stem("TCGA-A6-2683-01Z-00-DX1.0dfc5d0a-68f4") == "TCGA-A6-2683-01Z-00-DX1.0dfc5d0a-68f4"


@pytest.mark.parametrize(("unit", "factor"), [("months", 1.0), ("days", 1 / DAYS_PER_MONTH), ("years", 12.0)])
def test_plain_table_units(tmp_path: Path, unit: str, factor: float) -> None:
    path = write(tmp_path, "patient,slide,time,event\na,a1.svs,30,1\na,a2.svs,30,1\nb,b1.ndpi,12,no\n")
    cohort = read(path, time_unit=unit)
    assert cohort.cases["time_months"].tolist() == pytest.approx([30 * factor, 12 * factor])
    assert cohort.cases["event"].tolist() == [True, False]
    assert cohort.slides["case_id"].to_dict() == {"a1": "a", "a2": "a", "b1": "b"}


def test_plain_table_polarity_is_declared(tmp_path: Path) -> None:
    path = write(tmp_path, "patient,slide,time,event\na,a1,30,1\nb,b1,12,0\n")
    assert read(path).cases["event"].tolist() == [True, False]
    assert read(path, event_is="censored").cases["event"].tolist() == [False, True]


def test_tsv_and_zip(tmp_path: Path) -> None:
    text = "patient\tslide\ttime\tevent\na\ta1\t3\t1\nb\tb1\t4\t0\n"
    plain = read(write(tmp_path, text, "table.tsv"))
    with zipfile.ZipFile(tmp_path / "table.zip", "w") as archive:
        archive.writestr("inner.tsv", text)
    pd.testing.assert_frame_equal(read(tmp_path / "table.zip").cases, plain.cases)
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        archive.writestr("inner.tsv", text)
        archive.writestr("__MACOSX/._inner.tsv", b"\x00\x05\x16\x07")
    pd.testing.assert_frame_equal(read(tmp_path / "mac.zip").cases, plain.cases)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.csv", text)
        archive.writestr("b.csv", text)
    with pytest.raises(DataError, match="holds 2 tables"):
        read(tmp_path / "two.zip")


SURVPATH = """case_id,slide_id,site,survival_months,censorship,survival_months_dss,censorship_dss,survival_months_pfi,\
censorship_pfi
TCGA-AA-0001,TCGA-AA-0001-01Z.svs,AA,12,0,12,,4,0
TCGA-AA-0002,TCGA-AA-0002-01Z.svs,AA,24,1,24,1,20,0
"""


@pytest.mark.parametrize(
    ("endpoint", "months", "events"),
    [("OS", [12, 24], [True, False]), ("DSS", [12, 24], [None, False]), ("PFI", [4, 20], [True, True])],
)
def test_published_endpoints(tmp_path: Path, endpoint: str, months: list, events: list) -> None:
    cohort = read(write(tmp_path, SURVPATH), endpoint=endpoint)
    assert cohort.endpoint == endpoint
    assert cohort.cases["time_months"].tolist() == months
    assert cohort.cases["event"].astype("boolean").tolist() == [pd.NA if e is None else e for e in events]


def test_dead_and_alive_mean_what_they_say_in_either_polarity(tmp_path: Path) -> None:
    path = write(tmp_path, "patient,slide,time,censorship\na,a1,30,Dead\nb,b1,12,alive\nc,c1,4,1\nd,d1,5,no\n")
    assert read(path, event_is="censored").cases["event"].tolist() == [True, False, False, True]


def test_spaces_and_empty_rows_of_a_spreadsheet(tmp_path: Path) -> None:
    path = write(tmp_path, "patient,slide,time,event\n a , a1.svs ,3,1\na,a2.svs,3,1\nb,b1,4,0\n,,,\n,,,\n")
    cohort = read(path)
    assert cohort.cases.index.tolist() == ["a", "b"]
    assert cohort.slides_of(["a"]) == {"a": ("a1", "a2")}


CDR = """bcr_patient_barcode,type,OS,OS.time,DSS,DSS.time,PFI,PFI.time
TCGA-AA-0001,GBM,1,365,0,365,1,100
TCGA-AA-0002,LGG,0,730,[Not Available],730,0,730
TCGA-BB-0003,BLCA,1,90,1,90,1,30
"""


def test_cdr_endpoints(tmp_path: Path) -> None:
    path = write(tmp_path, CDR)
    settings = {"name": "tcga_gbmlgg", "table": path}
    overall = read_cohort(CohortConfig(**settings))
    assert overall.cases.index.tolist() == ["TCGA-AA-0001", "TCGA-AA-0002"]
    assert overall.cases["time_months"].tolist() == pytest.approx([365 / DAYS_PER_MONTH, 730 / DAYS_PER_MONTH])
    progression = read_cohort(CohortConfig(**settings, endpoint="PFI"))
    assert progression.endpoint == "PFI"
    assert progression.cases["time_months"].iloc[0] == pytest.approx(100 / DAYS_PER_MONTH)
    specific = read_cohort(CohortConfig(**settings, endpoint="DSS"))
    assert specific.cases["event"].isna().tolist() == [False, True]


def test_gdc_tsv_and_json_agree(tmp_path: Path) -> None:
    header = "cases.submitter_id\tdemographic.vital_status\tdemographic.days_to_death\tdiagnoses.days_to_last_follow_up"
    rows = ["TCGA-AA-0001\tDead\t300\t'--", "TCGA-AA-0002\tAlive\t'--\t100", "TCGA-AA-0002\tAlive\t'--\t400"]
    table = read(write(tmp_path, "\n".join([header, *rows]), "clinical.tsv"))
    exported = [
        {"submitter_id": "TCGA-AA-0001", "demographic": {"vital_status": "Dead", "days_to_death": 300}},
        {
            "submitter_id": "TCGA-AA-0002",
            "demographic": {"vital_status": "Alive"},
            "diagnoses": [{"days_to_last_follow_up": 100}],
            "follow_ups": [{"days_to_follow_up": 400}],
        },
    ]
    from_json = read(write(tmp_path, json.dumps(exported), "clinical.json"))
    for cohort in (table, from_json):
        assert cohort.cases["time_months"].tolist() == pytest.approx([300 / DAYS_PER_MONTH, 400 / DAYS_PER_MONTH])
        assert cohort.cases["event"].tolist() == [True, False]
    with pytest.raises(ConfigError, match="has only OS"):
        read(tmp_path / "clinical.tsv", endpoint="PFI")


GDC_TSV = [
    "cases.submitter_id|demographic.days_to_death|demographic.vital_status|diagnoses.days_to_last_follow_up|treatments.x",
    "TCGA-AA-0001|300|Dead|'--|Radiation",
    "TCGA-AA-0001|300|Dead|200|Pharmaceutical",
    "TCGA-AA-0002|'--|Alive|'--|Radiation",
    "TCGA-AA-0002|'--|Alive|100|Pharmaceutical",
    "TCGA-AA-0003|'--|Not Reported|50|Radiation",
    "TCGA-AA-0004|'--|Dead|70|Radiation",
]


def test_gdc_portal_rows_of_one_case_are_one_patient(tmp_path: Path) -> None:
    cohort = read(write(tmp_path, "\n".join(GDC_TSV).replace("|", "\t"), "clinical.tsv"))
    assert cohort.cases.index.tolist() == [f"TCGA-AA-000{i}" for i in (1, 2, 3, 4)]
    assert cohort.cases["event"].tolist() == [True, False, pd.NA, True]
    days = cohort.cases["time_months"] * DAYS_PER_MONTH
    assert days.tolist()[:3] == pytest.approx([300, 100, 50])
    # Dead without a date of death: the audit drops the case; the last follow-up must not be used instead.
    assert cohort.cases["time_months"].isna().tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    "text", ['[{"submitter_id": "a", "diagnoses": ["x"]}]', '{"a": 1}', "[1]", '[{"demographic": "x"}]', "[{"]
)
def test_damaged_json_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"clinical\.json: is not a table"):
        read(write(tmp_path, text, "clinical.json"))


@pytest.mark.parametrize(
    ("sheet", "message"),
    [
        ("File Name\tCase ID\nnotes.pdf\tTCGA-AA-0001\n", "none of the files in File Name is a slide"),
        ("slide_id\tcase_id\na1\t\n", "row 2: lacks slide_id or case_id"),
        ("case_id\na\n", "has no column of slides"),
    ],
)
def test_sheets_that_name_no_slides(tmp_path: Path, sheet: str, message: str) -> None:
    clinical = write(tmp_path, "patient,time,event\nTCGA-AA-0001,3,1\n")
    with pytest.raises(DataError, match=message):
        read(clinical, slides=write(tmp_path, sheet, "sheet.tsv"))


@pytest.mark.parametrize(
    "sheet",
    [
        "File Name\tCase ID\tSample ID\nTCGA-AA-0001-01Z-00-DX1.X.svs\tTCGA-AA-0001, TCGA-AA-0001\tA, B\n",
        "File ID\tFile Name\tCase ID\n1\tTCGA-AA-0001-01Z-00-DX1.X.svs\tTCGA-AA-0001\n2\tnotes.pdf\tTCGA-AA-0001\n",
        "id\tfilename\tmd5\n1\tTCGA-AA-0001-01Z-00-DX1.X.svs\tff\n2\tnotes.pdf\tff\n",
        "slide_id\tcase_id\nTCGA-AA-0001-01Z-00-DX1.X.svs\tTCGA-AA-0001\n",
    ],
)
def test_slides_from_sample_sheet_or_manifest(tmp_path: Path, sheet: str) -> None:
    clinical = write(tmp_path, "patient,time,event\nTCGA-AA-0001,3,1\n")
    cohort = read(clinical, slides=write(tmp_path, sheet, "sheet.tsv"))
    assert cohort.slides["case_id"].to_dict() == {"TCGA-AA-0001-01Z-00-DX1.X": "TCGA-AA-0001"}


def test_manifest_covers_a_published_cohort(tcga: Path) -> None:
    cohort = read(tcga / "clinical/tcga_gbmlgg.csv", slides=tcga / "manifests/tcga_gbmlgg.tsv")
    published = read(tcga / "clinical/tcga_gbmlgg.csv")
    assert set(published.slides.index) <= set(cohort.slides.index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient,slide,time,event\na,a1,twelve,1\n", r"row 2: time is 'twelve', expected a finite number"),
        (
            "patient,slide,time,event\na,a1,12%,1\n",
            r"row 2: time is '12%', .* finite number. Write digits and a decimal",
        ),
        ("patient,slide,time,event\na,a1,2020-01-31,1\n", r"'2020-01-31', .* number. Give the time between two dates"),
        ("patient,slide,time,event\na,a1,3,1\nb,b1,inf,1\n", r"row 3: time is 'inf'"),
        ("patient,slide,time,event\na,a1,3,maybe\n", r"row 2: event is 'maybe', expected 0 or 1"),
        ("patient,slide,time,event\na,a1,3,1\na,a2,4,1\n", r"case a: the rows have different values of time_months"),
        ("patient,slide,time,event\na,a1,3,1\na,a2,3,0\n", r"case a: the rows have different values of event"),
        ("patient,slide,time,event\na,s,3,1\nb,s,4,0\n", r"slide s: belongs to more than one patient"),
        ("patient,slide,time,event\na,a1,2400,1\n", r"longer than 50 years.*time_unit=days"),
        (
            "case_id,slide_id,survival_months,censorship,event\na,a1,3,1,0\nb,b1,3,1,1\n",
            r"row 3: event and censorship contradict",
        ),
        ("patient,slide,time,event\na,a1,3,1\n\n,b1,4,0\n", r"row 4: has no patient name"),
        ("patient,slide,time,event,event\na,a1,3,1,0\n", "duplicate column names: event"),
        ("patient,slide,time,event\n", "has no rows"),
        ("", "is not a table"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, text))


def test_outcomes_read_back(tmp_path: Path) -> None:
    cohort = read(write(tmp_path, "patient,slide,time,event\n01,a1,0.1,1\nb,b1,12.3,0\n"))
    write_outcomes(cohort, tmp_path / "outcomes.csv")
    again = read_outcomes(tmp_path / "outcomes.csv", "tcga_test")
    pd.testing.assert_frame_equal(again.cases, cohort.cases[["time_months", "event"]])
    with pytest.raises(DataError, match="expected the columns case_id, time_months, event"):
        read_outcomes(tmp_path / "table.csv", "tcga_test")


def test_missing_file_and_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.csv: cannot be read"):
        read(tmp_path / "nothing.csv")
    path = write(tmp_path, "who,when\na,3\n")
    with pytest.raises(ConfigError, match="unknown table layout with the columns who, when"):
        read(path)
    with pytest.raises(ConfigError, match=r"the columns do not match cohort\.format=cdr"):
        read(path, format="cdr")
    with pytest.raises(ConfigError, match=r"has no endpoint DSS \(columns survival_months_dss, censorship_dss\)"):
        read(write(tmp_path, "case_id,slide_id,survival_months,censorship\na,a1,3,1\n"), endpoint="DSS")


def test_missing_values_are_left_to_the_audit(tmp_path: Path) -> None:
    cohort = read(write(tmp_path, "patient,slide,time,event\na,a1,,1\nb,b1,-3,0\nc,c1,0,\n"))
    assert cohort.cases["time_months"].isna().tolist() == [True, False, False]
    assert cohort.cases["event"].isna().tolist() == [False, False, True]

"""Test tables of TCGA-CDR, UCSC Xena, cBioPortal and the GDC."""

import logging
from pathlib import Path

import pytest

from cfusion.cohort.audit import audit
from cfusion.cohort.portals import DAYS_PER_MONTH
from cfusion.cohort.read import read_cohort
from cfusion.config import CohortConfig
from cfusion.errors import CohortError, ConfigError, DataError
from cfusion.types import Cohort

TYPES = ("LUAD", "OV", "BRCA", "READ", "COAD", "GBM", "LGG")


def read(folder: Path, text: str, name: str = "made_up", table: str = "clinical.tsv", **settings: object) -> Cohort:
    (folder / table).write_text(text, encoding="utf-8")
    return read_cohort(CohortConfig(name=name, table=folder / table, **settings))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("luad_discovery", {"LUAD"}), ("lung_discovery", set(TYPES)), ("tcga_gbmlgg", {"GBM", "LGG"}),
        ("TCGA-COADREAD", {"COAD", "READ"}), ("tcga.brca.2", {"BRCA"}), ("recovery", set(TYPES)),
        ("bread", set(TYPES)), ("ov and brca", {"OV", "BRCA"}),
    ],
)  # fmt: skip
def test_cancer_types_are_words_of_the_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, kept: set[str]
) -> None:
    rows = [f"TCGA-A1-{i:04d},{kind},1,300" for i, kind in enumerate(TYPES)]
    with caplog.at_level(logging.INFO):
        cohort = read(tmp_path, "\n".join(["bcr_patient_barcode,type,OS,OS.time", *rows]), name)
    assert {TYPES[int(case[-4:])] for case in cohort.cases.index} == kept
    assert "kept" in caplog.text


def test_a_cancer_type_that_the_table_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="names LUSC, and the table has no such patients"):
        read(tmp_path, "bcr_patient_barcode,type,OS,OS.time\nTCGA-A1-0001,LUAD,1,300\n", "tcga_lusc")


def test_redacted_patients_are_dropped(tmp_path: Path) -> None:
    rows = [f"TCGA-A1-{i:04d},LUAD,{i % 2},{300 + i},{'Redacted' if i == 3 else '#N/A'}" for i in range(20)]
    cohort = read(tmp_path, "\n".join(["bcr_patient_barcode,type,OS,OS.time,Redaction", *rows]))
    found = audit(cohort, [])
    assert [(f.kind, f.subject) for f in found.findings] == [("redacted", "TCGA-A1-0003")]
    plain = "\n".join(["patient,time,event,redaction", "a,3,1,Redacted", "b,4,0,", "c,4,1,no", "d,9,1,"])
    assert [f.subject for f in audit(read(tmp_path, plain), []).findings] == ["a"]


def test_xena_has_a_row_per_sample(tmp_path: Path) -> None:
    header = "sample\t_PATIENT\tcancer type abbreviation\tOS\tOS.time\tDSS\tDSS.time\tRedaction"
    rows = [
        "TCGA-A1-0001-01\tTCGA-A1-0001\tLUAD\t1\t300\t0\t300\t",
        "TCGA-A1-0001-11\tTCGA-A1-0001\tLUAD\t1\t300\t0\t300\t",
        "TCGA-A1-0002-01\tTCGA-A1-0002\tOV\t0\t90\t0\t90\tRedacted",
    ]  # fmt: skip
    cohort = read(tmp_path, "\n".join([header, *rows]))
    assert cohort.cases["time_months"].tolist() == pytest.approx([300 / DAYS_PER_MONTH, 90 / DAYS_PER_MONTH])
    assert cohort.cases["event"].tolist() == [True, False]
    assert read(tmp_path, "\n".join([header, *rows]), endpoint="DSS").cases["event"].tolist() == [False, False]
    older = "sample\tOS\tOS.time\nTCGA-A1-0001-01\t1\t300\nTCGA-A1-0002-01\t0\t90\n"
    assert read(tmp_path, older).cases.index.tolist() == ["TCGA-A1-0001", "TCGA-A1-0002"]


CBIOPORTAL = [
    "#Patient Identifier\tOverall Survival (Months)\tOverall Survival Status\tDSS",
    "#STRING\tNUMBER\tSTRING\tSTRING",
    "PATIENT_ID\tOS_MONTHS\tOS_STATUS\tDSS_MONTHS\tDSS_STATUS",
    "TCGA-A1-0001\t12.5\t1:DECEASED\t12.5\t0:ALIVE OR DEAD TUMOR FREE",
    "TCGA-A1-0002\t30\t0:LIVING\t30\t0:ALIVE OR DEAD TUMOR FREE",
    "TCGA-A1-0003\t7\t1:DECEASED\t7\t1:DEAD WITH TUMOR",
]


def test_cbioportal_patients(tmp_path: Path) -> None:
    cohort = read(tmp_path, "\n".join(CBIOPORTAL))
    assert cohort.cases["time_months"].tolist() == [12.5, 30, 7]
    assert cohort.cases["event"].tolist() == [True, False, True]
    specific = read(tmp_path, "\n".join(CBIOPORTAL), endpoint="DSS")
    assert specific.cases["event"].tolist() == [False, False, True]
    older = "Patient ID\tOverall Survival (Months)\tOverall Survival Status\nX\t3\tDECEASED\nY\t4\tLIVING\n"
    assert read(tmp_path, older).cases["event"].tolist() == [True, False]
    with pytest.raises(ConfigError, match="PFS, which is not PFI"):
        read(tmp_path, "\n".join(CBIOPORTAL), endpoint="PFI")
    with pytest.raises(CohortError, match="row 4: OS_STATUS is '0:DECEASED'"):
        read(tmp_path, "\n".join(CBIOPORTAL).replace("1:DECEASED", "0:DECEASED"))


GDC_HEADER = "cases.submitter_id\tdemographic.days_to_death\tdemographic.vital_status\tdiagnoses.days_to_last_follow_up"


def gdc(living: str) -> str:
    dead = [f"TCGA-A1-{i:04d}\t{100 + i}\tDead\t'--" for i in range(20)]
    return "\n".join([GDC_HEADER, *dead, *(f"TCGA-B1-{i:04d}\t'--\tAlive\t{living}" for i in range(18))])


def test_living_patients_without_follow_up_are_refused_and_found_in_the_other_file(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match=r"none of the 18 living .*set cohort.follow_up to follow_up.tsv"):
        read(tmp_path, gdc("'--"))
    rows = [f"TCGA-B1-{i:04d}\t{days}" for i in range(18) for days in (200 + i, 400 + i, "'--")]
    later = tmp_path / "follow_up.tsv"
    later.write_text("\n".join(["cases.submitter_id\tfollow_ups.days_to_follow_up", *rows]))
    cohort = read(tmp_path, gdc("'--"), follow_up=later)
    assert (cohort.cases["time_months"] * DAYS_PER_MONTH).tolist()[20:] == pytest.approx([400 + i for i in range(18)])
    longest = read(tmp_path, gdc("900"), follow_up=later)
    assert (longest.cases["time_months"] * DAYS_PER_MONTH).tolist()[20:] == pytest.approx([900] * 18)
    assert read(tmp_path, gdc("'--").replace("Alive", "Not Reported")).cases["event"].isna().sum() == 18


def test_follow_ups_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "follow_up.tsv").write_text("cases.submitter_id\tx\nTCGA-B1-0001\t3\n")
    with pytest.raises(CohortError, match=r"follow_up\.tsv: lacks .* or days_to_follow_up"):
        read(tmp_path, gdc("'--"), follow_up=tmp_path / "follow_up.tsv")
    with pytest.raises(ConfigError, match="has the plain layout, which has its own times"):
        read(tmp_path, "patient,time,event\na,3,1\n", follow_up=tmp_path / "follow_up.tsv")


@pytest.mark.parametrize("lost", ["time", "slide"])
def test_a_loss_of_one_outcome_is_an_error_and_an_uneven_loss_a_doubt(tmp_path: Path, lost: str) -> None:
    def table(dropped: int) -> str:
        rows = [
            f"P{i},{'' if i < dropped and lost == 'time' else 3 + i},{int(i >= 30)},"
            f"{'' if i < dropped and lost == 'slide' else f'P{i}-a'}"
            for i in range(60)
        ]
        return "\n".join(["patient,time,event,slide", *rows])

    with pytest.raises(DataError, match="0 of 30 patients with the event and 30 of 30 without it are dropped"):
        audit(read(tmp_path, table(30)), [])
    found = audit(read(tmp_path, table(12)), [])
    assert found.findings[0].kind == "loss_by_outcome"
    assert found.lines(2)[0].startswith("doubted: made_up 0 of 30 patients with the event and 12 of 30 without it")
    assert "loss_by_outcome" not in audit(read(tmp_path, table(3)), []).counts()


def test_vital_status_in_a_plain_table_does_not_make_it_an_export(tmp_path: Path) -> None:
    cohort = read(tmp_path, "patient,time,event,vital_status\na,3,1,Dead\nb,4,0,Alive\n")
    assert cohort.cases["event"].tolist() == [True, False]

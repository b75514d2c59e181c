"""Test that one patient or slide is found under the spellings of several tables, and that tissue codes are read."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cfusion.cohort.audit import audit
from cfusion.cohort.identifiers import Names, has_barcode, patient_of, site_of, tissue_of
from cfusion.cohort.read import read_cohort
from cfusion.cohort.splits import make_splits
from cfusion.config import CohortConfig, SplitsConfig
from cfusion.errors import DataError
from cfusion.types import Cohort


@pytest.mark.parametrize(
    "name",
    [
        "TCGA-A1-1000", "tcga-a1-1000", "tcga-a1-1000-01z-00-dx1.abc", "TCGA.A1.1000.01", "Tcga_A1_1000",
        "TCGA-A1-1000-01A-01-BS1.X",
    ],
)  # fmt: skip
def test_barcodes_of_one_patient(name: str) -> None:
    assert patient_of(name) == "TCGA-A1-1000"
    assert has_barcode(name)
    assert site_of(name) == "A1"


@pytest.mark.parametrize(("name", "patient"), [("12.0", "12"), ("007.0", "007"), ("1.05", "1.05"), ("P1.0", "P1.0")])
def test_numbers_that_a_spreadsheet_made_floats(name: str, patient: str) -> None:
    assert patient_of(name) == patient
    assert site_of(name) is None


@pytest.mark.parametrize(
    ("slide", "tissue"),
    [
        ("TCGA-A1-1000-01Z-00-DX1.F6E9", "diagnostic"), ("TCGA-A1-1000-06Z-00-DX1.F6E9", "diagnostic"),
        ("TCGA-A1-1000-01A-01-TS1.F6E9", "frozen"), ("TCGA-A1-1000-01A-02-BSB.F6E9", "frozen"),
        ("tcga-a1-1000-01a-01-ms2.f6e9", "frozen"), ("TCGA-A1-1000-11A-01-TS1.F6E9", "normal"),
        ("TCGA-A1-1000-10A", "normal"), ("TCGA-A1-1000-20A-01-TS1", "normal"), ("TCGA-A1-1000-11Z-00-DX1", "normal"),
        ("TCGA-A1-1000", "diagnostic"), ("PT-11A-01-TS1", "diagnostic"), ("TCGA.A1.1000.11A.01.TS1", "normal"),
        ("TCGA-A1-1000-01Z-00-DX1.TS1-BS", "diagnostic"),
    ],
)  # fmt: skip
def test_tissue_codes(slide: str, tissue: str) -> None:
    assert tissue_of(slide)[0] == tissue


def test_names_match_if_only_one_is_meant() -> None:
    names = Names(["PT-1", "pt-2", "PT-2", "12", "Jos\u00e9"])
    assert names.find("pt-1 ") == "PT-1"
    assert names.find("pt-2") == "pt-2"
    assert names.find("Pt-2") is None
    assert names.find("12.0") == "12"
    assert names.find("JOSE\u0301") == "Jos\u00e9"
    assert names.find("PT-3") is None
    assert names.nearest("PT-10") == "; the nearest name is PT-1"
    assert names.nearest("zzz") == ""


def outcome(number: int) -> str:
    """Time and event of a patient; events are earlier, and both halves of even and odd numbers have them."""
    event = number // 2 % 2
    return f"{3 + number % 37 + 30 * (1 - event)},{event}"


def table(folder: Path, case: str = "{}", slide: str = "{}-s", patients: int = 60) -> Cohort:
    rows = [f"{case.format(i)},{slide.format(case.format(i))},{outcome(i)}" for i in range(patients)]
    (folder / "clinical.csv").write_text("\n".join(["patient,slide,time,event", *rows]))
    return read_cohort(CohortConfig(name="made_up", table=folder / "clinical.csv"))


def split_files(folder: Path, spell: str, patients: int = 60) -> SplitsConfig:
    names = [spell.format(i) for i in range(patients)]
    directory = folder / "splits"
    directory.mkdir(exist_ok=True)
    for fold in range(2):
        test = names[fold::2]
        sides = {"train": pd.Series([n for n in names if n not in test]), "val": pd.Series(test)}
        pd.DataFrame(sides).to_csv(directory / f"splits_{fold}.csv")
    return SplitsConfig(directory=directory)


def test_lower_case_barcodes_are_the_same_patients(tmp_path: Path) -> None:
    names = [f"tcga-a1-{i // 2:04d}-01z-00-dx{i % 2}" for i in range(80)]
    rows = [f"{name},{name}.abc,{outcome(i // 2)}" for i, name in enumerate(names)]
    upper = [row.upper() for row in rows]
    found = []
    for lines in (rows, upper):
        (tmp_path / "clinical.csv").write_text("\n".join(["patient,slide,time,event", *lines]))
        found.append(read_cohort(CohortConfig(name="made_up", table=tmp_path / "clinical.csv")))
    pd.testing.assert_frame_equal(found[0].cases, found[1].cases)
    assert len(found[0].cases) == 40
    for split in make_splits(found[0], SplitsConfig()):
        assert not {c for c in split.train if c in split.test}
    available = {slide: {"x20"} for slide in found[1].slides.index}
    checked = audit(found[0], [], available=available, magnifications=("x20",))
    assert checked.counts() == {"spelling": 1}
    assert checked.cohort.slides.index.tolist() == list(available)


@pytest.mark.parametrize(
    ("case", "spelling"),
    [("PT-{:03d}", "pt-{:03d}"), ("{}", "{}.0"), ("PT-{:03d}", "PT-{:03d}-s"), ("PT-{:03d}", "PT-{:03d}-s.svs"),
     ("PT-{:03d}", " PT-{:03d} "), ("pt{:03d}", "PT{:03d}-S")],
)  # fmt: skip
def test_splits_may_spell_patients_differently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str, spelling: str
) -> None:
    cohort = table(tmp_path, case)
    with caplog.at_level(logging.WARNING):
        splits = make_splits(cohort, split_files(tmp_path, spelling), "fixed-epoch")
    assert {c for split in splits for c in split.test} == set(cohort.cases.index)
    assert not audit(cohort, splits).findings
    if spelling.strip() != case and ".0" not in spelling:
        assert "60 names of the splits are not written as the patients" in caplog.text


def test_unknown_names_are_reported_with_the_nearest_before_the_folds_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cohort = table(tmp_path, "PT-{:03d}")
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="train side has 0 patients"):
        audit(cohort, lambda: make_splits(cohort, split_files(tmp_path, "PT_{:03d}"), "fixed-epoch"))
    assert "PT_001 is in the splits but not in the clinical table; the nearest name is PT-001" in caplog.text
    assert "… and 57 more [not_in_cohort]" in caplog.text


def test_what_the_patients_audit_found_is_said_before_folds_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cohort = table(tmp_path, "PT-{:03d}")
    available = {f"pat-{i:03d}-s": {"x20"} for i in range(60)} | {"PT-001-s": {"x20"}}
    with caplog.at_level(logging.WARNING), pytest.raises(DataError):
        audit(cohort, lambda: make_splits(cohort, SplitsConfig(scheme="site")), available=available)
    assert "PT-000-s has no features; the nearest name is" in caplog.text


def test_slides_of_normal_tissue_and_frozen_sections_are_left_out_and_named(tmp_path: Path) -> None:
    kinds = {"01Z-00-DX1": None, "01A-01-TS1": "frozen_section", "11A-01-TS1": "normal_tissue"}
    slides = [f"TCGA-A1-{i:04d}-{code}.x" for i in range(30) for code in kinds]
    rows = [f"{slide[:12]},{slide},{outcome(int(slide[8:12]))}" for slide in slides]
    (tmp_path / "clinical.csv").write_text("\n".join(["patient,slide,time,event", *rows]))
    cohort = read_cohort(CohortConfig(name="made_up", table=tmp_path / "clinical.csv"))
    found = audit(cohort, [])
    assert found.counts() == {"frozen_section": 30, "normal_tissue": 30}
    assert found.cohort.slides.index.tolist() == slides[::3]
    assert "TCGA sample type 11" in next(f.message for f in found.findings if f.kind == "normal_tissue")
    both = audit(cohort, [], keep_tissue=("frozen", "normal"))
    assert len(both.cohort.slides) == 90
    from_features = audit(
        Cohort("bare", cohort.cases, cohort.slides.head(0)), [], available={s: {"x20"} for s in slides}
    )
    assert from_features.cohort.slides.index.tolist() == slides[::3]
    frozen_only = {s: {"x20"} for s in slides if "TS1" in s}
    with pytest.raises(DataError, match=r"leaves no patient .*cohort\.keep_tissue=\[frozen\] keeps it"):
        audit(Cohort("bare", cohort.cases, cohort.slides.head(0)), [], available=frozen_only)


def test_a_sheet_of_slides_may_spell_patients_differently(tmp_path: Path) -> None:
    (tmp_path / "sheet.csv").write_text("slide_id,case_id\n" + "\n".join(f"s{i},pt-{i:03d}" for i in range(60)))
    table(tmp_path, "PT-{:03d}")
    settings = CohortConfig(name="made_up", table=tmp_path / "clinical.csv", slides=tmp_path / "sheet.csv")
    found = audit(read_cohort(settings), [])
    assert found.counts() == {"spelling": 1}
    assert found.cohort.slides["case_id"].tolist() == [f"PT-{i:03d}" for i in range(60)]
    assert np.all(found.cohort.slides.index == [f"s{i}" for i in range(60)])

"""Whose slide it is, by one rule for all commands."""

import pytest

from cfusion.cohort.identifiers import Names
from cfusion.cohort.slide_owners import SlideOwners, read_owners, wanted_slides
from cfusion.errors import CohortError

KNOWN = Names(["p-7", "p-7-x", "q", "12", "TCGA-AA-0001", "Ärztin 3"])


@pytest.mark.parametrize(
    ("slide", "patient"),
    [
        ("p-7", "p-7"),
        ("p-7-a", "p-7"),
        ("p-7_2.1", "p-7"),
        ("P-7 a", "p-7"),
        ("p-7-x-a", "p-7-x"),
        ("p-70-a", "p-70-a"),
        ("q-1-a", "q"),
        ("queen-1", "queen-1"),
        ("12.0", "12"),
        ("13.0", "13"),
        ("TCGA-AA-0001-01Z-00-DX1", "TCGA-AA-0001"),
        ("TCGA-ZZ-0001-01Z-00-DX1", "TCGA-ZZ-0001"),
        ("Ärztin 3 (b)", "Ärztin 3"),
    ],
)
def test_a_slide_without_a_table_belongs_to_the_known_patient_with_the_longest_fitting_name(slide, patient):
    owners = SlideOwners(KNOWN.find)
    assert owners.patient(slide) == patient
    assert owners.unowned([slide]) == ([slide] if patient in {"p-70-a", "queen-1", "13"} else [])


def test_a_table_comes_before_the_names_and_spells_slides_in_its_own_way():
    owners = SlideOwners(KNOWN.find, {"P-7-B": "q", "scan 1": "z"})
    assert owners.group(["p-7-a", "p-7-b", "scan 1", "q.2", "scan 2"]) == {
        "p-7": ("p-7-a",), "q": ("p-7-b", "q.2"), "z": ("scan 1",), "scan 2": ("scan 2",)
    }  # fmt: skip
    assert owners.unowned(["p-7-b", "scan 1", "scan 2"]) == ["scan 2"]


@pytest.mark.parametrize("columns", ["slide_id,case_id", "slide,patient"])
def test_a_table_of_owners_may_be_a_plain_clinical_table(tmp_path, columns):
    table = tmp_path / "cases.csv"
    table.write_text(f"{columns},age\na.svs,p-1,60\nb.svs,p-1,60\n")
    owners = read_owners(table)
    assert owners == {"a": "p-1", "b": "p-1"}
    assert wanted_slides(table, owners, ["b", "c", "a"]) == ["a", "b"]
    with pytest.raises(CohortError, match="1 of its slides are not there: b"):
        wanted_slides(table, owners, ["a"])
    table.write_text(f"{columns}\na,p-1\na,p-2\n")
    with pytest.raises(CohortError, match="slide a belongs to p-1 and to p-2"):
        read_owners(table)
    table.write_text("slide\na\n")
    with pytest.raises(CohortError, match="lacks the columns case_id"):
        read_owners(table)

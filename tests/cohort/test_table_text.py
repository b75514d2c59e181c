"""Test that tables that other programs write are read as they mean it, or refused with the row that does not fit."""

from pathlib import Path

import pandas as pd
import pytest

from cfusion.cohort.parsing import read_table
from cfusion.cohort.read import read_cohort
from cfusion.config import CohortConfig
from cfusion.errors import CohortError, PredictionsError
from cfusion.survival.predictions import read_predictions

PLAIN = "patient,slide,time,event\nP0,P0-a,20.9,1\nP1,P1-a,1.09,0\n"


def write(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        PLAIN.replace("\n", ",\n").replace("event,", "event", 1),  # a separator at the end of every row
        'patient,slide,time,event\n"1",P0,P0-a,20.9,1\n"2",P1,P1-a,1.09,0\n',  # R's row names
        "patient\tslide\ttime\tevent\nr1\tP0\tP0-a\t20.9\t1\nr2\tP1\tP1-a\tx\t0\n",
        "patient;slide;time;event\n1;P0;P0-a;20,9;1\n",
        "sep=,\npatient,slide,time,event\nP0,P0-a,20.9,1,\n",
    ],
)
def test_rows_with_one_field_more_than_the_header_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CohortError, match="every row has one field more than the header"):
        read_table(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAIN + "P2,P2-a,3,1,9\n", "row 4 has 5 fields and the header has 4"),
        (PLAIN + "P2,P2-a,3\n", "row 4 has 3 fields and the header has 4"),  # cut off
        ("sep=,\n" + PLAIN + "P2,P2-a\n", "row 5 has 2 fields"),
        ("# made by hand\n" + PLAIN + "\nP2,P2-a\n", "row 6 has 2 fields"),
        ("patient,time,event,\nP0,3,1,left over\n", "column 4 has no name and row 2 has a value"),
        ('patient,time,event\nP0,3,"1\nP1,4,0\n', "is not a table"),  # an open quote
        ("patient;time;event\nP0;1,234;1\nP1;5,678;0\n", "in decimals or in thousands"),
        ("# only a remark\n", "there is no header"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CohortError, match=message):
        read_table(write(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\n" + PLAIN.replace(",", ";"),
        '"sep=|"\n' + PLAIN.replace(",", "|"),
        PLAIN.replace(",", ";").replace(".", ","),  # Excel in most of Europe
        PLAIN.replace(",", "\t").replace("\n", "\r\n"),
        "#Patient\tSlide\n#STRING\tSTRING\n" + PLAIN.replace(",", "\t"),
        "," + PLAIN.replace("\nP", "\n7,P"),  # pandas' row numbers
        PLAIN.replace("patient,", '"patient",').replace("P0-a", '"P0-a"'),
        PLAIN + ",,,\n\n",
        PLAIN.replace("event\n", "event,\n").replace("1\n", "1,\n").replace("0\n", "0,\n"),  # an empty column
    ],
)
def test_the_same_table_as_other_programs_write_it(tmp_path: Path, text: str) -> None:
    read = read_table(write(tmp_path, text))
    expected = read_table(write(tmp_path, PLAIN, "plain.csv"))
    pd.testing.assert_frame_equal(read.reset_index(drop=True), expected.reset_index(drop=True))


def test_row_numbers_are_those_of_an_editor(tmp_path: Path) -> None:
    path = write(tmp_path, "sep=,\npatient,time,event\nP0,3,1\n\nP1,x,0\n")
    with pytest.raises(CohortError, match="row 5: time is 'x'"):
        read_cohort(CohortConfig(table=path))


def test_predictions_with_a_field_too_many_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "model,cohort,fold,case_id,risk,survival_months,event\nm,c,0,P0,-2.1,79.7,1,\n")
    with pytest.raises(PredictionsError, match="one field more than the header"):
        read_predictions(path)


@pytest.mark.parametrize("column", ["entry", "Entry_time", "delayed_entry", "start", "left_truncation"])
def test_delayed_entry_is_refused_by_name(tmp_path: Path, column: str) -> None:
    rows = f"patient,time,event,{column}\nP0,3,1,0\nP1,4,0,1.5\n"
    with pytest.raises(CohortError, match=rf"row 3: {column} is '1.5': delayed entry .*is not supported, and 1 rows"):
        read_cohort(CohortConfig(table=write(tmp_path, rows)))
    zeros = read_cohort(CohortConfig(table=write(tmp_path, rows.replace("1.5", "0"))))
    assert zeros.cases["time_months"].tolist() == [3, 4]


def test_delayed_entry_in_predictions_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "model,cohort,fold,case_id,risk,survival_months,event,entry\nm,c,0,P0,-2.1,79.7,1,12\n")
    with pytest.raises(PredictionsError, match="row 2: entry is '12': delayed entry"):
        read_predictions(path)


@pytest.mark.parametrize("code", ["2", "2.0", "3", "11"])
def test_competing_events_are_refused_with_the_reason(tmp_path: Path, code: str) -> None:
    with pytest.raises(CohortError, match=f"row 3: event is '{code}', expected 0 or 1. Codes above 1 are competing"):
        read_cohort(CohortConfig(table=write(tmp_path, f"patient,time,event\nP0,3,1\nP1,4,{code}\nP2,4,0\n")))


def test_codes_of_r_that_start_at_one_are_recognised(tmp_path: Path) -> None:
    table = write(tmp_path, "patient,time,event\nP0,3,1\nP1,4,2\n")
    with pytest.raises(CohortError, match=r"event is '2', expected 0 or 1.*if 1 is censored and 2 is dead.*subtract 1"):
        read_cohort(CohortConfig(table=table))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient,slide,time,event\nP0,a,44,\nP0,b,,1\n", r"case P0: a row has a time and no event.*rows 2, 3"),
        ("case_id,slide_id,survival_months,censorship\nP0,a,,0\nP0,b,7,\n", "case P0: a row has a time and no event"),
        ("patient,slide,time,event,site\nP0,a,4,1,A\nP0,b,4,1,B\n", "case P0: the rows have different values of site"),
        ("patient,time,event,censorship\nP0,4,1,0\nP1,4,1,1\n", "row 3: event and censorship contradict"),
        ("patient,case_id,time,event\nP0,Q0,4,1\n", "columns patient and case_id, which mean the same"),
        ("patient,time,time_months,event\nP0,4,5,1\n", "columns time and time_months, which mean the same"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CohortError, match=message):
        read_cohort(CohortConfig(table=write(tmp_path, text)))


def test_rows_of_one_patient_may_leave_out_what_another_says(tmp_path: Path) -> None:
    text = "patient,slide,time,event\nP0,a,44,1\nP0,b,,\nP0,c,44,\nP1,d,3,0\n"
    cohort = read_cohort(CohortConfig(table=write(tmp_path, text)))
    assert cohort.cases["time_months"].tolist() == [44, 3]
    assert cohort.cases["event"].tolist() == [True, False]

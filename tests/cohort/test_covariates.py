"""Clinical covariates: what a cell means, what is refused, and other end points."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import cfusion
from cfusion.cohort.audit import audit
from cfusion.cohort.covariates import coded_covariates, filled
from cfusion.config import CohortConfig, Config, validate
from cfusion.errors import CohortError, ConfigError

SOURCE = Path("clinic.csv")


def coded(cells: dict[str, list], **covariates: object) -> pd.DataFrame:
    rows = pd.DataFrame(cells, dtype=object)
    rows.index = pd.Index([f"p{i}" for i in range(len(rows))], name="case_id")
    config = validate(CohortConfig, {"covariates": covariates or None}, "test")
    found, _ = coded_covariates(rows, config, SOURCE)
    assert found is not None
    return found


def test_stages_and_grades_are_read_as_they_are_written() -> None:
    stages = ["I", "IIA", "Stage IIIb", "iv", "3", "IVA1", "Stage X", None, "not reported"]
    expected = [1, 2, 3, 4, 3, 4, np.nan, np.nan, np.nan]
    np.testing.assert_array_equal(coded({"stage": stages})["stage"], expected)
    np.testing.assert_array_equal(coded({"grade": ["G1", "G4", "low", "High", "GX"]})["grade"], [1, 4, 1, 3, np.nan])


def test_categories_have_a_column_a_level() -> None:
    found = coded({"sex": ["male", "female", None, "male"]})
    assert found.columns.tolist() == ["sex=male"]
    np.testing.assert_array_equal(found["sex=male"], [1, 0, np.nan, 1])
    kinds = coded({"kind": ["b", "a", "c"]}, kind="category")
    assert kinds.columns.tolist() == ["kind=b", "kind=c"]


def test_listed_levels_are_in_their_order() -> None:
    found = coded({"ecog": ["fit", "ill", "Fit"]}, ecog=["fit", "ill"])
    assert found["ecog"].tolist() == [1, 2, 1]
    with pytest.raises(CohortError, match=r"clinic.csv, case p1: ecog is 'worse', expected fit, ill"):
        coded({"ecog": ["fit", "worse"]}, ecog=["fit", "ill"])


def test_a_configured_column_is_read_or_refused() -> None:
    with pytest.raises(ConfigError, match=r"has no column aeg .* Did you mean age"):
        coded({"age": ["1"]}, aeg="number")
    with pytest.raises(CohortError, match=r"clinic.csv, case p1: age is 'old', expected a finite number"):
        coded({"age": ["61", "old"]}, age="number")
    assert coded({"age": ["61", "old"], "stage": ["I", "II"]}).columns.tolist() == ["stage"]
    rows = pd.DataFrame({"age": ["61", "62"]}, index=["p0", "p0"])
    with pytest.raises(CohortError, match=r"case p0: the rows have different values of age \(61, 62\)"):
        coded_covariates(rows, CohortConfig(covariates={"age": "number"}), SOURCE)
    assert coded_covariates(rows, CohortConfig(covariates={}), SOURCE) == (None, {})


def test_the_audit_says_which_column_is_not_used_and_why(tmp_path: Path) -> None:
    table = tmp_path / "c.csv"
    rows = [f"P{i},P{i}-{k},{i + 1},{i % 2},{50 + (k if i == 3 else 0)},I" for i in range(12) for k in range(2)]
    table.write_text("\n".join(["patient,slide,time,event,age,stage", *rows]))
    config = CohortConfig(name="c", table=table)
    one = cfusion.read_cohort(config)
    assert one.covariates is not None
    assert one.covariates.columns.tolist() == ["stage"]
    (finding,) = [found for found in audit(one, []).findings if found.kind == "covariate"]
    assert str(finding) == (
        f"dropped: covariate age is not used: {table}, case P3: the rows have different values of age (50, 51). "
        "cohort.covariates states how to read it. [covariate]"
    )


def test_only_training_patients_fill_what_is_missing() -> None:
    values = pd.DataFrame({"age": [50.0, 60.0, np.nan, 1e6], "one": [1.0, 1.0, 1.0, 2.0]})
    found = filled(values, np.array([True, True, True, False]))
    assert found["age"].tolist() == [50, 60, 55, 1e6]
    assert found.columns.tolist() == ["age"]


@pytest.mark.parametrize(("endpoint", "events", "died"), [("os", 75, None), ("dss", 51, 24), ("pfi", 108, 20)])
def test_end_points_of_a_cohort(tcga: Path, endpoint: str, events: int, died: int | None) -> None:
    table = tcga / "covariates/tcga_ucec.csv"
    config = cfusion.load_config(None, [f"cohort.table={table}", f"evaluation.endpoint={endpoint}"])
    cohort = cfusion.read_cohort(config.cohort)
    assert cohort.endpoint == endpoint.upper()
    assert (len(cohort.cases), cohort.cases["event"].sum()) == (480, events)
    assert cohort.covariates is not None
    assert cohort.covariates.columns.tolist() == ["age", "stage", "grade"]
    other = cfusion.load_config("configs/tcga_ucec.yaml", [f"evaluation.endpoint={endpoint}"])
    assert cfusion.read_cohort(other.cohort).cases["event"].sum() == events
    found = [finding for finding in audit(cohort, []).findings if finding.kind == "other_cause"]
    assert len(found) == (died is not None)
    assert all(f"has {died} patients who died" in finding.message for finding in found)


def test_an_end_point_has_one_setting() -> None:
    assert Config.model_validate({"evaluation": {"endpoint": "pfi"}}).cohort.endpoint == "PFI"
    for values in (
        {"evaluation": {"endpoint": "os"}, "cohort": {"endpoint": "DSS"}},
        {"evaluation": {"endpoint": "x"}},
    ):
        with pytest.raises(ConfigError, match="endpoint"):
            validate(Config, values, "study.yaml")
    without = cfusion.load_config(None, ["cohort.table=package:tcga/clinical/tcga_ucec.csv", "evaluation.endpoint=dss"])
    with pytest.raises(ConfigError, match="has no endpoint DSS"):
        cfusion.read_cohort(without.cohort)


@pytest.mark.parametrize("layout", ["table", "covariates_table"])
def test_an_outcome_in_two_halves_is_refused(tmp_path: Path, layout: str) -> None:
    rows = "".join(f"P{i},0,{i + 5},1,{i + 4}\n" for i in range(20))
    halves = tmp_path / "covariates.csv"
    halves.write_text(f"case_id,os,os_months,dss,dss_months\n{rows}P90,0,9,,44\nP90,0,9,1,\n")
    plain = tmp_path / "plain.csv"
    plain.write_text("patient,slide,time,event\n" + "".join(f"P{i},S{i},{i + 5},0\n" for i in [*range(20), 90]))
    config = {"table": halves} if layout == "table" else {"table": plain, "covariates_table": halves}
    with pytest.raises(CohortError, match="case P90: a row has a time and no event, and another an event and no time"):
        cfusion.read_cohort(validate(CohortConfig, {"name": "made_up", "endpoint": "DSS", **config}, "test"))

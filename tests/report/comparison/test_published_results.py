"""Cells of a sweep next to published results: figures are recomputed, nothing is left out, bad tables refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_comparison import STRENGTH, member

from cfusion.cli.sweep_views import PUBLISHED_HEAD, published_lines, published_table
from cfusion.errors import ConfigError, DataError
from cfusion.report.comparison.cells import Comparison, compare_runs
from cfusion.report.comparison.comparison_files import write_comparison
from cfusion.report.comparison.published_results import PublishedComparison, compare_published, read_published
from cfusion.report.number_words import with_minus
from cfusion.study.packaged import shipped_tables
from cfusion.survival.null import EpochChoice, simulate_null
from preprocess.encoders.cards import CARDS

HEAD = "cohort,encoder,model,protocol,cindex_mean,cindex_std"
PAPER = "crossfusion-midl2026"


def written(folder: Path, *rows: str, head: str = HEAD) -> str:
    path = folder / "theirs.csv"
    path.write_text("\n".join([head, *rows]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Cohorts a and b, of which b has clinical covariates; one cell of b is not complete."""
    folder = tmp_path_factory.mktemp("sweep")
    cells = [(c, e, m) for c in ("a", "b") for e, m in STRENGTH]
    members = [member(folder, *cell, 1, state="open" if cell == ("b", "uni", "weak") else "done") for cell in cells]
    found = compare_runs(members, bootstrap=0)
    with_clinic = [
        dataclasses.replace(c, summary=pd.concat([c.summary, pd.Series({"clinical_c_mean": 0.71})]))
        if c.cohort == "b" and c.summary is not None
        else c
        for c in found.cells
    ]
    return dataclasses.replace(found, cells=tuple(with_clinic))


def own(comparison: Comparison, cohort: str, encoder: str, model: str):
    return next(c for c in comparison.cells if (c.cohort, c.encoder, c.model) == (cohort, encoder, model))


def test_each_cell_stands_next_to_its_published_result(comparison, tmp_path):
    cell = own(comparison, "a", "uni", "good_model")
    spread = float(cell.summary["cindex_std"])
    near, far = cell.mean_of_folds - 0.99 * spread, cell.mean_of_folds - 1.01 * spread
    file = written(
        tmp_path, f"a,uni,good_model,published,{near!r},0.02", f"a,uni,good_model,strict,{far!r},",
        "b,uni,weak,published,0.6,0.1", "b,uni,good_model,published,0.7,0.1",
    )  # fmt: skip
    rows = compare_published(comparison, read_published(file)).matched.set_index(["cohort", "model", "their_protocol"])
    first, second = rows.loc[("a", "good_model", "published")], rows.loc[("a", "good_model", "strict")]
    assert (first["cindex_mean"], first["cindex_std"]) == (cell.mean_of_folds, spread)
    assert first["difference"] == pytest.approx(0.99 * spread)
    assert (first["within_fold_sd"], second["within_fold_sd"]) == (True, False)
    assert np.isnan(second["their_cindex_std"])
    assert np.isnan(first["clinical_c_mean"])
    assert rows.loc[("b", "good_model", "published"), "clinical_c_mean"] == 0.71
    open_cell = rows.loc[("b", "weak", "published")]
    assert not open_cell["complete"]
    assert pd.isna(open_cell["within_fold_sd"])
    assert open_cell["clinical_c_mean"] == 0.71


def test_the_tables_for_a_paper_have_the_published_results(comparison, tmp_path):
    cell = own(comparison, "a", "uni", "good_model")
    theirs = cell.mean_of_folds - 0.1
    file = written(tmp_path, f"a,uni,good_model,published,{theirs!r},0.02", "b,uni,weak,published,0.6,")
    write_comparison(comparison, tmp_path / "report", title="Made up", published=read_published(file))
    markdown, latex = ((tmp_path / "report" / name).read_text() for name in ("table.md", "table.tex"))
    (row,) = [line for line in markdown.splitlines() if line.startswith("| a, uni | good_model")]
    cells = [word.strip() for word in row.strip("|").split("|")]
    spread = float(cell.summary["cindex_std"])
    assert cells[2:7] == [
        f"{cell.mean_of_folds:.3f} ± {spread:.3f}", f"{cell.mean_of_folds - 0.1:.3f} ± 0.020", "published", "+0.100",
        "yes" if spread >= 0.1 else "no",
    ]  # fmt: skip
    assert cells[9] == "–", "cohort a has no clinical covariates"
    assert "| b, uni | weak | not complete | 0.600 | published | – | – |" in markdown
    assert rf"a, uni & good\_model & {cell.mean_of_folds:.3f} $\pm$ {spread:.3f}" in latex
    write_comparison(comparison, tmp_path / "report", title="Made up")
    assert "Next to" not in (tmp_path / "report" / "table.md").read_text()


def test_the_null_is_that_of_their_protocol_on_the_folds_of_the_sweep(comparison, tmp_path):
    file = written(
        tmp_path, "a,uni,good_model,published,0.6,", "a,uni,weak,strict,0.6,", "a,conch,weak,unknown,0.6,",
    )  # fmt: skip
    rows = compare_published(comparison, read_published(file)).matched.set_index("their_protocol")
    run = own(comparison, "a", "uni", "good_model").members[0]
    predictions = pd.read_csv(run.folder / "predictions.csv")
    folds = [
        (rows["survival_months"].to_numpy(), rows["event"].to_numpy(bool)) for _, rows in predictions.groupby("fold")
    ]

    def null(memory: float):
        return simulate_null(folds, chosen_on_scored_fold=True, autocorrelation=memory, choice=EpochChoice())

    assert rows.loc["published", "null_independent"] == pytest.approx(null(0.0).mean, abs=0.02)
    assert rows.loc["published", "null_correlated"] == pytest.approx(null(0.9).mean, abs=0.02)
    assert rows.loc["published", "null_high"] > rows.loc["published", "null_independent"] > 0.6
    assert rows.loc["published", "null_correlated"] < rows.loc["published", "null_independent"]
    assert rows.loc["unknown", "null_independent"] == rows.loc["published", "null_independent"]
    assert (
        rows.loc["strict", "null_independent"] == rows.loc["strict", "null_correlated"] == pytest.approx(0.5, abs=0.01)
    )


def test_what_only_one_side_has_is_named_and_kept(comparison, tmp_path):
    file = written(
        tmp_path, "a,uni,good_model,published,0.6,", "c,uni,good_model,published,0.6,",
        "a,gigapath,weak,published,0.6,", "a,uni,patchgcn,published,0.6,", "b,conch,good_model,published,0.6,",
    )  # fmt: skip
    found = compare_published(comparison, read_published(file))
    notes = "\n".join(found.notes)
    assert f"Only in {file}, not in this sweep: cohort c." in notes
    assert f"Only in {file}, not in this sweep: encoder gigapath." in notes
    assert f"Only in {file}, not in this sweep: model patchgcn." in notes
    assert f"Only in this sweep, not in {file}: 6 more combinations, such as a / uni / weak;" in notes
    assert "No clinical covariates are known for a" in notes
    assert len(found.matched) == 2
    assert len(found.rows) == 2 + 3 + 6
    theirs_only = found.rows[found.rows["protocol"].isna()]
    assert set(theirs_only["cohort"]) == {"a", "c"}
    assert theirs_only["cindex_mean"].isna().all()


def test_a_cohort_that_the_file_lacks_is_named(comparison, tmp_path):
    file = written(tmp_path, "a,uni,good_model,published,0.6,")
    notes = compare_published(comparison, read_published(file)).notes
    assert f"Only in this sweep, not in {file}: cohort b." in notes


def test_a_file_without_a_common_cell_is_refused(comparison, tmp_path):
    file = written(tmp_path, "c,uni,good_model,published,0.6,")
    with pytest.raises(DataError, match=r"none of its 1 results has .* Only in this sweep, .*: cohort a, b\."):
        compare_published(comparison, read_published(file))


@pytest.mark.parametrize(
    ("head", "rows", "message"),
    [
        (HEAD, [], "has no rows"),
        (HEAD.replace("cindex_mean", "cindex"), ["a,uni,weak,strict,0.6,"], "has no column cindex_mean"),
        (HEAD.replace("_std", "_sd"), ["a,uni,weak,strict,0.6,0.1"], "the column cindex_sd has no meaning here"),
        (HEAD, ["a,uni,weak,strict,0.6,", "a,uni,,strict,0.6,"], "row 3: model is empty"),
        (HEAD, ["a,uni,weak,strict,,"], "row 2: cindex_mean is empty"),
        (HEAD, ["a,uni,weak,strict,high,"], "row 2: cindex_mean is 'high', expected a finite number"),
        (HEAD, ["a,uni,weak,strict,62.7,"], "row 2: cindex_mean is 62.7, expected a number from 0 to 1.*percentages"),
        (HEAD, ["a,uni,weak,strict,0.6,-0.1"], "row 2: cindex_std is -0.1, expected a number from 0 to 1"),
        (HEAD, ["a,uni,weak,best,0.6,"], "row 2: protocol is 'best', expected published, strict"),
        (HEAD, ["a,uni,weak,strict,0.6,", "a,uni,weak,strict,0.7,"], "row 3: a, uni, weak has another result"),
        (HEAD, ["a,uni,weak,strict,0.6"], "row 2 has 5 fields and the header has 6"),
        (f"{HEAD},cohort", ["a,uni,weak,strict,0.6,,a"], "duplicate column names: cohort"),
    ],
)
def test_a_malformed_file_is_refused_with_its_row(tmp_path, head, rows, message):
    with pytest.raises(DataError, match=rf"--beside .*theirs\.csv.*{message}"):
        read_published(written(tmp_path, *rows, head=head))


def test_a_name_that_is_no_file_and_no_shipped_table_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"--beside crossfusion-midl: no such file.* Did you mean crossfusion-midl2026"
    ):
        read_published("crossfusion-midl")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match=r"binary\.csv: is not a table"):
        read_published(str(tmp_path / "binary.csv"))
    with pytest.raises(DataError, match="cannot be read"):
        read_published(str(tmp_path))


def test_a_result_that_stands_in_two_tables_is_one(tmp_path):
    table = read_published(PAPER).results
    assert len(table) == 120
    assert len(pd.read_csv(shipped_tables()[PAPER], comment="#")) == 132


def test_the_shipped_table_holds_the_figures_of_the_paper_under_names_of_this_program(shared: Path):
    printed = pd.read_csv(shared / "published" / "crossfusion_midl2026" / "tables.csv", dtype=str)
    ours = pd.read_csv(shipped_tables()[PAPER], comment="#", dtype=str)
    columns = {"printed_encoder": "encoder", "printed_model": "model"}
    theirs = ours.drop(columns=["encoder", "model"]).rename(columns=columns)[list(printed.columns)]
    pd.testing.assert_frame_equal(theirs, printed)
    assert set(ours["encoder"]) <= set(CARDS)
    assert ours.groupby("printed_model")["model"].nunique().eq(1).all()
    assert ours.groupby("model")["printed_model"].nunique().eq(1).all()
    assert ours.groupby("encoder")["printed_encoder"].nunique().eq(1).all()


def test_report_console_and_csv_agree(comparison, tmp_path):
    file = written(
        tmp_path, "a,uni,good_model,published,0.6,0.02", "b,uni,good_model,published,0.75,",
        "b,uni,weak,published,0.6,", "c<d>,uni,weak,published,0.6,",
    )  # fmt: skip
    page = write_comparison(comparison, tmp_path / "report", title="t", published=read_published(file))
    found = PublishedComparison.read(page.parent / "published.csv", file)
    computed = compare_published(comparison, read_published(file))
    pd.testing.assert_frame_equal(found.rows, computed.rows, check_exact=True, check_dtype=False)
    assert (found.notes, found.summary) == (computed.notes, computed.summary)
    html = page.read_text()
    lines = [dict(zip(PUBLISHED_HEAD, line, strict=True)) for line in published_lines(found)]
    assert len(lines) == 3
    for line in lines:
        for column in ("yours", "theirs", "difference", "null independent", "null correlated", "clinical"):
            assert with_minus(line[column]) in html, column
    assert lines[2]["yours"] == "not complete"
    assert [line["clinical"] for line in lines] == ["–", "0.710", "0.710"]
    assert "c&lt;d&gt;" in html
    assert 'href="#published"' in html
    below = [row.their_cindex_mean < row.null_independent for row in found.matched.itertuples()]
    assert f"{sum(below)} of 3 lie below the mean of noise scores that are independent" in found.summary
    assert "1 of 2 lie below the clinical covariates" in found.summary
    assert found.summary in html.replace("&#39;", "'")
    assert published_table(found).row_count == 3


def test_a_report_without_published_results_leaves_none_of_an_earlier_one(comparison, tmp_path):
    file = written(tmp_path, "a,uni,good_model,published,0.6,0.02")
    out = tmp_path / "report"
    write_comparison(comparison, out, title="t", published=read_published(file))
    assert (out / "published.csv").exists()
    page = write_comparison(comparison, out, title="t")
    assert not (out / "published.csv").exists()
    assert "published results" not in page.read_text().lower()

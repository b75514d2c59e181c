"""Comparison of a sweep: unfinished cells have no value, and printed values equal the scores."""

import dataclasses
import itertools
import re

import numpy as np
import pandas as pd
import pytest
from headless import PAPER_PX, broken_by_page_ends, chromium, cut_columns, misread_numbers, needs_chromium
from made_up_comparison import STRENGTH, member

from cfusion.errors import DataError
from cfusion.report.comparison.cells import ComparedRun, Comparison, Cost, compare_runs
from cfusion.report.comparison.comparison_files import write_comparison
from cfusion.report.comparison.critical_difference import cd_diagram
from cfusion.report.comparison.paper import printed
from cfusion.report.printed_tables import escape_latex
from cfusion.survival.metrics import concordance
from cfusion.survival.paired import COLUMNS


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[ComparedRun]:
    folder = tmp_path_factory.mktemp("sweep") / "runs"
    cells = [(c, e, m) for c in ("a", "b", "c_d") for e, m in STRENGTH]
    found = [member(folder, *cell, seed) for cell in cells for seed in (1, 2) if cell != ("b", "conch", "weak")]
    found.append(member(folder, "b", "conch", "weak", 1))
    found.append(member(folder, "b", "conch", "weak", 2, state="failed"))
    permuted_runs = [member(folder, "a", "uni", "good_model", 1, permuted=seed) for seed in (0, 1)]
    return [*found, *permuted_runs]


@pytest.fixture(scope="module")
def comparison(members) -> Comparison:
    return compare_runs(members, bootstrap=100)


def cell(comparison: Comparison, cohort: str, encoder: str, model: str):
    return next(c for c in comparison.cells if (c.cohort, c.encoder, c.model) == (cohort, encoder, model))


def within_folds(tables: list[pd.DataFrame]):
    """The share of all comparable pairs within folds that are in order, by hand; mean over the tables."""
    values = []
    for table in tables:
        right = pairs = 0.0
        for _, fold in table.groupby("fold"):
            time, event, risk = (fold[name].to_numpy() for name in ("survival_months", "event", "risk"))
            earlier = event[:, None] & (time[:, None] < time[None, :])
            right, pairs = right + float((earlier & (risk[:, None] > risk[None, :])).sum()), pairs + earlier.sum()
        values.append(right / pairs)
    return pytest.approx(np.mean(values))


def test_a_cell_is_ranked_by_c_within_folds_and_has_the_mean_over_folds_and_seeds(comparison):
    found = cell(comparison, "a", "uni", "good_model")
    by_hand = []
    for run in found.members:
        for _, rows in pd.read_csv(run.folder / "predictions.csv").groupby("fold"):
            by_hand.append(concordance(rows["survival_months"], rows["event"], rows["risk"]).cindex)
    assert found.mean_of_folds == pytest.approx(np.mean(by_hand))
    assert found.value == within_folds([pd.read_csv(run.folder / "predictions.csv") for run in found.members])
    assert found.summary["cindex_std"] == pytest.approx(np.std(by_hand))
    assert found.summary["cindex_low"] < found.summary["cindex_pooled"] < found.summary["cindex_high"]
    assert found.null == within_folds([pd.read_csv(run.folder / "predictions.csv") for run in found.permuted])
    assert found.null < found.value


def test_a_failed_run_leaves_its_cell_without_a_value(comparison):
    broken = cell(comparison, "b", "conch", "weak")
    assert np.isnan(broken.value)
    assert broken.states == "1 failed of 2"
    assert not broken.best
    assert np.isnan(broken.p_best)
    assert "conch / weak" not in set(comparison.tests.query("cohort == 'b'")["model"])
    assert comparison.rankings["strict", "models"].blocks == 2


def test_one_best_per_cohort_and_noise_differs_from_it(comparison):
    for cohort in ("a", "b", "c_d"):
        best = [c for c in comparison.cells if c.cohort == cohort and c.best]
        assert len(best) == 1
        assert best[0].model == "good_model"
        others = [c for c in comparison.cells if c.cohort == cohort and c.complete]
        assert best[0].value == max(c.value for c in others)
    assert not cell(comparison, "a", "uni", "weak").tied
    assert (comparison.tests["p_holm"] >= comparison.tests["p"]).all()
    assert comparison.rankings["strict", "models"].names == ("good_model", "weak")


def test_files_agree_and_every_link_leads_to_a_run(comparison, members, tmp_path):
    page = write_comparison(comparison, tmp_path / "report", title="A & B <sweep>")
    html = page.read_text()
    assert "A &amp; B &lt;sweep&gt;" in html
    assert "no &lt;b&gt;loss&lt;/b&gt; &amp; no gain" in html
    value = cell(comparison, "a", "uni", "good_model").value
    shown = re.findall(r"<a href=\"#cell-\d+\">\s*(.*?)\s*</a></td>", html, re.DOTALL)
    found = cell(comparison, "a", "uni", "good_model")
    assert shown[0].startswith(f"{value:.3f}{found.mark} <small>{found.within[7:-1]}</small>")
    assert f"mean of folds {found.mean_of_folds:.3f} ± " in shown[0]
    assert "1 failed of 2" in html
    links = re.findall(r'href="((?!#)[^"]+)"', html)
    assert len(links) >= 2 * sum(m.state == "done" for m in members)
    for link in links:
        assert (page.parent / link).exists(), link
    anchors = re.findall(r'href="#([^"]+)"', html)
    assert all(f'id="{anchor}"' in html for anchor in anchors)
    table = pd.read_csv(page.parent / "cells.csv").set_index(["cohort", "encoder", "model"])
    assert table.loc[("a", "uni", "good_model"), "cindex_within"] == value
    assert not table.loc[("b", "conch", "weak"), "complete"]
    assert table.loc[("a", "uni", "good_model"), "cpu_hours"] == 1.0
    runs = pd.read_csv(page.parent / "runs.csv")
    assert len(runs) == len(members)
    assert runs["cpu_hours"].tolist() == [0.5] * len(members)
    assert "cost" not in runs
    assert not table["optimistic"].any()
    svg = (page.parent / "ranks_models_strict.svg").read_text()
    assert svg.startswith("<svg xmlns=")
    assert "good_model" in svg


@pytest.fixture(scope="module")
def papers(comparison, tmp_path_factory) -> tuple[str, str]:
    """The comparison in Markdown and in LaTeX."""
    out = write_comparison(comparison, tmp_path_factory.mktemp("paper"), title="t").parent
    return (out / "table.md").read_text(), (out / "table.tex").read_text()


def rows_of(text: str, start: str) -> list[list[str]]:
    """The body of the first table after `start`, in either language, as words; a blank first word is that above."""
    part = text[text.index(start) :]
    if part.startswith("###"):
        lines = re.search(r"\| ---.*\n((?:\|.*\n)+)", part)[1].splitlines()
        return [[word.strip() for word in line.strip("|").split(" | ")] for line in lines]
    body = part[part.index(r"\midrule") : part.index(r"\bottomrule")]
    rows = [
        [word.strip() for word in line.removesuffix(r"\\").split(" & ")] for line in body.splitlines() if " & " in line
    ]
    for above, row in itertools.pairwise(rows):
        row[0] = row[0] or above[0]
    return rows


@pytest.mark.parametrize("language", [0, 1])
def test_the_best_of_a_cohort_and_no_other_is_bold(comparison, papers, language):
    rows = rows_of(papers[language], ("### Results", r"\caption{Results")[language])
    opening, plus_minus = (("**", " ± "), (r"\textbf{", r" $\pm$ "))[language]
    assert len(rows) == len(STRENGTH)
    for encoder, model, *words in rows:
        for cohort, word in zip(("a", "b", "c_d"), words, strict=False):
            found = cell(comparison, cohort, encoder, model.replace("\\", ""))
            assert word.startswith(opening) == found.best, word
            assert (f"{found.mean_of_folds:.3f}{plus_minus}" in word) == found.complete, word
        assert words[-1] == "1.5"


@pytest.mark.parametrize("language", [0, 1])
def test_a_cohorts_table_has_c_within_folds_null_difference_p_and_cost(comparison, papers, language):
    rows = rows_of(papers[language], ("### Cohort a", r"\caption{Cohort a")[language])
    printed_rows = {(row[0], row[1].replace("\\", "")): row[2:] for row in rows}
    tests = comparison.tests.set_index(["cohort", "model"])
    for (encoder, model), (within, null, difference, p, p_holm, cost) in printed_rows.items():
        found = cell(comparison, "a", encoder, model)
        scores = found.summary
        assert within == f"{scores.cindex_within:.3f} ({scores.within_low:.3f} to {scores.within_high:.3f})"
        assert null == (("–", "--")[language] if np.isnan(found.null) else f"{found.null:.3f}")
        assert cost == "0.5 GPU h, 1 CPU h, 0.2 kWh"
        if found.best:
            assert difference == "the best"
            continue
        test = tests.loc[("a", found.label)]
        expected_difference = f"{test.difference:+.3f} ({test.low:+.3f} to {test.high:+.3f})"
        assert difference == expected_difference.replace("-", ("−", "$-$")[language])
        assert [p, p_holm] == [
            f"{value:.3f}" if value >= 0.001 else ("< 0.001", r"\textless{} 0.001")[language]
            for value in (test.p, test.p_holm)
        ]
    broken = rows_of(papers[language], ("### Cohort b", r"\caption{Cohort b")[language])[-1]
    assert broken[2:6] == ["1 failed of 2", *[("–", "--")[language]] * 3]


@pytest.mark.parametrize("language", [0, 1])
def test_ranks_stand_in_the_papers_tables(comparison, papers, language):
    rows = rows_of(papers[language], ("### Ranks", r"\caption{Ranks")[language])
    models, encoders = (comparison.rankings["strict", what] for what in ("models", "encoders"))
    assert [row[2] for row in rows] == [f"{rank:.2f}" for rank in (*models.mean_ranks, *encoders.mean_ranks)]
    assert [row[0] for row in rows] == ["models, 2 cohorts"] * 2 + ["encoders, 2 cohorts"] * 2
    assert f"Critical difference {models.critical_difference:.2f}" in papers[language]


def test_latex_is_complete_and_its_names_are_escaped(comparison, papers):
    tex = papers[1]
    assert r"good\_model" in tex
    assert r"c\_d" in tex
    for table in re.findall(r"\\begin\{table\*\}.*?\\end\{table\*\}", tex, re.DOTALL):
        columns = re.search(r"\\begin\{tabular\}\{@\{\}(\w+)@\{\}\}", table)[1]
        lines = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert {line.count("&") for line in lines} == {len(columns) - 1}
        assert table.count("{") == table.count("}")
        assert table.isascii()
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == len(printed(comparison, "strict")) == 5
    assert escape_latex("50%_a\\b{c}<|") == r"50\%\_a\textbackslash{}b\{c\}\textless{}\textbar{}"


def test_every_output_of_the_published_protocol_says_that_it_is_optimistic(tmp_path):
    names = [(c, m) for c in ("a", "b") for m in ("good_model", "weak")]
    published = [member(tmp_path / "p", c, "uni", m, 1, protocol="published") for c, m in names]
    strict = [member(tmp_path / "s", c, "uni", m, 1) for c, m in names]
    out = write_comparison(compare_runs([*strict, *published], bootstrap=20), tmp_path / "out", title="t").parent
    warned = "OPTIMISTIC: the epoch is chosen on the same fold"
    sections = (out / "table.md").read_text().split("## Protocol ")[1:]
    assert [(part.split()[0], part.count(warned)) for part in sections] == [("strict", 0), ("published", 5)]
    captions = re.findall(r"\\caption\{(.*)\}", (out / "table.tex").read_text())
    assert [warned in caption for caption in captions] == [False] * 4 + [True] * 4
    cells = pd.read_csv(out / "cells.csv")
    assert (cells["optimistic"] == (cells["protocol"] == "published")).all()
    assert warned in (out / "index.html").read_text()
    for protocol, said in ("published", True), ("strict", False):
        svg = (out / f"ranks_models_{protocol}.svg").read_text()
        for tag in ("desc", "text"):
            assert any(warned in words for words in re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", svg)) == said


def test_large_cost_is_printed_in_plain_digits():
    assert Cost(12345.6, 1.26, float("nan")).words == "1.26 GPU h, 12,346 CPU h"
    assert Cost(0.02, 0.0005, float("nan")).words == "1.8 GPU s, 72 CPU s"
    assert Cost().words == "–"


def test_a_narrower_report_leaves_no_diagram_of_a_wider_one(comparison, members, tmp_path):
    write_comparison(comparison, tmp_path, title="t")
    (tmp_path / "ranks_mine.svg").write_text("<svg/>")
    models = compare_runs([m for m in members if m.encoder == "uni"], bootstrap=0)
    write_comparison(models, tmp_path, title="t")
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["ranks_mine.svg", "ranks_models_strict.svg"]


def test_models_without_a_common_seed_are_reported_as_not_compared(tmp_path):
    apart = [member(tmp_path, "a", "uni", "good_model", 1), member(tmp_path, "a", "uni", "weak", 2)]
    compared = compare_runs(apart, bootstrap=20)
    out = write_comparison(compared, tmp_path / "out", title="t").parent
    html, md, tex = ((out / name).read_text() for name in ("index.html", "table.md", "table.tex"))
    assert "over the 0 tests" in html
    assert f"{cell(compared, 'a', 'uni', 'weak').mean_of_folds:.3f} ± " in html
    for text in html, md, tex:
        assert "not compared: no common seed" in text
        assert not re.search(r"\bnan\b", text)
    assert "‡ |" in md
    assert r"$^\ddagger$ &" in tex


def test_without_a_bootstrap_nothing_is_tested(members, tmp_path):
    without = compare_runs([m for m in members if m.cohort == "a"], bootstrap=0)
    assert without.tests.empty
    written = pd.read_csv(write_comparison(without, tmp_path, title="t").parent / "tests.csv")
    assert written.empty
    assert tuple(written.columns) == COLUMNS
    assert {cell.mark for cell in without.cells if not cell.best} == {"‡"}
    assert sum(cell.best for cell in without.cells) == 1
    assert not any(cell.tied for cell in without.cells)
    assert np.isnan(without.cells[0].summary["cindex_low"])


def test_nothing_done_is_an_error(tmp_path):
    with pytest.raises(DataError, match="none of the sweep's runs is done"):
        compare_runs([member(tmp_path, "a", "uni", "weak", 1, state="open")])


def test_a_cell_says_what_it_adds_to_the_clinic(comparison, tmp_path):
    added = {
        "clinical_c": 0.71, "clinical_c_low": 0.66, "clinical_c_high": 0.76, "added_c": 0.02, "added_c_low": -0.01,
        "added_c_high": 0.05,
    }  # fmt: skip
    cells = tuple(
        dataclasses.replace(c, summary=pd.concat([c.summary, pd.Series(added)])) if c.summary is not None else c
        for c in comparison.cells
    )
    found = next(c for c in cells if c.complete)
    assert (found.clinical, found.added) == ("0.710 (0.660 to 0.760)", "+0.020 (−0.010 to +0.050)")
    page = write_comparison(dataclasses.replace(comparison, cells=cells), tmp_path, title="Sweep").read_text()
    assert "clinical 0.710 (0.660 to 0.760)" in page
    assert "adds +0.020 (−0.010 to +0.050)" in page
    table = (tmp_path / "table.md").read_text()
    assert "Adds to the clinic (95%)" in table
    assert "which reach 0.710 (0.660 to 0.760) by themselves" in table


def test_ranks_of_one_cohort_say_that_there_is_no_test(comparison, tmp_path):
    one = {key: dataclasses.replace(found, blocks=1, critical_difference=float("nan"))
           for key, found in comparison.rankings.items()}  # fmt: skip
    page = write_comparison(dataclasses.replace(comparison, rankings=one), tmp_path, title="Sweep").read_text()
    assert page.count('1 is best.<span class="wide"> With one cohort there is no test.</span>') == len(one)
    several = write_comparison(comparison, tmp_path, title="Sweep").read_text()
    assert "With one cohort there is no test" not in several


@needs_chromium
def test_names_of_the_rank_diagram_stay_inside_it_and_a_phone_has_a_line_for_each_number(comparison, tmp_path):
    names = ("crossfusion_concat", "crossfusion_" + "with_a_long_setting_" * 3 + "at_the_end")
    ranking = dataclasses.replace(comparison.rankings["strict", "models"], names=names, cliques=(names,))
    (tmp_path / "ranks.html").write_text(cd_diagram(ranking, "models", "strict"))
    page_file = write_comparison(comparison, tmp_path / "report", title="Sweep")
    outside = """() => {
      const box = document.querySelector('svg').getBoundingClientRect();
      return [...document.querySelectorAll('svg text')].map(node => [node.textContent, node.getBoundingClientRect()])
        .filter(([, text]) => text.left < box.left || text.right > box.right).map(([words]) => words);
    }"""
    lines = "() => [...document.querySelector('td.cell').querySelectorAll('small')].map(node => node.offsetTop)"
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto((tmp_path / "ranks.html").as_uri())
        assert page.evaluate(outside) == []
        assert "crossfusion_concat" in page.text_content("svg")
        page.set_viewport_size({"width": 390, "height": 900})
        page.goto(page_file.as_uri())
        tops = page.evaluate(lines)
    assert len(tops) == 3
    assert tops[0] < tops[1] < tops[2]


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize(("width", "media"), [(390, "screen"), (1400, "screen"), (PAPER_PX, "print")])
def test_no_column_of_the_page_is_cut(comparison, tmp_path, width, media):
    page_file = write_comparison(comparison, tmp_path / "report", title="Sweep")
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.emulate_media(media=media)
        page.goto(page_file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert cut_columns(page) == []
        page.screenshot(path=tmp_path / "page.png", full_page=True)


@needs_chromium
@pytest.mark.slow
def test_no_page_of_the_sweep_report_ends_within_a_row_and_its_numbers_have_a_true_minus(comparison, tmp_path):
    page_file = write_comparison(comparison, tmp_path / "report", title="Sweep")
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(page_file.as_uri())
        assert misread_numbers(page) == []
        assert broken_by_page_ends(page) == []

"""Measure the report and the sweep report in a headless Chromium: no column is cut, on a phone, a desk or paper."""

from pathlib import Path

import pandas as pd
import pytest
from headless import PAPER_PX, broken_by_page_ends, chromium, cut_columns, misread_numbers, needs_chromium
from made_up_outcomes import cohort, predicted

from cfusion.cohort.audit import audit
from cfusion.cohort.splits import make_splits
from cfusion.config import SplitsConfig
from cfusion.report import ReportContext, write_report
from cfusion.report.narrow_tables import name_cells
from cfusion.survival.score import Scores, score

pytestmark = [needs_chromium, pytest.mark.slow]


def scored(model: str, protocol: str = "strict", noise: float = 0.0) -> Scores:
    data = cohort(120)
    splits = make_splits(data, SplitsConfig(), protocol)
    return score(predicted(data, splits, model, protocol, noise), data, splits, bootstrap=50)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = cohort(120)
    splits = make_splits(data, SplitsConfig())
    long = "a-model-with-a-name-that-nobody-would-choose-but-somebody-has"
    scores = [scored("amil"), scored("amil", "published"), scored(long, noise=2.0), scored("crossfusion", noise=1.0)]
    context = ReportContext(
        title="A long title of a report of several models", audits={"made_up": audit(data, splits).to_json()}
    )
    out = tmp_path_factory.mktemp("report")
    return write_report(scores, out, context=context)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.mark.parametrize(("width", "media"), [(390, "screen"), (1400, "screen"), (PAPER_PX, "print")])
def test_no_column_of_the_report_is_cut(browser, report: Path, tmp_path: Path, width: int, media: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, reduced_motion="reduce")
    page.emulate_media(media=media)
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(node => (node.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert cut_columns(page) == []
    smallest = page.evaluate(
        """() => Math.min(...[...document.querySelectorAll('svg text')].filter(t => t.checkVisibility())
          .map(t => t.getBoundingClientRect().height))"""
    )
    assert smallest >= 9, "text of the figures can be read"
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    page.close()


def test_no_page_of_the_report_ends_within_a_figure_a_row_or_below_a_heading(browser, report: Path) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    assert broken_by_page_ends(page) == []
    assert not page.locator("thead").first.evaluate("node => getComputedStyle(node).display !== 'table-header-group'")
    page.close()


def test_what_a_page_end_breaks_is_found(browser, report: Path) -> None:
    """The measurement above, without the style sheet's rules."""
    page = browser.new_page()
    page.goto(report.as_uri())
    page.add_style_tag(content="* { break-inside: auto !important; break-after: auto !important }")
    found = broken_by_page_ends(page)
    assert any(line.startswith("cut: ") for line in found)
    page.close()


def test_negative_numbers_have_a_true_minus_on_screen(browser, report: Path) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    assert misread_numbers(page) == []
    assert page.locator("text=/−0\\.\\d/").count()
    page.close()


def test_a_phone_names_the_column_of_each_number(browser, report: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto(report.as_uri())
    first = page.locator("#results table").first.locator("tbody tr").first
    assert "C within folds 95% interval" in first.locator("td.strong").last.get_attribute("data-column")
    heads = first.evaluate("row => [...row.cells].map(cell => getComputedStyle(cell, '::before').content)")
    assert all(len(head) > 4 for head in heads), "no cell without the name of its column"
    boxes = first.locator("td").evaluate_all("cells => cells.map(cell => cell.getBoundingClientRect().left)")
    assert len(set(boxes)) == 1, "one below the other"
    page.close()


def test_cells_are_named_by_their_columns() -> None:
    table = pd.DataFrame({"a <b>": [1], "c": [2]}).to_html(index=False)
    named = name_cells(
        table + "<table><thead><tr><th>x <small>y</small></th><th>z</th></tr></thead>"
        '<tbody><tr><td class="w" colspan="2">1</td></tr><tr><th>0</th><td>2</td></tr></tbody></table>'
    )
    assert '<td data-column="a &lt;b&gt;">1</td>' in named
    assert '<td data-column="x y" class="w" colspan="2">' in named
    assert '<td data-column="z">2</td>' in named

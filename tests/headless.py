"""A headless Chromium for the tests of pages."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package: chromium)")


@contextlib.contextmanager
def chromium() -> Iterator:
    """A running browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


PAPER_PX = round(273 / 25.4 * 96)
"""Width of A4 in landscape between its margins."""


def cut_columns(page) -> list[str]:
    """Tables and figures of a page that are wider than their box, so that a column is out of sight."""
    page.evaluate("document.querySelectorAll('details').forEach(node => (node.open = true))")
    return page.evaluate(
        """() => [...document.querySelectorAll('.scroll, figure')]
          .filter(box => box.checkVisibility() && box.scrollWidth > box.clientWidth + 1)
          .map(box => `${box.scrollWidth} > ${box.clientWidth}: ${box.textContent.trim().slice(0, 80)}`)"""
    )


PAPER_HEIGHT_PX = round(186 / 25.4 * 96)
"""Height of A4 in landscape between its margins."""


def broken_by_page_ends(page) -> list[str]:
    """What the ends of printed pages tear apart: figures, rows, legends, short tables, headings from what follows.

    Pages of paper are laid out as columns of the same size, which Chromium breaks by the same rules, and whose
    fragments can be measured.
    """
    page.set_viewport_size({"width": PAPER_PX, "height": PAPER_HEIGHT_PX})
    page.emulate_media(media="print")
    page.add_style_tag(
        content=f"html {{ overflow: visible }} body {{ width: {PAPER_PX}px; height: {PAPER_HEIGHT_PX}px; margin: 0; "
        f"column-width: {PAPER_PX}px; column-gap: 0; column-fill: auto }}"
    )
    return page.evaluate(
        """([width, height]) => {
          const sheets = (node) => [...node.getClientRects()].filter((box) => box.height > 1)
            .map((box) => Math.floor((box.left + scrollX + 1) / width));
          const seen = (node) => node.checkVisibility() && node.getBoundingClientRect().height > 1;
          const shown = (selector) => [...document.querySelectorAll(selector)].filter(seen);
          const words = (node) => `${node.tagName} ${node.className.baseVal ?? node.className}: ` +
            node.textContent.trim().replace(/\\s+/g, " ").slice(0, 60);
          const found = [];
          const short = ".scroll:not(:has(tbody > tr:nth-child(9)))";
          for (const node of shown(`figure, svg, img, tr, .legend, .warning, h1, h2, h3, ${short}`)) {
            const on = new Set(sheets(node));
            if (on.size > 1) found.push(`cut: ${words(node)}`);
          }
          for (const node of shown("h2, h3, summary, .legend, thead, caption")) {
            let next = node.nextElementSibling ?? node.parentElement.nextElementSibling;
            while (next && !seen(next)) next = next.nextElementSibling;
            if (node.tagName === "THEAD") next = node.parentElement.tBodies[0].rows[0];
            if (next && sheets(node)[0] !== sheets(next)[0]) found.push(`left behind: ${words(node)}`);
          }
          const used = Math.max(...shown("main *").flatMap(sheets)) + 1;
          return used > 1 ? found : [`all on ${used} page`];
        }""",
        [PAPER_PX, PAPER_HEIGHT_PX],
    )


def misread_numbers(page) -> list[str]:
    """Numbers in sight with a hyphen for a minus or with `e-05`, except in code, settings and names."""
    page.evaluate("document.querySelectorAll('details').forEach(node => (node.open = true))")
    return page.evaluate(
        """() => {
          const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
          for (let node = walker.nextNode(); node; node = walker.nextNode()) {
            const words = node.textContent.trim();
            if (node.parentElement.closest("code, style, script, title, desc, #provenance, #search")) continue;
            if (/(^|[\\s(±])-\\.?\\d/.test(words) || /\\de[-+]?\\d/.test(words)) found.push(words.slice(0, 80));
          }
          return found;
        }"""
    )

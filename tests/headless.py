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

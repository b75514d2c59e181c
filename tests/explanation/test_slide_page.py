"""Measure the page of a slide in a headless Chromium: it fits a phone, whatever the name; its legends are readable."""

import dataclasses

import numpy as np
import pytest
from headless import broken_by_page_ends, chromium, cut_columns, misread_numbers, needs_chromium

from cfusion.explanation.explanation_files import write_results

pytestmark = [needs_chromium, pytest.mark.slow]


class Grey:
    """A slide of one colour."""

    size_px = (4096, 3072)

    def overview(self, side_px: int) -> np.ndarray:
        return np.full((side_px * 3 // 4, side_px, 3), 200, np.uint8)

    def region(self, x_px: int, y_px: int, side_px: int, out_px: int) -> np.ndarray:
        return np.full((out_px, out_px, 3), 180, np.uint8)


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_its_legends_have_contrast(found, tmp_path, width: int, scheme: str):
    levels = {n: dataclasses.replace(v, p=np.zeros_like(v.mean)) for n, v in found.levels.items()}
    named = dataclasses.replace(found, slide_id="a-name-of-a-slide-" * 9, levels=levels)
    page_file = write_results(named, tmp_path / "slide", pictures=Grey())
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.goto(page_file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert cut_columns(page) == []
        legend = page.locator(".legend").first
        ink, paper = (
            sum(
                map(
                    int,
                    page.evaluate(
                        "([node, name]) => getComputedStyle(node)[name].match(/\\d+/g).slice(0, 3)", [at, of]
                    ),
                )
            )
            for at, of in (
                (legend.element_handle(), "color"),
                (page.locator("body").element_handle(), "backgroundColor"),
            )
        )
        assert abs(ink - paper) > 400, "of 765"
        assert legend.locator("b").count() == 3
        assert page.locator("#noise").is_visible()
        assert page.locator("figure img").first.bounding_box()["width"] <= width
        page.screenshot(path=tmp_path / "page.png", full_page=True)


def test_numbers_legends_and_printed_pages_can_be_read(found, tmp_path):
    small = {
        n: dataclasses.replace(v, mean=v.mean * np.float32(1e-5), sd=v.sd * np.float32(1e-5), p=np.zeros_like(v.mean))
        for n, v in found.levels.items()
    }
    page_file = write_results(dataclasses.replace(found, levels=small), tmp_path / "slide", pictures=Grey())
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(page_file.as_uri())
        assert "10⁻" in page.locator(".legend").first.inner_text()
        assert "grey: may be noise" in page.locator(".legend").first.inner_text()
        clear = page.locator(".clear").all_inner_texts()
        assert set(clear) == {"pale to see-through: little to no effect, and the models agree"}
        assert len(clear) == sum(name != "attention" for name in found.methods), "attention has no see-through colour"
        assert misread_numbers(page) == []
        assert broken_by_page_ends(page) == []


def test_what_may_be_noise_is_coloured_on_request(found, tmp_path):
    levels = {n: dataclasses.replace(v, p=np.full_like(v.mean, 0.2)) for n, v in found.levels.items()}
    page_file = write_results(dataclasses.replace(found, levels=levels), tmp_path / "slide", pictures=Grey())
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(page_file.as_uri())
        shown = [page.locator(f".pictures img.{name}").first for name in ("without-noise", "with-noise")]
        assert [picture.is_visible() for picture in shown] == [True, False]
        page.get_by_label("Colour what may be noise").check()
        assert [picture.is_visible() for picture in shown] == [False, True]


def test_without_p_values_there_is_nothing_to_switch(found, tmp_path):
    levels = {n: dataclasses.replace(v, p=None) for n, v in found.levels.items()}
    page_file = write_results(dataclasses.replace(found, levels=levels), tmp_path / "slide", pictures=Grey())
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(page_file.as_uri())
        assert page.locator("#noise").count() == page.locator(".with-noise").count() == 0
        assert "every tile is coloured" in page.locator("#heatmaps").inner_text()

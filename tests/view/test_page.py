"""Test the viewer's page in a headless Chromium: mouse, keyboard and what is drawn."""

import dataclasses
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from headless import chromium, needs_chromium
from made_up_viewer import DAMAGED, EXPLAINED, PLAIN, SIZE, Client, Files, explanation, make_files, running, until

from cfusion.explanation.result import Explanation, TileScores, write_explanation
from cfusion.view import openseadragon
from cfusion.view.api import Viewer, load_deep_zoom
from cfusion.view.explanations import Explanations
from cfusion.view.served_slides import SlideFolder

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
expect.set_options(timeout=30_000)

pytestmark = needs_chromium
deep = pytest.mark.skipif(
    not openseadragon.package_path().is_file(), reason="OpenSeadragon has not been fetched: cfusion view --fetch"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@dataclass
class Window:
    """A page of a viewer, with a record of its requests and errors."""

    page: "sync_api.Page"
    client: Client
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self, slide: str = EXPLAINED) -> "sync_api.Page":
        self.page.goto(f"{self.client.address}#{self.client.keys()[slide]}")
        self.page.wait_for_selector("#stage[data-state=open]")
        if slide == EXPLAINED:
            self.page.wait_for_selector("#stage[data-shown]")
            until(lambda: self.colour(-60)[3] > 0)
        return self.page

    def colour(self, right: float = 0, down: float = 0) -> list[int]:
        """Return the RGBA of the heatmap at an offset in CSS px from the middle of the stage."""
        return self.page.evaluate(
            """([right, down]) => {
                const canvas = document.getElementById('overlay'), { clientWidth, clientHeight } = canvas;
                const ratio = canvas.width / clientWidth;
                const at = [clientWidth / 2 + right, clientHeight / 2 + down].map(v => Math.round(v * ratio));
                return [...canvas.getContext('2d').getImageData(...at, 1, 1).data];
            }""",
            [right, down],
        )


def windows(browser, viewer: Viewer, **options) -> Iterator[Window]:
    with running(viewer) as client:
        options = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce", **options}
        context = browser.new_context(**options)
        window = Window(context.new_page(), client)
        window.page.on("request", lambda request: window.asked.append(request.url))
        window.page.on("pageerror", lambda error: window.complaints.append(str(error)))
        window.page.on("console", lambda said: window.complaints.append(said.text) if said.type == "error" else None)
        yield window
        context.close()
        assert window.asked
        assert {url.split("/")[2] for url in window.asked if not url.startswith(("blob:", "data:"))} == {
            f"127.0.0.1:{client.port}"
        }


def shown(files: Files) -> Viewer:
    viewer = files.viewer()
    load_deep_zoom(viewer)
    return viewer


@pytest.fixture
def window(browser, files: Files) -> Iterator[Window]:
    for window in windows(browser, shown(files)):
        yield window
        assert not window.complaints


@deep
def test_a_click_reads_the_tile(window: Window, tmp_path):
    page = window.open()
    page.locator("#stage").click(position={"x": page.locator("#stage").bounding_box()["width"] / 2 - 60, "y": 360})
    page.wait_for_selector("#tile-body table")
    point = re.search(r"(\d+), (\d+) px", page.locator("#tile-body .facts").inner_text())
    assert 400 < int(point[1]) < SIZE[0] / 2
    patches = page.locator("#tile-body img")
    assert patches.count() == 3
    for patch in patches.all():
        expect(patch).to_have_js_property("naturalWidth", 256)
    assert page.locator("#tile-body figcaption").all_inner_texts() == ["20x: 128 µm", "10x: 256 µm", "5x: 512 µm"]
    rows = page.locator("#tile-body tbody tr").all_inner_texts()
    assert [re.split(r"\s+", row) for row in rows] == [
        ["20x", "–", "0.1", "±", "0.01", "1.5", "±", "0.15"],
        ["10x", "–", "0.1", "±", "0.01", "1.5", "±", "0.15"],
        ["5x", "0.2", "±", "0.02", "0.1", "±", "0.01", "1.5", "±", "0.15"],
    ]
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000


@pytest.mark.slow
@deep
def test_zoom_loads_finer_tiles_and_resets(window: Window):
    page = window.open()
    expect(page.locator("#scale-words")).not_to_be_empty()
    levels = lambda: {int(m[1]) for url in window.asked if (m := re.search(r"/tiles/(\d+)/", url))}  # noqa: E731
    before, scale = max(levels()), page.locator("#scale-words").inner_text()
    page.get_by_role("button", name="Zoom in").click()
    page.get_by_role("button", name="Zoom in").click()
    expect(page.locator("#scale-words")).not_to_have_text(scale)
    page.wait_for_load_state("networkidle")
    assert max(levels()) > before
    page.keyboard.press("0")
    expect(page.locator("#scale-words")).to_have_text(scale)
    page.locator("#stage").focus()
    right = window.colour(120)
    assert window.colour(-150) != right
    for _ in range(2):
        page.keyboard.press("ArrowRight")  # a fifth of the screen each
    until(lambda: window.colour(-150) == right)


@deep
def test_the_heatmap_switches(window: Window):
    page = window.open()
    # Occlusion runs the model and has a sign; models agree on more of the large tiles; attention says least.
    assert page.locator("#stage").get_attribute("data-shown") == "x5/occlusion/RdBu_r"
    assert page.locator("#methods label").all_inner_texts() == ["occlusion", "gradient", "attention"]
    left, right = window.colour(-120), window.colour(120)
    assert left[3] == right[3] == 153  # 60% of 255
    assert left[0] > left[2], "raises the risk: red"
    assert right[2] > right[0], "lowers the risk: blue"
    page.get_by_text("20x", exact=True).first.click()
    page.wait_for_selector("#stage[data-shown='x20/gradient/RdBu_r']")
    left, right = window.colour(-120), window.colour(120)
    assert left[0] > left[2], "raises the risk: red"
    assert right[2] > right[0], "lowers the risk: blue"
    assert [page.locator(f"#colour-{end}").inner_text() for end in ("low", "mid", "high")] == ["−0.1", "0", "0.1"]
    assert "raises" in page.locator("#colour-unit").inner_text()
    page.get_by_text("5x", exact=True).first.click()
    page.wait_for_selector("#stage[data-shown='x5/gradient/RdBu_r']")
    assert page.locator("#colour-high").inner_text() == "0.1", "one scale for all magnifications"
    page.locator("#palette").select_option("PuOr_r")
    page.wait_for_selector("#stage[data-shown='x5/gradient/PuOr_r']")
    assert window.colour(-120) != left
    page.locator("#range").select_option("full")
    page.get_by_label("Show over the slide").uncheck()
    assert window.colour(-120)[3] == 0


@deep
def test_noise_is_grey_and_attention_carries_a_warning(window: Window):
    page = window.open()
    expect(page.locator("#verdict")).to_have_text(re.compile(r"^The 3 models agree on (\d+) of \1 tiles at 5x"))
    expect(page.locator("#clear")).to_have_text("pale to see-through: little to no effect")
    page.get_by_text("attention", exact=True).first.click()
    page.wait_for_selector("#stage[data-shown='x5/attention/viridis']")
    left, right = window.colour(-120), window.colour(120)
    assert left[3] == pytest.approx(0.6 * 0.25 * 255, abs=1), "noise is pale"
    assert len(set(left[:3])) == 1, "and grey"
    assert right[3] == 153
    assert "may lower it" in page.locator("#meaning.caution").inner_text()
    expect(page.locator("#verdict")).to_contain_text("models agree on")
    expect(page.locator("#faded")).to_have_text("grey: may be noise")
    expect(page.locator("#clear")).to_be_hidden()
    page.get_by_label("Colour what may be noise").check()
    until(lambda: window.colour(-120)[3] == 153)
    expect(page.locator("#faded")).to_be_hidden()


@pytest.mark.slow
@deep
def test_an_explanation_without_p_values_says_so_and_paints_all(browser, files: Files, tmp_path):
    write_explanation(without_p(explanation(EXPLAINED)), tmp_path / "explanation.zarr")
    viewer = Viewer(SlideFolder(files.slides), Explanations(tmp_path))
    load_deep_zoom(viewer)
    for window in windows(browser, viewer):
        page = window.open()
        expect(page.locator("#verdict")).to_contain_text("nothing shows which tiles at 5x are noise")
        expect(page.locator("#verdict")).to_contain_text("run `cfusion explain` again")
        expect(page.locator("#faded")).to_be_hidden()
        expect(page.get_by_label("Colour what may be noise")).to_be_hidden()
        page.get_by_text("attention", exact=True).first.click()
        page.wait_for_selector("#stage[data-shown='x5/attention/viridis']")
        assert window.colour(-120)[3] == 153


@pytest.mark.slow
@deep
def test_nothing_is_coloured_of_a_run_that_ranks_nobody(browser, files: Files, tmp_path):
    chance = {"cindex": 0.51, "chance": 0.5, "p": 0.4, "patients": 40, "events": 25}
    write_explanation(explanation(EXPLAINED, ranking=chance), tmp_path / "explanation.zarr")
    viewer = Viewer(SlideFolder(files.slides), Explanations(tmp_path))
    load_deep_zoom(viewer)
    for window in windows(browser, viewer):
        page = window.open()
        expect(page.locator("#verdict")).to_contain_text("does not rank held-out patients better than chance")
        grey = window.colour(-120)
        assert grey == window.colour(120)
        assert len(set(grey[:3])) == 1


def without_p(found: Explanation) -> Explanation:
    levels = {name: dataclasses.replace(level, p=None) for name, level in found.levels.items()}
    return dataclasses.replace(found, levels=levels)


@pytest.mark.slow
@deep
@pytest.mark.parametrize("ratio", [1, 2])
def test_tiles_off_the_grid_are_drawn_at_their_position(browser, files: Files, tmp_path, ratio: int):
    corners, side = np.array([[300, 333], [1111, 777]], np.int32), 256
    scores = np.array([[1.0, -1.0]], np.float32)
    level = TileScores(corners, side, scores, np.full_like(scores, np.nan))
    full = explanation(PLAIN)
    write_explanation(
        dataclasses.replace(full, levels={"x20": level}, methods=("gradient",)), tmp_path / "explanation.zarr"
    )
    viewer = Viewer(SlideFolder(files.slides), Explanations(tmp_path))
    load_deep_zoom(viewer)
    for window in windows(browser, viewer, device_scale_factor=ratio):
        page = window.open(PLAIN)
        page.wait_for_selector("#stage[data-shown='x20/gradient/RdBu_r']")
        box = page.locator("#stage").bounding_box()
        scale = min(box["width"] / SIZE[0], box["height"] / SIZE[1])

        def at(x: float, y: float, scale: float = scale, window: Window = window) -> list[int]:
            return window.colour((x - SIZE[0] / 2) * scale, (y - SIZE[1] / 2) * scale)

        until(lambda: at(428, 461)[3] > 0)
        for (x, y), red in zip(corners, (True, False), strict=True):
            for i in (30, side - 30):
                for j in (30, side - 30):
                    inside = at(x + i, y + j)
                    assert (inside[0] > inside[2]) == red
                    assert inside[3] == 153
            for i, j in ((-30, 128), (side + 30, 128), (128, -30), (128, side + 30)):
                assert at(x + i, y + j)[3] == 0
        assert not window.complaints


@pytest.mark.slow
@deep
def test_a_score_that_a_magnification_lacks_cannot_be_chosen(window: Window):
    page = window.open()
    occlusion = page.get_by_role("radio", name="occlusion")
    assert occlusion.is_enabled()
    page.get_by_text("20x", exact=True).first.click()
    page.wait_for_selector("#stage[data-shown='x20/gradient/RdBu_r']")
    assert occlusion.is_disabled()
    page.get_by_text("5x", exact=True).first.click()
    page.wait_for_selector("#stage[data-shown='x5/gradient/RdBu_r']")
    page.get_by_text("occlusion", exact=True).first.click()
    page.wait_for_selector("#stage[data-shown='x5/occlusion/RdBu_r']")


@pytest.mark.slow
@deep
def test_everything_works_from_the_keyboard(window: Window):
    page = window.open()
    keys = page.keyboard
    keys.press("m")
    page.wait_for_selector("#stage[data-shown='x20/gradient/RdBu_r']")
    keys.press("m")
    page.wait_for_selector("#stage[data-shown='x10/gradient/RdBu_r']")
    keys.press("s")
    page.wait_for_selector("#stage[data-shown='x10/attention/viridis']")
    keys.press("s")
    page.wait_for_selector("#stage[data-shown='x10/gradient/RdBu_r']")
    keys.press("c")
    page.wait_for_selector("#stage[data-shown='x10/gradient/PuOr_r']")
    for _ in range(3):
        keys.press("[")
    expect(page.locator("#opacity-words")).to_have_text("30%")
    assert window.colour(-120)[3] == pytest.approx(0.3 * 255, abs=1)
    keys.press("]")
    expect(page.locator("#opacity-words")).to_have_text("40%")
    keys.press("h")
    assert window.colour(-120)[3] == 0
    assert not page.get_by_label("Show over the slide").is_checked()
    keys.press("h")
    page.locator("#stage").focus()
    keys.press("Enter")
    page.wait_for_selector("#tile-body table")
    keys.press("Escape")
    page.wait_for_selector("#tile-body table", state="detached")
    keys.press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    keys.press("Escape")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_hidden()
    keys.press("n")
    expect(page.locator("#slide-name")).to_have_text(PLAIN)
    keys.press("p")
    expect(page.locator("#slide-name")).to_have_text(EXPLAINED)


@pytest.mark.slow
@deep
def test_the_focus_is_seen_and_every_control_has_a_name(window: Window):
    page = window.open()
    seen = []
    for _ in range(25):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
                const at = document.activeElement, box = at.closest('.segments') ?? at;
                const name = at === document.body ? '' : at.id || at.name || at.className || at.tagName;
                return [name, getComputedStyle(box).outlineStyle];
            }"""
        )
        seen.append(name)
        assert name == "" or outline == "solid", name
    assert {"skip", "search", "stage", "show", "magnifications", "methods", "opacity", "palette", "range"} <= set(seen)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, a, [role=application], canvas[role=img]')]
          .filter(e => !(e.ariaLabel || e.getAttribute('aria-label') || e.textContent.trim() || e.closest('label')))
          .map(e => e.outerHTML)"""
    )
    assert not unnamed


@pytest.mark.slow
@deep
def test_search_narrows_the_list_and_opens(window: Window):
    page = window.open()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("0002")
    expect(page.locator("#count")).to_have_text("1 of 3 slides")
    expect(page.locator("#list b")).to_have_text([PLAIN])
    page.keyboard.press("Enter")
    expect(page.locator("#slide-name")).to_have_text(PLAIN)
    expect(page.locator("#heatmap-none")).to_contain_text("cfusion explain")
    page.locator("#search").fill("nobody")
    expect(page.locator("#count")).to_have_text("No matching slide.")


@pytest.mark.slow
@deep
def test_the_patients_curve_is_drawn_with_that_of_the_cohort(window: Window):
    page = window.open()
    figure = page.locator("#patient-body svg")
    assert "within the Kaplan–Meier curve of the 40 patients of made_up" in figure.get_attribute("aria-label")
    expect(figure.locator("path.patient")).to_have_count(1)
    expect(page.locator("#patient-body .legend span")).to_have_count(3)
    assert "PT-0001" in page.locator("#patient-body").inner_text()


@pytest.mark.slow
@deep
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(browser, files: Files, scheme: str):
    for window in windows(browser, shown(files), color_scheme=scheme):
        page = window.open()
        page.locator("#stage").focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("#tile-body table")
        paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (paper > 0.8) == (scheme == "light")
        for selector in (
            "h1",
            "#slide-facts",
            "#count",
            "#meaning",
            "#verdict",
            "#faded",
            ".slide small",
            "#tile-body td",
            "svg.plot text",
            "footer",
        ):
            node = page.locator(selector).first
            words = node.evaluate("e => getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color']")
            assert contrast(luminance(words), paper) >= 4.5, (selector, words)
        assert not window.complaints


def luminance(colour: str) -> float:
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


@pytest.mark.slow
@deep
def test_a_narrow_screen(browser, files: Files):
    for window in windows(browser, shown(files), viewport={"width": 380, "height": 800}, has_touch=True):
        page = window.open()
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        expect(page.locator("#list")).to_be_hidden()
        page.get_by_role("button", name="Slides").click()
        expect(page.locator("#list")).to_be_visible()
        page.locator("#list button", has_text=PLAIN).click()
        expect(page.locator("#slide-name")).to_have_text(PLAIN)
        expect(page.locator("#list")).to_be_hidden()
        page.keyboard.press("p")
        page.wait_for_selector("#stage[data-state=open]")
        page.locator("#stage").tap(position={"x": 190, "y": 250})
        page.wait_for_selector("#tile-body .patches img")
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        assert page.locator("#tile-body .patches").bounding_box()["width"] <= 380
        assert not window.complaints


@pytest.mark.slow
@deep
def test_a_deleted_slide_is_reported_and_marked(browser, files: Files, tmp_path):
    folder = shutil.copytree(files.slides, tmp_path / "slides")
    viewer = Viewer(SlideFolder(folder), Explanations(None))
    load_deep_zoom(viewer)
    for window in windows(browser, viewer):
        page = window.open(PLAIN)
        page.wait_for_load_state("networkidle")
        (folder / f"{PLAIN}.svs").unlink()
        for _ in range(3):
            page.keyboard.press("+")
        page.wait_for_selector("#banner:not([hidden])")
        assert "no longer exists" in page.locator("#banner").inner_text()
        page.wait_for_selector(f"#list .trouble:has-text('{PLAIN}')")
        page.locator("#list button", has_text=EXPLAINED).click()
        page.wait_for_selector("#stage[data-state=open]")
        expect(page.locator("#banner")).to_be_hidden()


@pytest.mark.slow
@deep
def test_a_name_is_never_parsed_as_markup(browser, files: Files, tmp_path):
    name = "<img src=x onerror=alert(1)>&\"'"
    shutil.copy(files.slides / f"{PLAIN}.svs", tmp_path / f"{name}.svs")
    viewer = Viewer(SlideFolder(tmp_path), Explanations(None))
    load_deep_zoom(viewer)
    for window in windows(browser, viewer):
        page = window.open(name)
        expect(page.locator("#list b")).to_have_text(name)
        expect(page.locator("#slide-name")).to_have_text(name)
        expect(page.locator("img[src=x]")).to_have_count(0)
        assert not window.complaints


@pytest.mark.slow
@deep
@pytest.mark.parametrize("width", [390, 1280])
def test_a_name_of_any_length_moves_nothing_out_of_sight(browser, files: Files, tmp_path, width: int):
    name = "a-slide-with-a-name-" * 10
    shutil.copy(files.slides / f"{PLAIN}.svs", tmp_path / f"{name}.svs")
    viewer = Viewer(SlideFolder(tmp_path), Explanations(None))
    load_deep_zoom(viewer)
    for window in windows(browser, viewer, viewport={"width": width, "height": 800}):
        page = window.open(name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#slide-name").get_attribute("title") == name, "to be read in full"
        assert page.locator("#help-open").bounding_box()["x"] < width - 30


@deep
def test_a_damaged_slide_is_reported(browser, files: Files):
    for window in windows(browser, shown(files)):
        page = window.open(PLAIN)
        page.locator("#list button", has_text=DAMAGED).click()
        page.wait_for_selector("#banner:not([hidden])")
        assert f"{DAMAGED}.svs" in page.locator("#banner").inner_text()
        assert page.locator("#stage").get_attribute("data-state") == "failed"


@deep
def test_an_explanation_of_another_slide_is_not_drawn(browser, files: Files, tmp_path):
    write_explanation(explanation(EXPLAINED, slide_size_px=[10, 10]), tmp_path / "explanation.zarr")
    viewer = Viewer(SlideFolder(files.slides), Explanations(tmp_path))
    load_deep_zoom(viewer)
    for window in windows(browser, viewer):
        page = window.open(PLAIN)
        page.locator("#list button", has_text=EXPLAINED).click()
        page.wait_for_selector("#heatmap-none:has-text('another slide')")
        expect(page.locator("#heatmap-form")).to_be_hidden()
        assert window.colour(-120)[3] == 0


@pytest.mark.slow
def test_without_openseadragon_the_heatmap_is_drawn_on_a_still_picture(browser, files: Files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for window in windows(browser, shown(files)):
        page = window.open()
        assert "cfusion view --fetch" in page.locator("footer").inner_text()
        expect(page.locator("#zoom")).to_be_hidden()
        assert page.locator("img.still").evaluate("e => e.naturalWidth") == SIZE[0]
        assert window.colour(-120)[3] == 153
        page.locator("#stage").click(position={"x": 300, "y": 360})
        page.wait_for_selector("#tile-body .patches img")
        assert not window.complaints

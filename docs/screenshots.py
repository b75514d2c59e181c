"""Pictures of a finished demo for the README and the site: report, quality sheet, heatmaps, viewer."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

COHORT, OTHER, MODEL = "phantom-a", "phantom-b", "crossfusion"
"""The cohort of the run, and one whose patients none of its models has seen, so that every fold explains them."""

WIDTH_PX = 1280
VIEWER_HEIGHT_PX = 1280
"""So that the tile that was clicked and the patient's curve are in sight together."""
LARGEST_BYTES = 300_000


def main() -> None:
    """Write four PNG files below docs/images: `python docs/screenshots.py runs/demo`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="Folder of a finished `cfusion demo`.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    arguments = parser.parse_args()
    demo, out = arguments.demo.resolve(), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    run = next((demo / "runs").glob(f"{COHORT}-{MODEL}-real-*"))
    with tempfile.TemporaryDirectory() as name, sync_playwright() as driver:
        explained = Path(name)
        slides = demo / OTHER / "slides"
        slide = min(slides.glob("*.svs"))
        cfusion("explain", slide, "--model", run, "--out", explained, "--occlusion", "tiles")
        browser = driver.chromium.launch(executable_path=browser_path(), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH_PX, "height": 860}, reduced_motion="reduce")
        page.goto(f"file://{demo}/report/index.html")
        save(page.screenshot(), out / "report.png")
        page.goto(f"file://{explained / slide.stem}/index.html")
        save(page.locator("#heatmaps .pictures").first.screenshot(), out / "heatmaps.png")
        with viewer(slides, explained, run) as address:
            page.set_viewport_size({"width": WIDTH_PX, "height": VIEWER_HEIGHT_PX})
            page.goto(address)
            page.fill("#search", slide.stem)
            page.press("#search", "Enter")
            page.wait_for_selector("#stage[data-shown^='x5/occlusion']")
            page.locator("#stage").focus()
            page.keyboard.press("Enter")
            page.wait_for_selector("#tile-body table")
            page.wait_for_load_state("networkidle")
            page.wait_for_timeout(1500)
            page.evaluate("document.activeElement.blur()")
            save(page.screenshot(), out / "viewer.png")
        browser.close()
    save((demo / OTHER / "features" / "sheets" / f"{slide.stem}.jpg").read_bytes(), out / "sheet.png")


@contextlib.contextmanager
def viewer(slides: Path, explained: Path, run: Path) -> Iterator[str]:
    """A running viewer; its address."""
    command = [
        sys.executable,
        "-m",
        "cfusion",
        "view",
        str(slides),
        "--explanations",
        str(explained),
        "--run",
        str(run),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().split(" at ")[1].split()[0]
        finally:
            server.terminate()


def cfusion(*arguments: str | Path) -> None:
    """Run a command of the program."""
    subprocess.run([sys.executable, "-m", "cfusion", "-q", *map(str, arguments)], check=True)


def browser_path() -> str:
    """The Chromium that is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))


def save(picture: bytes, target: Path) -> None:
    """As a PNG of at most `WIDTH_PX` width; in 256 colours where it would else be large."""
    with Image.open(io.BytesIO(picture)) as image:
        scale = min(1, WIDTH_PX / image.width)
        small = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
    small.save(target, optimize=True)
    if target.stat().st_size > LARGEST_BYTES:
        small.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    main()

"""The site builds strictly, opens from the disk, asks no network for anything, and says what the code says."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("mkdocs", reason="the docs extra is not installed")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


class Links(HTMLParser):
    """What a page fetches by itself, what it links to, and which anchors it has."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.linked: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.anchors.add(values["id"])
        if tag in ("script", "img", "iframe", "source", "video") and values.get("src"):
            self.fetched.append(values["src"])
        if tag == "link" and values.get("href") and values.get("rel") != "canonical":
            self.fetched.append(values["href"])
        if tag == "a" and values.get("href"):
            self.linked.append(values["href"])


def read(page: Path) -> Links:
    links = Links()
    links.feed(page.read_text())
    return links


@pytest.mark.timeout(400)
def test_pages_fetch_nothing_from_elsewhere_and_have_no_dead_links(site):
    pages = {page: read(page) for page in site.rglob("*.html")}
    assert len(pages) > 30
    for page, links in pages.items():
        outside = [u for u in links.fetched if re.match(r"(https?:)?//", u)]
        assert not outside, f"{page.relative_to(site)} fetches {outside}"
        assert "fonts.googleapis" not in page.read_text()
        for link in links.linked + links.fetched:
            if re.match(r"[a-z]+:|//", link) or page.name == "404.html":
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path.split("?")[0]).resolve() if path else page
            assert target.exists(), f"{page.relative_to(site)} links to {link}"
            if anchor and target in pages and not anchor.startswith("__"):
                assert anchor in pages[target].anchors, f"{page.relative_to(site)} links to {link}"


def test_search_ranks_tutorials_above_pages_for_looking_up(site):
    index = json.loads((site / "search" / "search_index.json").read_text())
    boosts = {entry["location"].partition("#")[0]: entry.get("boost", 1) for entry in index["docs"]}
    tutorials, howtos, modules = (
        {boost for page, boost in boosts.items() if page.startswith(folder)}
        for folder in ("tutorials/", "howto/", "reference/api/")
    )
    assert min(tutorials) > max(howtos) > 1 > max(modules)


def test_every_command_option_and_setting_is_documented(site):
    import typer

    from cfusion.cli.main import app
    from cfusion.config import Config

    commands = (site / "reference" / "cli.html").read_text()

    def walk(command, path):
        for name, child in getattr(command, "commands", {}).items():
            walk(child, f"{path} {name}")
        if not getattr(command, "commands", None):
            assert f">{path}<" in commands, path
            for parameter in command.params:
                if parameter.param_type_name == "option" and parameter.name != "help":
                    assert parameter.opts[0] in commands, f"{path} {parameter.opts[0]}"

    walk(typer.main.get_command(app), "cfusion")
    settings = (site / "reference" / "configuration.html").read_text()
    for name, section in Config.model_fields.items():
        fields = getattr(section.annotation, "model_fields", {name: section})
        for key, field in fields.items():
            assert f"<code>{key}</code>" in settings, f"{name}.{key}"
            assert field.description, f"{name}.{key} has no description"


def test_every_error_has_its_heading(site):
    from cfusion.cli.cmd_help import topics

    assert set(topics()) <= read(site / "errors.html").anchors

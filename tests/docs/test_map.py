"""The generated map of the modules names each one, names no other, and describes each."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the docs extra is not installed")

ROOT = Path(__file__).parents[2]


def module_map() -> str:
    spec = importlib.util.spec_from_file_location("documentation_pages", ROOT / "docs/pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    return pages.module_map()


def test_the_map_has_a_line_for_every_module():
    files = subprocess.run(["git", "ls-files", "*.py", "*.sh"], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = [f for f in files.stdout.split() if not f.startswith("tests/") and not f.endswith("__init__.py")]
    tracked = {f for f in modules if (ROOT / f).exists()}
    listed: dict[str, str] = {}
    folder = ""
    for line in module_map().splitlines():
        if heading := re.fullmatch(r"## (.+/)", line):
            folder = heading[1]
        elif row := re.fullmatch(r"\| `([^`]+)` \| (.*) \|", line):
            listed[folder + row[1]] = row[2]
    assert not tracked - set(listed), "modules that the map lacks"
    gone = {name for name in set(listed) - tracked if not (ROOT / name).exists()}
    assert not gone
    assert not [name for name, description in listed.items() if not description.strip()], "modules without a first line"


def test_every_package_says_what_it_is():
    bare = [
        heading
        for heading, after in re.findall(r"^## (.+/)\n\n(.*)$", module_map(), re.MULTILINE)
        if (ROOT / heading / "__init__.py").exists() and (not after or after.startswith("|"))
    ]
    assert not bare

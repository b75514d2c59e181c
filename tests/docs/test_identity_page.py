"""The page on what decides the numbers shows what the code reads, without a setting or module too many or too few."""

import importlib.util
import re
from pathlib import Path

import pytest

from cfusion.config import Config
from cfusion.program import MODULES, TEXTS
from cfusion.runs.run import RECORDED_ASIDE

pytest.importorskip("mkdocs", reason="the docs extra is not installed")

ROOT = Path(__file__).parents[2]


def test_the_page_lists_what_is_set_aside_and_every_module():
    spec = importlib.util.spec_from_file_location("documentation_pages", ROOT / "docs/pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    text = pages.identity_reference()
    listed = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert listed == [*Config.asides(), *RECORDED_ASIDE, *(f"cfusion.{name}" for name in MODULES)]
    assert all(f"- {line}" in text for line in TEXTS)


def test_the_settings_that_are_set_aside():
    assert set(Config.asides()) == {
        "cohort.table", "cohort.follow_up", "cohort.slides", "cohort.covariates", "cohort.covariates_table",
        "splits.directory", "splits.test_cases", "data.shards", "data.cache", "data.read_threads", "data.buffer_bytes",
        "data.stage", "data.cache_directory", "data.cache_bytes", "train.keep_checkpoints",
        "train.background_checkpoints", "train.folds", "train.start_from",
        "parallel.hold_casts", "parallel.timeout_minutes", "evaluation.strict", "tracking",
        "output",
    }  # fmt: skip

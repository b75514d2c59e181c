"""Figures as separate files: complete XML that includes the style."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd

from cfusion.report.standalone import run_figures, standalone, write_figures
from cfusion.survival.score import score


def test_a_runs_figures_are_valid_files_that_need_no_page(tmp_path):
    rng = np.random.default_rng(0)
    n = 60
    hazard = rng.normal(size=n)
    table = pd.DataFrame({
        "model": "amil", "cohort": "a & b", "protocol": "strict", "fold": np.arange(n) % 3,
        "case_id": [f"PT-{i}" for i in range(n)], "risk": hazard, "risk_cutoff": 0.0,
        "survival_months": rng.exponential(size=n) * 20 * np.exp(-hazard), "event": rng.random(n) < 0.8,
    })  # fmt: skip
    curves = pd.DataFrame({"fold": [0, 0, 1, 1], "epoch": [0, 1, 0, 1], "validation_cindex": [0.5, 0.6, 0.5, 0.7]})
    write_figures(tmp_path, {**run_figures(score(table, bootstrap=20), curves), "nothing": ""})
    written = sorted(path.stem for path in tmp_path.iterdir())
    assert {"kaplan_meier", "folds", "learning_curves"} <= set(written)
    assert "nothing" not in written
    for path in tmp_path.iterdir():
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        style, title = root[0], root.find("{http://www.w3.org/2000/svg}title")
        assert "var(" not in style.text, "Inkscape and others know no variables of CSS"
        assert "@media" not in style.text
        assert "svg path.series0 { stroke: #1f66ad }" in style.text
        assert "paint-order" not in style.text
        assert [root.get("width"), root.get("height")] == root.get("viewBox").split()[2:]
        assert "a & b" in title.text


def test_only_the_first_tag_is_changed():
    text = standalone('<svg class="plot"><title>x</title><svg></svg></svg>')
    assert text.count("xmlns") == 1
    assert text.endswith("<title>x</title><svg></svg></svg>\n")

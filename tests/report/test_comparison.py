"""A sweep compared: what is not done has no value, what is printed is what was scored."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cfusion.errors import DataError
from cfusion.files import digest_json
from cfusion.report.comparison import Comparison, Cost, Member, compare_members
from cfusion.report.comparison_tables import escape_latex
from cfusion.report.comparison_write import write_comparison
from cfusion.splits import write_splits
from cfusion.survival.metrics import concordance
from cfusion.types import Split

PATIENTS, FOLDS = 60, 3
STRENGTH = {("uni", "good_model"): 3.0, ("uni", "weak"): 0.0, ("conch", "good_model"): 2.0, ("conch", "weak"): 0.0}


def member(
    folder: Path, cohort: str, encoder: str, model: str, seed: int, state: str = "done", permuted: int | None = None
) -> Member:
    """A run with made-up predictions, if it is done."""
    name = f"{cohort}-{encoder}-{model}-{seed}{'' if permuted is None else f'-permuted-{permuted}'}"
    if state == "done":
        write_run(folder / name, cohort, model, seed, STRENGTH[encoder, model] if permuted is None else 0.0)
    word = "DataError: no <b>loss</b> & no gain" if state == "failed" else ""
    cost = Cost(0.5, 0.25, 0.1)
    return Member(name, folder / name, cohort, encoder, model, "strict", seed, permuted, state, word, cost)


def write_run(folder: Path, cohort: str, model: str, seed: int, strength: float) -> None:
    rng = np.random.default_rng(int(digest_json(cohort)[:8], 16))
    hazard = rng.normal(size=PATIENTS)
    death, censoring = rng.exponential(size=PATIENTS) * 20 * np.exp(-hazard), rng.exponential(size=PATIENTS) * 60
    fold = np.arange(PATIENTS) % FOLDS
    ids = np.array([f"{cohort}-{i:03d}" for i in range(PATIENTS)])
    noise = np.random.default_rng(int(digest_json([folder.name])[:8], 16)).normal(size=PATIENTS)
    folder.mkdir(parents=True)
    table = {
        "model": model, "cohort": cohort, "protocol": "strict", "seed": seed, "repeat": 0, "fold": fold, "case_id": ids,
        "risk": strength * hazard + noise, "survival_months": np.minimum(death, censoring) + 0.1,
        "event": death <= censoring,
    }  # fmt: skip
    pd.DataFrame(table).to_csv(folder / "predictions.csv", index=False)
    splits = [Split(k, tuple(ids[fold != k]), (), tuple(ids[fold == k])) for k in range(FOLDS)]
    write_splits(splits, folder / "splits")
    outcomes = pd.DataFrame(table)[["case_id", "survival_months", "event"]]
    outcomes.rename(columns={"survival_months": "time_months"}).to_csv(folder / "outcomes.csv", index=False)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    folder = tmp_path_factory.mktemp("sweep") / "runs"
    cells = [(c, e, m) for c in ("a", "b", "c_d") for e, m in STRENGTH]
    found = [member(folder, *cell, seed) for cell in cells for seed in (1, 2) if cell != ("b", "conch", "weak")]
    found.append(member(folder, "b", "conch", "weak", 1))
    found.append(member(folder, "b", "conch", "weak", 2, state="failed"))
    deals = [member(folder, "a", "uni", "good_model", 1, permuted=deal) for deal in (0, 1)]
    return [*found, *deals]


@pytest.fixture(scope="module")
def comparison(members) -> Comparison:
    return compare_members(members, bootstrap=100)


def cell(comparison: Comparison, cohort: str, encoder: str, model: str):
    return next(c for c in comparison.cells if (c.cohort, c.encoder, c.model) == (cohort, encoder, model))


def test_a_cell_is_the_mean_over_folds_and_seeds(comparison):
    found = cell(comparison, "a", "uni", "good_model")
    by_hand = []
    for run in found.members:
        for _, rows in pd.read_csv(run.folder / "predictions.csv").groupby("fold"):
            by_hand.append(concordance(rows["survival_months"], rows["event"], rows["risk"]).cindex)
    assert found.value == pytest.approx(np.mean(by_hand))
    assert found.summary["cindex_std"] == pytest.approx(np.std(by_hand))
    assert found.summary["cindex_low"] < found.summary["cindex_pooled"] < found.summary["cindex_high"]
    dealt = [pd.read_csv(run.folder / "predictions.csv") for run in found.permuted]
    folds = [
        concordance(f["survival_months"], f["event"], f["risk"]).cindex for d in dealt for _, f in d.groupby("fold")
    ]
    assert found.null == pytest.approx(np.mean(folds))
    assert found.null < found.value


def test_a_failed_run_leaves_its_cell_without_a_value(comparison):
    broken = cell(comparison, "b", "conch", "weak")
    assert np.isnan(broken.value)
    assert broken.states == "1 failed of 2"
    assert not broken.best
    assert np.isnan(broken.p_best)
    assert "conch / weak" not in set(comparison.tests.query("cohort == 'b'")["model"])
    assert comparison.rankings["strict", "models"].blocks == 2


def test_one_best_a_cohort_and_noise_is_told_from_it(comparison):
    for cohort in ("a", "b", "c_d"):
        best = [c for c in comparison.cells if c.cohort == cohort and c.best]
        assert len(best) == 1
        assert best[0].model == "good_model"
        others = [c for c in comparison.cells if c.cohort == cohort and c.complete]
        assert best[0].value == max(c.value for c in others)
    assert not cell(comparison, "a", "uni", "weak").tied
    assert (comparison.tests["p_holm"] >= comparison.tests["p"]).all()
    assert comparison.rankings["strict", "models"].names == ("good_model", "weak")


def test_the_files_say_the_same_and_every_link_leads_to_a_run(comparison, members, tmp_path):
    page = write_comparison(comparison, tmp_path / "report", title="A & B <sweep>")
    html = page.read_text()
    assert "A &amp; B &lt;sweep&gt;" in html
    assert "no &lt;b&gt;loss&lt;/b&gt; &amp; no gain" in html
    value = cell(comparison, "a", "uni", "good_model").value
    assert f"{value:.3f} ± " in html
    assert "1 failed of 2" in html
    links = re.findall(r'href="((?!#)[^"]+)"', html)
    assert len(links) >= 2 * sum(m.state == "done" for m in members)
    for link in links:
        assert (page.parent / link).exists(), link
    anchors = re.findall(r'href="#([^"]+)"', html)
    assert all(f'id="{anchor}"' in html for anchor in anchors)
    table = pd.read_csv(page.parent / "cells.csv").set_index(["cohort", "encoder", "model"])
    assert table.loc[("a", "uni", "good_model"), "cindex_mean"] == value
    assert not table.loc[("b", "conch", "weak"), "complete"]
    assert table.loc[("a", "uni", "good_model"), "cpu_hours"] == 1.0
    assert len(pd.read_csv(page.parent / "runs.csv")) == len(members)
    svg = (page.parent / "ranks_models_strict.svg").read_text()
    assert svg.startswith("<svg xmlns=")
    assert "good_model" in svg


def test_markdown_and_latex_mark_the_best_and_escape_names(comparison, tmp_path):
    out = write_comparison(comparison, tmp_path, title="t").parent
    lines = (out / "table.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| uni | good_model"))
    assert row.count("|") == 7
    best = cell(comparison, "a", "uni", "good_model") if cell(comparison, "a", "uni", "good_model").best else None
    assert best is None or f"**{best.value:.3f} ± " in row
    tex = (out / "table.tex").read_text()
    assert r"good\_model" in tex
    assert r"c\_d" in tex
    assert r"\textbf{" in tex
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == 1
    body = tex[tex.index(r"\midrule") : tex.index(r"\bottomrule")]
    assert {line.count("&") for line in body.splitlines() if "&" in line} == {5}
    assert escape_latex("50%_a\\b{c}") == r"50\%\_a\textbackslash{}b\{c\}"


def test_without_a_bootstrap_nothing_is_tested(members):
    without = compare_members([m for m in members if m.cohort == "a"], bootstrap=0)
    assert without.tests.empty
    assert sum(cell.best for cell in without.cells) == 1
    assert not any(cell.tied for cell in without.cells)
    assert np.isnan(without.cells[0].summary["cindex_low"])


def test_nothing_done_is_an_error(tmp_path):
    with pytest.raises(DataError, match="none of the sweep's runs is done"):
        compare_members([member(tmp_path, "a", "uni", "weak", 1, state="open")])

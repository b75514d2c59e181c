"""The report: one offline page with described figures, and tables that read back exactly."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from made_up_outcomes import cohort, predicted

from cfusion.cohort.audit import audit
from cfusion.cohort.read import read_outcomes, write_covariates, write_outcomes
from cfusion.cohort.splits import make_splits, write_splits
from cfusion.config import Config, Protocol, SplitsConfig, validate
from cfusion.errors import ConfigError, DataError
from cfusion.files import write_json, write_text
from cfusion.report import ReportContext, figures, write_report
from cfusion.report.pseudonyms import Pseudonyms
from cfusion.report.runs import report_runs
from cfusion.survival.null import EpochChoice
from cfusion.survival.predictions import read_predictions
from cfusion.survival.score import Scores, score


def scored(model: str = "amil", protocol: str = "strict", noise: float = 0.0) -> Scores:
    data = cohort(120)
    splits = make_splits(data, SplitsConfig(), protocol)
    return score(predicted(data, splits, model, protocol, noise), data, splits, bootstrap=50)


class Page(HTMLParser):
    """Collects what a page would fetch, its tags and its balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "path", "rect", "circle", "link"):
            self.open.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "data") and v and not v.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = cohort(120)
    key = ("made_up", "amil", "strict")
    epochs = [
        {"cohort": "made_up", "model": "amil", "protocol": "strict", "fold": f, "epoch": e, "validation_cindex": e / 9}
        for f in range(5) for e in range(5)
    ]  # fmt: skip
    dropped = dataclasses.replace(data, cases=pd.concat([data.cases, data.cases.iloc[:1].rename({"p0": "q0"})]))
    context = ReportContext(
        title="A <test> & more", oracle={key: 0.8}, permuted={key: 0.49}, notes=["Made up."],
        audits={"made_up": audit(dropped, make_splits(data, SplitsConfig())).to_json()},
        provenance={"run-1": {"program": "0.1.0", "config": {"train": {"lr": 0.1}}}}, curves=pd.DataFrame(epochs),
    )  # fmt: skip
    out = tmp_path_factory.mktemp("report")
    scores = [scored("amil"), scored("amil", "published"), scored("<b>evil</b>", noise=3.0)]
    assert write_report(scores, out, context=context) == out / "index.html"
    return out


def test_page_is_one_offline_file(folder: Path) -> None:
    text = (folder / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert not page.fetched
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_words_are_escaped(folder: Path) -> None:
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "<b>evil</b>" not in text
    assert "&lt;b&gt;evil&lt;/b&gt;" in text
    assert "A &lt;test&gt; &amp; more" in text


def test_figures_are_well_formed_and_described(folder: Path) -> None:
    text = (folder / "index.html").read_text(encoding="utf-8")
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    titles = set()
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("role") == "img"
        assert len(root.get("aria-label") or "") > 40
        title, description = root.find("title"), root.find("desc")
        assert title is not None
        assert description is not None
        titles.add(str(title.text).split(",")[0])
        assert "nan" not in figure.lower()
    assert titles == {
        "C-index of all models", "Cohort flow", "Kaplan–Meier", "C-index by fold", "Time-dependent AUC",
        "Brier score over time", "Calibration", "Learning curves",
    }  # fmt: skip


def test_sections_a_reviewer_looks_for(folder: Path) -> None:
    words = " ".join(Page((folder / "index.html").read_text(encoding="utf-8")).text)
    for part in (
        "Results", "What was done", "Comparisons", "How to read this", "Provenance", "optimism gap", "permuted",
        "oracle",
        "no slides", "config.train.lr", "OPTIMISTIC", "at risk", "log-rank", "Made up.", "Not a medical device",
    ):  # fmt: skip
        assert part in words, part


def test_the_figure_follows_the_opening_sentences(folder: Path) -> None:
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.index('class="opening"') < page.index("<svg") < page.index('class="warning"') < page.index("<table")
    assert "protocol: C ." in page


def test_what_is_probably_wrong_stands_before_the_first_table_and_remarks_are_folded_after_it(tmp_path: Path) -> None:
    data = cohort(60)
    splits = make_splits(data, SplitsConfig())
    frame = predicted(data, splits, "turned", "strict", 0.0).assign(risk=lambda rows: -rows["risk"])
    notes = [f"Remark {number}." for number in range(5)]
    page = write_report([score(frame, data, splits, bootstrap=50)], tmp_path, context=ReportContext(notes=notes))
    text = page.read_text(encoding="utf-8")
    first, folded = text.index("<table"), text.index('<details class="remarks"><summary>')
    assert text.index("is the sign of the risk turned?") < first < folded < text.index("Remark 0.")
    assert "Below about 50" in text[folded : text.index("</details>", folded)]
    assert text.count("is the sign of the risk turned?") == 1


def test_d_calibration_that_is_not_given_says_why(folder: Path) -> None:
    summary = pd.read_csv(folder / "summary.csv").iloc[0]
    assert np.isnan(summary["d_calibration_p"])
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert f"– <small>{100 * (1 - summary['events'] / summary['n']):.0f}% censored</small>" in text
    assert "p not defined" not in text


def test_each_trained_model_has_its_learning_curve() -> None:
    curves = pd.DataFrame([
        {"fold": fold, "trained": f"repeat_{repeat}_{fold}", "epoch": epoch, "train_loss": 1 / (1 + epoch + repeat)}
        for repeat in range(3) for fold in range(2) for epoch in range(4)
    ])  # fmt: skip
    drawn = figures.learning_curves(curves, "here")
    lines = re.findall(r'class="line thin[^"]*" d="([^"]*)"', drawn)
    assert len(lines) == 6
    assert all(line.count("L") == 3 for line in lines), "a point per epoch"
    assert "4 epochs of 6 models" in drawn


def test_a_forest_plot_leaves_a_gap_between_an_interval_and_its_number() -> None:
    rows = [{"label": "m", "c": 0.775, "low": 0.649, "high": 0.865, "null_low": 0.39, "null_high": 0.61}]
    drawn = figures.forest(rows, figures.forest_range(rows), "here")
    line = max(float(x) for x in re.findall(r'class="whisker[^"]*" d="M[\d.]+ [\d.]+L([\d.]+)', drawn))
    number = re.search(r'<text x="([\d.]+)"[^>]*text-anchor="end">(0\.775[^<]*)<', drawn)
    assert number is not None
    assert float(number[1]) - 7.2 * len(number[2]) > line + 8


@pytest.mark.parametrize(
    ("endpoint", "words"), [("DSS", "disease-specific survival (DSS)"), (None, "end point not stated")]
)
def test_the_end_point_is_named(endpoint: str | None, words: str, tmp_path: Path) -> None:
    context = ReportContext(endpoints={} if endpoint is None else {"made_up": endpoint})
    write_report([scored()], tmp_path, context=context)
    assert f"events; {words}" in (tmp_path / "index.html").read_text()
    assert f"Event in made_up: {words}" in (tmp_path / "model_card.md").read_text()
    assert pd.read_csv(tmp_path / "summary.csv", keep_default_na=False)["endpoint"].tolist() == [endpoint or ""]


def test_the_brier_score_over_time_integrates_to_the_mean() -> None:
    part = scored(noise=1.0)
    found = next(iter(part.patients.values()))
    months, brier, null = (np.array(v) for v in (found.auc_months, found.brier, found.brier_null))
    known = np.isfinite(brier)
    assert known.sum() > 5
    assert (np.isfinite(null) == known).all()
    mean = np.trapezoid(brier[known], months[known]) / np.ptp(months[known])
    row = part.summary.iloc[0]
    assert mean == pytest.approx(row["ibs"], abs=0.03)
    drawn = figures.brier_over_time(found, "here")
    assert f"{brier[known][-1]:.3f}, and {null[known][-1]:.3f} for the Kaplan–Meier curve" in drawn


def test_tables_read_back(folder: Path) -> None:
    summary = pd.read_csv(folder / "summary.csv", float_precision="round_trip")
    expected = scored("amil").summary
    row = summary[(summary["model"] == "amil") & (summary["protocol"] == "strict")].iloc[0]
    for column in ("cindex_mean", "cindex_std", "cindex_pooled", "cindex_low", "logrank_p", "ibs", "hazard_ratio"):
        assert row[column] == expected[column].iloc[0]
    assert len(pd.read_csv(folder / "scores.csv")) == 15
    assert len(pd.read_csv(folder / "comparisons.csv")) == 1
    assert pd.read_csv(folder / "findings.csv")["subject"].tolist() == ["q0"]
    listed = json.loads((folder / "summary.json").read_text())
    assert set(listed[0]) == {
        "cohort", "model", "protocol", "cindex_within", "within_low", "within_high", "cindex_pooled", "cindex_low",
        "cindex_high", "oracle", "permuted",
    }  # fmt: skip
    assert [entry["oracle"] for entry in listed] == [0.8, None, None]


def test_null_and_optimism_gap_are_shown_with_the_c(folder: Path) -> None:
    summary = pd.read_csv(folder / "summary.csv").set_index(["model", "protocol"])
    strict, published = summary.loc[("amil", "strict")], summary.loc[("amil", "published")]
    assert strict["null_mean"] == pytest.approx(0.5, abs=0.01)
    assert published["null_low"] < published["null_mean"] < published["null_high"]
    assert published["null_mean"] > 0.6
    assert published["null_low"] == strict["null_low"], "the choice gains nothing where no epoch differs"
    assert published["null_correlated_mean"] < published["null_mean"]
    assert strict["optimism_gap"] == pytest.approx(published["cindex_mean"] - strict["cindex_mean"])
    assert np.isnan(summary.loc[("<b>evil</b>", "strict"), "optimism_gap"])


@pytest.mark.parametrize(
    ("choice", "words"),
    [(EpochChoice(1, 0, 10), "1 epoch, patience 10, from epoch 0 on"), (None, "at most 100 epochs, patience 20, from")],
)
def test_the_null_is_that_of_the_run(tmp_path: Path, choice: EpochChoice | None, words: str) -> None:
    context = ReportContext(choices={} if choice is None else {("made_up", "amil", "published"): choice})
    write_report([scored("amil", "published")], tmp_path, context=context)
    row = pd.read_csv(tmp_path / "summary.csv").iloc[0]
    assert (abs(row["null_mean"] - 0.5) < 0.02) == (choice is not None)
    assert words in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_model_card(folder: Path) -> None:
    card = (folder / "model_card.md").read_text(encoding="utf-8")
    for part in (
        "# Model card",
        "## Intended use",
        "## Limits",
        "| made_up | amil | strict | 120 |",
        "config.train.lr",
    ):
        assert part in card


def test_the_flow_says_why_patients_were_lost() -> None:
    steps = [
        {"step": "in the tables", "patients": 60, "slides": 60},
        {"step": "with a usable outcome", "patients": 57, "slides": 57},
        {"step": "with features", "patients": 50, "slides": 49},
    ]
    drawn = figures.flow(steps, {"zero_time": 3, "missing_features": 8, "no_slides": 7, "not_in_cohort": 2}, "made_up")
    words = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert words[words.index("− 3 patients, 3 slides") + 1] == "zero time 3"
    assert words[words.index("− 7 patients, 8 slides") + 1] == "missing features 8, no slides 7"


def test_long_names_leave_room_for_the_forest() -> None:
    row = {"c": 0.6, "low": 0.5, "high": 0.7, "null_low": 0.45, "null_high": 0.55}
    drawn = figures.forest([{"label": f"{'x' * 200} (strict)", **row}], (0.4, 0.8), "made_up")
    at = sorted({float(x) for x in re.findall(r'class="grid" d="M([\d.-]+)', drawn)})
    assert 250 < at[0] < at[-1] < 600
    assert "xx…" in drawn
    assert f"<title>{'x' * 200} (strict): 0.600</title>" in drawn


def test_constant_risks_and_unknown_protocol_are_reported(tmp_path: Path) -> None:
    table = predicted(cohort(120), make_splits(cohort(120), SplitsConfig()), "flat", "strict")
    keep = ["model", "cohort", "fold", "case_id", "survival_months", "event"]
    scores = score(table[keep].assign(risk=1.0), bootstrap=20)
    text = write_report([scores], tmp_path).read_text(encoding="utf-8")
    assert "made_up, flat (unknown): no model; within each fold all patients have the same risk." in text
    assert '<p class="opening">flat is no model of made_up' in text
    assert "do not say how the epoch was chosen" in text
    assert "nan" not in re.sub(r"<[^>]*>", "", text).lower().replace("provenance", "")


def test_models_that_cannot_be_compared_stand_in_the_report_with_a_dash(tmp_path: Path) -> None:
    table = predicted(cohort(120), make_splits(cohort(120), SplitsConfig()), "a", "strict")
    both = pd.concat([table, table.assign(model="b", seed=9)], ignore_index=True)
    text = write_report([score(both, bootstrap=20)], tmp_path).read_text(encoding="utf-8")
    row = re.search(r"<td[^>]*>b</td>\s*<td[^>]*>0</td><td[^>]*>0</td>(.*?)</tr>", text, re.DOTALL)
    assert row is not None
    assert re.sub(r"<[^>]*>", "", row[1]).split() == ["–", "––"]
    assert pd.read_csv(tmp_path / "comparisons.csv")["p_holm"].isna().all()


def test_nothing_to_report_and_twice_the_same(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one set of scores"):
        write_report([], tmp_path)
    with pytest.raises(ConfigError, match="made_up, amil, strict is among the scores twice"):
        write_report([scored(), scored()], tmp_path)
    assert not list(tmp_path.iterdir())


def finished_run(
    folder: Path, *, seed: int = 7, permuted: int | None = None, protocol: Protocol = "strict", **more: object
) -> Path:
    data = cohort(120)
    splits = make_splits(data, SplitsConfig(), protocol)
    evaluation = {"bootstrap": 20, "permute_outcomes": permuted, "protocol": protocol}
    values = {"cohort": {"name": "made_up"}, "model": {"name": "amil"}, "seed": seed, "evaluation": evaluation}
    config = validate(Config, values | more, "test").model_dump(mode="json")
    write_text(folder / "config.yaml", yaml.safe_dump(config))
    noise = 1.0 if permuted is None else 20.0
    predicted(data, splits, "amil", protocol, noise).assign(seed=seed).to_csv(folder / "predictions.csv", index=False)
    write_splits(splits, folder / "splits")
    write_json(folder / "audit.json", audit(data, splits).to_json())
    write_outcomes(data, folder / "outcomes.csv")
    write_json(folder / "run.json", {"provenance": {"program": "0.1.0", "config": config}})
    for fold in range(5):
        write_text(folder / f"fold_{fold}" / "history.csv", f"epoch,train_loss,fold\n0,1.0,{fold}\n1,0.5,{fold}\n")
    write_json(folder / "done.json", {})
    return folder


def test_finished_runs_become_one_report(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / f"run-{seed}", seed=seed) for seed in (7, 8)]
    runs.append(finished_run(tmp_path / "null", permuted=0))
    page = report_runs(runs, tmp_path / "report", title="Runs", oracle={"made_up": 0.9})
    (row,) = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert row["oracle"] == 0.9
    assert abs(row["permuted"] - 0.5) < 0.1 < row["cindex_pooled"] - 0.5 + 0.1
    assert pd.read_csv(tmp_path / "report" / "summary.csv")["seeds"].tolist() == [2]
    assert "Learning curves" in page.read_text(encoding="utf-8")
    methods = (tmp_path / "report" / "methods.md").read_text()
    assert methods.count("## made_up, amil (strict)") == 1, "one section for both seeds"
    assert "; seeds 7, 8." in methods
    assert f"{row_of(tmp_path)['n']} patients with" in methods


def row_of(folder: Path) -> pd.Series:
    return pd.read_csv(folder / "report" / "summary.csv").iloc[0]


def test_the_table_for_a_paper_has_the_numbers_of_the_summary(folder: Path) -> None:
    summary = pd.read_csv(folder / "summary.csv")
    tex = (folder / "table.tex").read_text()
    assert tex.count(r"\begin{table*}") == summary["protocol"].nunique()
    for row in summary.itertuples():
        assert (
            f"{row.n} ({row.events}) & {row.cindex_within:.3f} ({row.within_low:.3f} to {row.within_high:.3f})" in tex
        )
    assert r"\textless{}b\textgreater{}evil" in tex
    assert "OPTIMISTIC" in tex


def test_a_run_with_covariates_says_what_its_risk_adds(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    data = cohort(120)
    known = pd.DataFrame({"age": data.cases["truth"].rank(), "sex=male": 1.0}, index=data.cases.index)
    known.loc[known.index[::3], "sex=male"] = np.nan
    known.loc[known.index[1::3], "sex=male"] = 0.0
    write_covariates(dataclasses.replace(data, covariates=known), run / "covariates.csv")
    assert read_outcomes(run / "outcomes.csv", "made_up", run / "covariates.csv").covariates.equals(known)
    page = report_runs([run], tmp_path / "report", title="Run").read_text(encoding="utf-8")
    assert "which reach ." in page
    assert "Cox: age and sex" in page
    assert "Beyond the clinic" in page
    (row,) = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert row["clinical_c"] > 0.6
    assert "adjusted hazard ratio per standard deviation" in (tmp_path / "report" / "model_card.md").read_text()


def test_the_null_of_a_run_has_its_epochs(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", protocol="published", train={"epochs": 3, "min_epoch": 2, "patience": None})
    page = report_runs([run], tmp_path / "report", title="Run")
    assert pd.read_csv(tmp_path / "report" / "summary.csv")["null_mean"].item() == pytest.approx(0.5, abs=0.02)
    assert "at most 3 epochs, no early stop, from epoch 2 on" in page.read_text(encoding="utf-8")


def test_reported_scores_are_those_of_the_run(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    report_runs([run], tmp_path / "report", title="Run")
    data, table = cohort(120), read_predictions(run / "predictions.csv")
    direct = score(table, data, make_splits(data, SplitsConfig()), bootstrap=20).folds
    written = pd.read_csv(tmp_path / "report" / "scores.csv", float_precision="round_trip")
    for column in ("harrell_c", "uno_c", "ibs", "ibs_null", "truncation_months"):
        np.testing.assert_allclose(written[column], direct[column], rtol=1e-12)


def test_only_seeds_and_folds_of_one_configuration_are_one_result(tmp_path: Path) -> None:
    first = finished_run(tmp_path / "run-7")
    other = finished_run(tmp_path / "run-8", seed=8, train={"lr": 0.5})
    with pytest.raises(DataError, match=r"are both made_up, amil, strict, but differ in config\.train\.lr"):
        report_runs([first, other], tmp_path / "report", title="Runs")
    again = finished_run(tmp_path / "run-again")
    with pytest.raises(DataError, match="have the same seed and fold"):
        report_runs([first, again], tmp_path / "report", title="Runs")
    assert not (tmp_path / "report").exists()


def test_folds_trained_separately_are_one_result(tmp_path: Path) -> None:
    data, table = cohort(120), predicted(cohort(120), make_splits(cohort(120), SplitsConfig()), "amil", "strict", 1.0)
    splits, runs = make_splits(data, SplitsConfig()), []
    for split in splits:
        runs.append(finished_run(tmp_path / f"fold-{split.fold}", splits={"fold": split.fold}))
        table[table["fold"] == split.fold].to_csv(runs[-1] / "predictions.csv", index=False)
        write_splits([split], runs[-1] / "splits")
    report_runs(runs[:1], tmp_path / "one", title="Runs")
    report_runs(runs, tmp_path / "all", title="Runs")
    direct = score(table, data, splits, bootstrap=20)
    written = pd.read_csv(tmp_path / "all" / "summary.csv", float_precision="round_trip")
    assert written["cindex_mean"].tolist() == direct.summary["cindex_mean"].tolist()
    single = pd.read_csv(tmp_path / "one" / "scores.csv", float_precision="round_trip")
    assert single["uno_c"].tolist() == direct.folds["uno_c"].tolist()[:1]


def test_runs_that_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no finished run"):
        report_runs([tmp_path], tmp_path / "report", title="Runs")
    null = finished_run(tmp_path / "null", permuted=0)
    with pytest.raises(DataError, match="none of the runs has real outcomes"):
        report_runs([null], tmp_path / "report", title="Runs")


def test_a_report_with_pseudonyms_names_nobody(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    names = [str(name) for name in cohort(120).cases.index]
    slide, stranger = "TCGA-2F-A9KO-01Z-00-DX1.195576CF", "TCGA-XX-0001"
    found = [
        {"kind": "no_slides", "subject": names[0], "action": "dropped", "message": "has no usable slide"},
        {"kind": "missing_features", "subject": slide, "action": "dropped", "message": "has no features"},
        {"kind": "no_outcome", "subject": "S-77-x", "action": "dropped",
         "message": f"belongs to no patient of the table (to ward-9; the nearest name is {names[1]})"},
        {"kind": "spelling", "subject": "made_up", "action": "doubted",
         "message": f"has 1 names in two spellings, such as {names[2]} and {stranger}; they are taken as the same"},
    ]  # fmt: skip
    audited = json.loads((run / "audit.json").read_text())
    write_json(run / "audit.json", {**audited, "findings": audited["findings"] + found})
    plain, hidden = tmp_path / "plain", tmp_path / "hidden"
    report_runs([run], plain, title="Run")
    assert slide in (plain / "findings.csv").read_text()
    report_runs([run], hidden, title="Run", pseudonyms=True)
    secret = re.compile("|".join(map(re.escape, [*names, slide, stranger, "S-77-x", "ward-9", "TCGA-"])))
    for path in sorted(hidden.iterdir()):
        assert not secret.search(path.read_text(encoding="utf-8")), path
    subjects = pd.read_csv(hidden / "findings.csv")["subject"].tolist()
    assert len(set(subjects[-4:])) == 4
    assert subjects[-1] == "made_up"
    assert (hidden / "summary.json").read_text() == (plain / "summary.json").read_text()


def test_a_patient_whose_name_is_a_number_does_not_change_numbers() -> None:
    hidden = Pseudonyms(["12", "13.0", "A-100", "A-1001"])
    assert hidden.hide("C .12 of 12 patients; A-1001, A-100") == "C .12 of 12 patients; " + ", ".join(
        hidden.hide(name) for name in ("A-1001", "A-100")
    )
    finding = hidden.of_finding({"subject": "12", "message": "has no usable slide"}, ("cohort",))
    assert finding["subject"].startswith("anonymous-")

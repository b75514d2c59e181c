"""A sweep's archive gives others the same tables, and holds nothing of the machine."""

import json
import re
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from made_up_sweep import finished, sweep_file
from typer.testing import CliRunner

from cfusion.cli.main import app
from cfusion.errors import CfusionError, ConfigError, DataError
from cfusion.files import digest_file
from cfusion.survival.metrics import concordance
from launch.sweep.archive import write_archive
from launch.sweep.plan import load_sweep, plan
from launch.sweep.results import report_sweep
from launch.sweep.sharing import export_sweep, report_archive

pytestmark = pytest.mark.slow

SEARCH = {"space": {"train.lr": {"low": 0.001, "high": 0.01, "log": True}, "model.embed_dim": [8, 16]}, "trials": 3}
SAME = ("cells.csv", "tests.csv", "table.md", "table.tex")


def cfusion(*arguments: object) -> str:
    """Output of a command that must succeed."""
    result = CliRunner().invoke(app, ["-q", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def path(files, tmp_path_factory) -> Path:
    """The file of a sweep with a search, of which all but the last run are done."""
    path = sweep_file(files, tmp_path_factory.mktemp("sweep"), search=SEARCH)
    finished(path, left=1)
    return path


def test_the_report_of_an_archive_has_the_same_tables_byte_for_byte(path, tmp_path):
    sweep = load_sweep(path)
    mine = report_sweep(sweep, plan(sweep), tmp_path / "mine").parent
    export_sweep(sweep, plan(sweep), tmp_path / "toy.zip")
    said = cfusion("sweep", "report", tmp_path / "toy.zip", "--out", tmp_path / "theirs")
    assert said == f"report: {tmp_path / 'theirs' / 'index.html'}\n"
    for name in (*SAME, *(figure.name for figure in mine.glob("*.svg"))):
        assert (tmp_path / "theirs" / name).read_bytes() == (mine / name).read_bytes(), name
    runs = [
        pd.read_csv(folder / "runs.csv").drop(columns=["folder", "search"]) for folder in (mine, tmp_path / "theirs")
    ]
    pd.testing.assert_frame_equal(*runs)
    assert list(runs[0]["state"]) == ["done", "done", "done", "open"]
    page = (tmp_path / "theirs" / "index.html").read_text()
    assert "1 open of 2" in page
    assert "archive/runs/" in page, "the page links to the unpacked runs"
    cfusion("sweep", "report", tmp_path / "toy.zip", "--out", tmp_path / "theirs")


def test_the_search_of_every_run_is_reported_from_the_sweep_and_from_its_archive(path, tmp_path):
    sweep = load_sweep(path)
    pages = [report_sweep(sweep, plan(sweep), tmp_path / "mine")]
    export_sweep(sweep, plan(sweep), tmp_path / "toy.zip")
    pages.append(report_archive(tmp_path / "toy.zip", tmp_path / "theirs"))
    sections = [page.read_text().partition('id="search"')[2].partition("</section>")[0] for page in pages]
    assert sections[0] == sections[1]
    names = [run.name for run in plan(sweep)]
    assert [name in sections[0] for name in names] == [True, True, True, False]
    assert sections[0].count("model.embed_dim 16, train.lr 0.0025") == 3 * 3 * 2, "chosen, and among all trials"
    assert sections[0].count("3 <small>0, 1</small>") == 9, "of three trials in nine folds, one failed"
    scored = pd.read_csv(plan(sweep)[0].config.output / "search" / "fold_0" / "trial_2.csv")
    outer = concordance(scored["survival_months"], scored["event"], scored["risk"]).cindex
    cells = re.findall(r'"inner score">([^<]*)</td><td data-column="C of the scored fold">([^<]*)<', sections[0])
    assert ("0.700", f"{outer:.3f}") in cells


def test_the_score_of_an_archive_is_that_of_its_predictions(path, tmp_path):
    sweep = load_sweep(path)
    mine = pd.read_csv(report_sweep(sweep, plan(sweep), tmp_path / "mine").parent / "cells.csv")
    cfusion("sweep", "export", path, "--out", tmp_path / "toy.zip")
    with zipfile.ZipFile(tmp_path / "toy.zip") as archive:
        (tmp_path / "predictions.csv").write_bytes(archive.read("predictions.csv"))
    for name in ("toy.zip", "predictions.csv"):
        cfusion("score", "--predictions", tmp_path / name, "--out", tmp_path / f"scored-{name}", "--bootstrap", 50)
    for table in ("summary.csv", "scores.csv", "comparisons.csv"):
        found = [(tmp_path / f"scored-{name}" / table).read_bytes() for name in ("toy.zip", "predictions.csv")]
        assert found[0] == found[1], table
    scored = pd.read_csv(tmp_path / "scored-toy.zip" / "summary.csv").set_index("model")
    cells = mine.assign(model=mine["encoder"] + " / " + mine["model"]).set_index("model")
    same = ["cindex_within", "within_low", "within_high", "cindex_mean", "cindex_std", "cindex_pooled", "n", "events"]
    assert list(scored.index) == list(cells.index) == ["made-up / amil", "made-up / mean"]
    pd.testing.assert_frame_equal(scored[same], cells[same], check_exact=True)


def test_the_same_runs_give_the_same_archive_and_nothing_of_the_machine(path, tmp_path):
    for name in ("one.zip", "other.zip"):
        said = cfusion("sweep", "export", path, "--out", tmp_path / name)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "other.zip").read_bytes()
    assert f"sha256: {digest_file(tmp_path / 'one.zip')}" in said
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    everything = b"\n".join(content.values())
    for local in (str(tmp_path), str(path.parent), "/somewhere", "this machine", "this-machine"):
        assert local.encode() not in everything, local
    runs = [run.name for run in plan(load_sweep(path))]
    assert not [name for name in content if runs[3] in name]
    assert json.loads(content[f"runs/{runs[0]}/run.json"])["provenance"]["table_sha256"] == "0" * 64
    assert b"embed_dim: 16" in content[f"runs/{runs[0]}/config.yaml"]
    settings = load_sweep(path).output.with_name("toy.zip")
    assert f"archive: {settings}" in cfusion("sweep", "export", path)


def changed(archive: Path, **changes: object) -> Path:
    """The archive with other values in its sweep.json, and the digests that fit them."""
    with zipfile.ZipFile(archive) as source:
        content = {name: source.read(name) for name in source.namelist() if name != "SHA256SUMS"}
    values = {**json.loads(content["sweep.json"]), **changes}
    write_archive(archive, {**content, "sweep.json": json.dumps(values).encode()})
    return archive


def test_an_archive_whose_list_is_odd_is_refused(path, tmp_path):
    archive = tmp_path / "toy.zip"
    cfusion("sweep", "export", path, "--out", archive)
    runs = json.loads(zipfile.ZipFile(archive).read("sweep.json"))["runs"]
    for changes, message in (
        ({"format": 2}, "has format 2; this program reads formats up to 1"),
        ({"runs": [{**runs[0], "name": "../../x"}]}, r"runs\.0\.name='\.\./\.\./x'"),
        ({"runs": [{**runs[0], "protocol": "best"}]}, r"runs\.0\.protocol='best'"),
        ({"more": 1}, "unknown key more"),
    ):
        with pytest.raises(CfusionError, match=message):
            report_archive(changed(archive, **changes), tmp_path / "out")
        cfusion("sweep", "export", path, "--out", archive)
    (tmp_path / "mine" / "archive").mkdir(parents=True)
    with pytest.raises(DataError, match="exists, and is no unpacked archive"):
        report_archive(archive, tmp_path / "mine")
    with pytest.raises(ConfigError, match="an archive is reported as it is"):
        cfusion("sweep", "report", archive, "--only", "seed=1")


def test_a_sweep_without_a_finished_run_has_nothing_to_share(files, tmp_path):
    path = sweep_file(files, tmp_path)
    with pytest.raises(DataError, match="none of the sweep's runs on real outcomes is done"):
        cfusion("sweep", "export", path)

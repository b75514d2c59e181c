"""The sweeps of the paper's tables and of the ablations: they load, every run can be built, and they run end to end."""

import functools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from factories import make_cohort
from typer.testing import CliRunner

from cfusion.cli.main import app
from cfusion.report.comparison.published_results import read_published
from cfusion.training.fitted import build
from launch.sweep.plan import PlannedRun, load_sweep, plan
from preprocess.encoders.cards import CARDS

SWEEPS = Path(__file__).parents[2] / "configs" / "sweeps"
PAPER = "crossfusion-midl2026"
TABLES = {"table1": 14, "table2": 5, "table3": 3}
"""Rows of the paper's tables, each with six cohorts."""


@functools.cache
def of_sweep(name: str) -> list[PlannedRun]:
    return plan(load_sweep(SWEEPS / f"{name}.yaml"))


def cell(run: PlannedRun) -> tuple[str, str, str]:
    return run.config.cohort.name, run.values["encoder"], run.values.get("model", run.config.model.name)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_planned_cell_by_cell_under_both_protocols(name: str):
    runs = of_sweep(name)
    printed = pd.read_csv(Path(__file__).parents[2] / "cfusion/study/published" / f"{PAPER}.csv", comment="#")
    expected = set(printed[printed["table"] == name][["cohort", "encoder", "model"]].itertuples(index=False, name=None))
    assert len(expected) == 6 * TABLES[name]
    for protocol in ("published", "strict"):
        of_protocol = [run for run in runs if run.config.evaluation.protocol == protocol]
        assert {cell(run) for run in of_protocol} == expected
        assert len(of_protocol) == len(expected)
    assert len(runs) == 2 * len(expected)
    assert {cell(run) for run in runs} <= set(
        read_published(PAPER).results[["cohort", "encoder", "model"]].itertuples(index=False, name=None)
    )


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_trained_as_the_authors_script_says(name: str):
    for run in of_sweep(name):
        train, model, data = run.config.train, run.config.model, run.config.data
        found = (train.lr, train.weight_decay, train.epochs, train.patience, train.min_epoch, train.alpha, train.loss)
        assert found == (1e-4, 4e-6, 100, 20, 5, 0.2, "nll")
        assert (train.optimizer, train.micro_batch, run.config.parallel.global_batch) == ("adam", 1, 32)
        assert (model.embed_dim, model.num_heads, model.num_layers, model.source) == (512, 4, 1, 10)
        assert (data.magnifications, data.unit, run.config.seed) == ((20, 10, 5), "slide", 7)
        assert train.published_errors == (run.config.evaluation.protocol == "published")
    assert CARDS["resnet50-2048"].dim == 2048


def test_each_ablation_changes_one_part_of_the_complete_model():
    runs = {run.values["model"]: run.config for run in of_sweep("ablations")}
    complete = runs.pop("complete").model_dump(mode="json")
    changed = {}
    for name, config in runs.items():
        values = config.model_dump(mode="json")
        changed[name] = [
            f"{section}.{key}"
            for section in ("data", "model", "train", "evaluation", "cohort", "splits")
            for key in values[section]
            if values[section][key] != complete[section][key]
        ]
    assert {name: keys for name, keys in changed.items() if len(keys) != 1} == {}
    assert {key for keys in changed.values() for key in keys} == {
        "model.name", "model.source", "model.options", "data.magnifications",
    }  # fmt: skip
    options = {key for config in runs.values() for key in config.model.options}
    assert options == {"published", "windows", "position", "grid", "attention_dropout"}
    assert {config.model.source for config in runs.values()} == {5, 10, 20}


@pytest.mark.parametrize("name", [*TABLES, "ablations"])
def test_the_model_of_every_run_can_be_built(name: str):
    sizes = {}
    for run in of_sweep(name):
        key = run.values.get("model", run.values["encoder"])
        if key in sizes:
            continue
        with torch.device("meta"):
            model = build(run.config.model, CARDS[run.values["encoder"]].dim, 4, run.config.data.magnifications)
        sizes[key] = sum(p.numel() for p in model.parameters())
    assert len(sizes) == (15 if name == "ablations" else TABLES[name])
    if name == "ablations":
        assert sizes["source-5x"] == sizes["source-20x"] == sizes["spatial-grid"] == sizes["complete"]
        assert sizes["windows-3"] < sizes["windows-5-3"] < sizes["complete"] < sizes["windows-11-7-3"]
        assert sizes["no-ppeg"] < sizes["complete"]
        assert sizes["only-10x"] == sizes["single"] < sizes["without-5x"] == sizes["without-20x"] < sizes["complete"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables and shards of made-up cohorts under the names of the study: COHORT.csv with an age, COHORT/ENCODER."""
    folder = tmp_path_factory.mktemp("study")
    for number, cohort in enumerate(sorted({run.config.cohort.name for run in of_sweep("table1")})):
        for encoder in ("resnet50-2048", "conch", "uni2-h", "quiltnet", "prov-gigapath"):
            files = make_cohort(folder / "made" / cohort / encoder, patients=24, seed=number, encoder=encoder)
            (folder / cohort).mkdir(exist_ok=True)
            files.shards.rename(folder / cohort / encoder)
            table = pd.read_csv(files.table)
            age = np.random.default_rng(number).normal(60, 10, table["patient"].nunique()).round()
            table["age"] = table["patient"].map(dict(zip(table["patient"].unique(), age, strict=True)))
            table.to_csv(folder / f"{cohort}.csv", index=False)
    return folder


def cfusion(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["-q", "sweep", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "only", "cells"),
    [
        pytest.param("table1", ["cohort=tcga_blca"], 28, marks=pytest.mark.long),
        ("table2", ["cohort=tcga_coad"], 10),
        pytest.param("table3", ["protocol=strict"], 18, marks=pytest.mark.long),
        pytest.param("ablations", ["cohort=tcga_ucec", "seed=1"], 15, marks=pytest.mark.long),
    ],
)
def test_a_sweep_runs_end_to_end_and_is_compared_with_the_paper(
    shards: Path, tmp_path: Path, name: str, only: list[str], cells: int
):
    settings = [
        f"output={tmp_path}", f"cohort.table={shards}/{{cohort}}.csv", "cohort.covariates_table=null",
        "splits.directory=null", "splits.folds=2", f"data.shards={shards}/{{cohort}}/{{encoder}}",
        "model.embed_dim=16", "train.epochs=1", "train.folds=separate", "parallel.global_batch=4",
        "evaluation.bootstrap=0", "tracking.enabled=false",
    ]  # fmt: skip
    chosen = [word for choice in only for word in ("--only", choice)]
    arguments = [str(SWEEPS / f"{name}.yaml"), *settings, *chosen]
    assert f"{cells} runs are done" in cfusion("run", *arguments, "--slots", "2")
    if name == "ablations":
        page = Path(cfusion("report", *arguments).strip().removeprefix("report: "))
        table = pd.read_csv(page.parent / "cells.csv")
        assert table["complete"].all()
        assert len(table) == cells
        return
    lines = cfusion("report", *arguments, "--beside", PAPER).splitlines()
    assert lines[0].startswith("cohort\tencoder\tmodel\tprotocol\tyours\ttheirs\t")
    rows = [line.split("\t") for line in lines[1 : cells + 1]]
    assert all(len(row) == 12 for row in rows)
    assert all("–" not in row for row in rows)
    page = Path(lines[-1].removeprefix("report: "))
    table = pd.read_csv(page.parent / "published.csv")
    matched = table[table["protocol"].notna() & table["their_protocol"].notna()]
    assert len(matched) == cells
    assert matched["clinical_c_mean"].between(0, 1).all()
    assert matched["within_fold_sd"].isin([True, False]).all()
    if name != "table3":
        assert any(line.startswith("note: Only in crossfusion-midl2026, not in this sweep: cohort") for line in lines)

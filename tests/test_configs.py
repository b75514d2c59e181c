"""Test that every shipped configuration loads, and that errors name the wrong key."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cfusion
from cfusion.cohort.audit import audit
from cfusion.cohort.parsing import read_table
from cfusion.config import Config
from cfusion.errors import ConfigError
from cfusion.recipe import PUBLISHED_RECIPE
from cfusion.run_folder import read_config, write_config
from launch.sweep.plan import load_sweep, plan
from preprocess.encoders.cards import CARDS

CONFIGS = Path(__file__).parents[1] / "configs"
COUNTS = {
    "tcga_blca": (373, 169), "tcga_brca": (871, 102), "tcga_coad": (416, 95), "tcga_gbmlgg": (569, 187),
    "tcga_luad": (444, 157), "tcga_ucec": (480, 75),
}  # fmt: skip
"""Patients and events that are left; the BRCA table has no slide names for 85 of the study's 956."""

STRANGERS = {"tcga_brca": 85, "tcga_luad": 9}
"""Patients that the published splits name and the published tables lack."""


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path):
    config = cfusion.load_config(path)
    assert all(one.name.startswith("tcga_") for one in config.cohort_configs)
    assert config.output.parts[0] == "runs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("tcga_*.yaml")), ids=lambda path: path.stem)
def test_a_cohort_with_published_splits_is_what_its_tables_hold(path):
    config = cfusion.load_config(path)
    cohort = cfusion.read_cohort(config.cohort)
    found = audit(cohort, cfusion.make_splits(cohort, config.splits), keep_zero_times=config.cohort.keep_zero_times)
    assert (len(found.cohort.cases), int(found.cohort.cases["event"].sum())) == COUNTS[path.stem]
    assert len(found.splits) == 5
    assert found.counts().get("not_in_cohort", 0) == STRANGERS.get(path.stem, 0)


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_has_distinct_runs_of_encoders_that_exist(path):
    runs = plan(load_sweep(path))
    assert len({run.name for run in runs}) == len(runs) > 1
    assert {run.config.data.encoder for run in runs} <= {*CARDS, "stain-texture"}
    for run in runs:
        assert str(run.config.data.shards) == f"data/shards/{run.config.cohort.name}/{run.config.data.encoder}"


def test_the_grid_of_the_study():
    runs = plan(load_sweep(CONFIGS / "sweeps" / "published.yaml"))
    counts = {axis: len({run.values[axis] for run in runs}) for axis in runs[0].values}
    assert counts == {"cohort": 6, "encoder": 8, "model": 6, "seed": 5}
    assert len(runs) * 5 == 7200
    for run in runs[:: len(runs) // 12]:
        direct = cfusion.load_config(CONFIGS / f"{run.config.cohort.name}.yaml")
        assert run.config.cohort == direct.cohort
        assert run.config.splits == direct.splits


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"unknown key train\.epoch\. Did you mean train\.epochs\?"),
        ("trian.epochs=3", r"unknown key trian\. Did you mean train\?"),
        ("model.num_heads=7", r"num_heads=7 does not divide model\.embed_dim=512"),
        ("train.lr=fast", r"train\.lr='fast'"),
        ("train.epochs", r"'train\.epochs': expected an override of the form section\.key=value"),
        ("model.source=40", r"model\.source=40 is not among data\.magnifications"),
        ("seed.deep=1", "seed"),
    ],
)
def test_the_error_for_a_wrong_setting_names_its_key(override, message):
    with pytest.raises(ConfigError, match=message):
        cfusion.load_config(None, [override])


def test_the_published_recipe_sets_its_section():
    config = cfusion.load_config(None, ["train.recipe=published", "evaluation.protocol=published"])
    assert {key: getattr(config.train, key) for key in PUBLISHED_RECIPE} == PUBLISHED_RECIPE
    assert (config.data.unit, config.model.options) == ("slide", {"published": True})
    assert not any("No longer" in note for note in config.notes)
    assert cfusion.load_config(None, ["train.epochs=2"]).notes == ()


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["train.lr=0.1"], ["train.lr=0.1 (published: 0.0001)"]),
        (["train.epochs=20"], ["train.epochs=20 (published: 100)"]),
        (["train.epochs=2"], ["train.epochs=2 (published: 100)", "train.min_epoch=1 (published: 5)"]),
        (["train.epochs=6", "train.min_epoch=2"], [
            "train.epochs=6 (published: 100)", "train.min_epoch=2 (published: 5)",
        ]),
        (["data.unit=case", "parallel.precision=bf16"], [
            "data.unit=case (published: slide)", "parallel.precision=bf16 (published: fp16 without loss scaling)",
        ]),
        (["model.options.dropout=0.1"], ["model.options.dropout=0.1 (published: 0.3)"]),
        (["model.options.attention_dropout=0.2"], []),
    ],
)  # fmt: skip
def test_given_values_override_the_recipe_and_are_listed(tmp_path, overrides, changed):
    recipe = ["train.recipe=published", "evaluation.protocol=published"]
    config = cfusion.load_config(None, [*overrides, *recipe])
    for override in overrides:
        section, key = override.partition("=")[0].split(".")[:2]
        assert getattr(getattr(config, section), key) != getattr(
            getattr(cfusion.load_config(None, recipe), section), key
        )
    notes = [note for note in config.notes if note.startswith("No longer the published recipe: ")]
    assert notes == ([f"No longer the published recipe: {', '.join(changed)}."] if changed else [])
    write_config(tmp_path, config)
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("overrides", "precision"),
    [
        ([], "auto"),
        (["train.recipe=published"], "f32"),
        (["train.published_errors=true", "evaluation.protocol=published"], "f32"),
        (["train.published_errors=true", "evaluation.protocol=published", "parallel.precision=auto"], "f32"),
        (["train.recipe=published", "parallel.precision=bf16"], "bf16"),
    ],
)
def test_the_published_precision_is_not_left_to_the_device(overrides, precision):
    assert cfusion.load_config(None, overrides).parallel.precision == precision


def test_the_errors_of_the_published_program_are_named_by_kind_and_are_off_elsewhere():
    config = cfusion.load_config(None, ["train.recipe=published", "evaluation.protocol=published"])
    assert config.train.published_errors
    kinds = [note.removeprefix("Error of the published program, ").partition(":")[0] for note in config.notes]
    assert kinds == ["leak", "noise", "noise", "noise"]
    for override in ("evaluation.protocol=published", "train.recipe=published"):
        assert not cfusion.load_config(None, [override]).train.published_errors
    strict = cfusion.load_config(None, ["train.recipe=published"])
    assert strict.notes == ("No longer the published recipe: train.published_errors=False (published: True).",)
    exact = cfusion.load_config(
        None, ["train.recipe=published", "evaluation.protocol=published", "parallel.precision=f64"]
    )
    assert not any("fp16 without loss scaling, in" in note for note in exact.notes)


@pytest.mark.parametrize(
    "override",
    ["evaluation.protocol=strict", "evaluation.protocol=fixed-epoch", "parallel.engine=zero2", "train.folds=together"],
)
def test_the_errors_of_the_published_program_are_refused_where_they_cannot_be(override):
    key, _, value = override.partition("=")
    overrides = ["train.published_errors=true", "evaluation.protocol=published", override]
    with pytest.raises(ConfigError, match=f"train.published_errors=true needs {key}=.*; got {value}"):
        cfusion.load_config(None, overrides)


def test_a_run_from_before_the_errors_does_not_have_them(tmp_path):
    config = cfusion.load_config(None, ["train.recipe=published", "evaluation.protocol=published"])
    write_config(tmp_path, config)
    path = tmp_path / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "published_errors" not in line))
    assert not read_config(tmp_path).train.published_errors


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "cohort: 5"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        cfusion.load_config(path)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("blca", "tcga_blca"), ("BLCA.yaml", "tcga_blca"), ("configs/tcga_luad.yaml", "tcga_luad"), ("qqq.yaml", "")],
)
def test_a_configuration_that_is_not_there_is_compared_with_the_shipped_ones(tmp_path, monkeypatch, name, meant):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"{name}: no such file. Give the path") as caught:
        cfusion.load_config(name)
    assert str(caught.value).endswith(f"cfusion configs copy {meant}." if meant else "a configuration.")


@given(st.integers(1, 500), st.floats(1e-6, 1.0), st.sampled_from(["strict", "fixed-epoch", "published"]))
def test_a_configuration_survives_being_written(epochs, lr, protocol):
    config = cfusion.load_config(None, [f"train.epochs={epochs}", f"evaluation.protocol={protocol}"])
    config = config.model_copy(update={"train": config.train.model_copy(update={"lr": lr})})
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_a_packaged_path_is_resolved_once_and_written_by_its_name(tcga):
    config = cfusion.load_config(CONFIGS / "tcga_blca.yaml")
    assert config.cohort.table == tcga / "clinical" / "tcga_blca.csv"
    assert config.splits.directory == tcga / "splits" / "tcga_blca"
    for mode in ("json", "python"):
        written = config.model_dump(mode=mode)
        assert written["cohort"]["table"] == "package:tcga/clinical/tcga_blca.csv"
        assert written["splits"]["directory"] == "package:tcga/splits/tcga_blca"
        assert Config.model_validate(written) == config
    own = cfusion.load_config(None, ["cohort.table=mine/table.csv"])
    assert (own.cohort.table, own.model_dump(mode="json")["cohort"]["table"]) == (
        Path("mine/table.csv"), "mine/table.csv",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["tcga/clinical/tcga_blka.csv", "../../pyproject.toml", "../packaged.py"])
def test_a_packaged_path_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match=r"the package holds no .*(Did you mean|Known:) tcga/"):
        cfusion.load_config(None, [f"cohort.table=package:{name}"])


def test_every_cohort_of_the_package_is_complete(tcga):
    names = {path.stem for path in CONFIGS.glob("tcga_*.yaml")}
    for folder in ("clinical", "covariates", "manifests", "splits"):
        assert {path.stem for path in (tcga / folder).iterdir()} == names
    for name in names:
        assert len(list((tcga / "splits" / name).iterdir())) == 5
        covariates = read_table(tcga / "covariates" / f"{name}.csv").set_index("case_id")
        wanted = {"age", "sex", "stage", "grade", "os", "dss", "pfi", "os_months", "dss_months", "pfi_months"}
        assert wanted | {"pfi_competing", "redaction"} <= set(covariates.columns)
        cohort = cfusion.read_cohort(cfusion.load_config(CONFIGS / f"{name}.yaml").cohort)
        known = covariates.loc[cohort.cases.index]
        status = known["os"].dropna().astype(int)
        assert (status == cohort.cases.loc[status.index, "event"].astype(int)).all()
    assert sum(path.stat().st_size for path in tcga.rglob("*") if path.is_file()) < 2.5e6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.fused_optimizer=true", "parallel.engine=zero2"],
            r"train\.fused_optimizer=true needs parallel\.engine=ddp",
        ),
        (
            ["parallel.hold_casts=true", "parallel.engine=zero1"],
            r"parallel\.hold_casts=true needs parallel\.engine=ddp",
        ),
        (["parallel.hold_casts=true", "train.folds=together"], r"hold_casts=true needs train\.folds=separate"),
        (["train.wide_folds=true"], r"train\.wide_folds=true needs train\.folds=together; got auto"),
        (["train.wide_folds=true", "train.folds=together"], r"needs model\.name=amil; got crossfusion"),
        (
            ["train.wide_folds=true", "train.folds=together", "model.name=amil", "train.loss=cox"],
            r"needs train\.loss=nll or ce; got cox",
        ),
        (["train.packed=true"], r"train\.packed=true has no effect: a forward pass has one bag"),
    ],
)
def test_settings_that_an_engine_does_not_have_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        cfusion.load_config(None, overrides)

"""Every shipped configuration loads, and what is wrong with one is told by key."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cfusion
from cfusion.cohort.audit import audit
from cfusion.config import PUBLISHED_RECIPE, Config
from cfusion.errors import ConfigError
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
    assert config.cohort.name.startswith("tcga_")
    assert config.output.parts[0] == "runs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("tcga_*.yaml")), ids=lambda path: path.stem)
def test_a_cohort_with_published_splits_is_what_its_tables_hold(path, shared):
    config = at(shared, cfusion.load_config(path))
    cohort = cfusion.read_cohort(config.cohort)
    found = audit(cohort, cfusion.make_splits(cohort, config.splits), keep_zero_times=config.cohort.keep_zero_times)
    assert (len(found.cohort.cases), int(found.cohort.cases["event"].sum())) == COUNTS[path.stem]
    assert len(found.splits) == 5
    assert found.counts().get("not_in_cohort", 0) == STRANGERS.get(path.stem, 0)


def at(shared: Path, config: Config) -> Config:
    """The configuration with data/tcga where the tests have it."""
    tcga = shared / "tcga"
    table = tcga / config.cohort.table.relative_to("data/tcga")
    directory = tcga / config.splits.directory.relative_to("data/tcga")
    return config.model_copy(update={
        "cohort": config.cohort.model_copy(update={"table": table}),
        "splits": config.splits.model_copy(update={"directory": directory}),
    })  # fmt: skip


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_has_distinct_runs_of_encoders_that_exist(path):
    runs = plan(load_sweep(path))
    assert len({run.name for run in runs}) == len(runs) > 1
    assert {run.config.data.encoder for run in runs} <= set(CARDS)
    for run in runs:
        assert run.config.data.shards == f"data/shards/{run.config.cohort.name}/{run.config.data.encoder}"


def test_the_grid_of_the_study():
    runs = plan(load_sweep(CONFIGS / "sweeps" / "published.yaml"))
    counts = {axis: len({run.values[axis] for run in runs}) for axis in runs[0].values}
    assert counts == {"cohort": 6, "encoder": 8, "model": 6, "seed": 5}
    assert len(runs) * 5 == 7200
    for run in runs[:: len(runs) // 12]:
        alone = cfusion.load_config(CONFIGS / f"{run.config.cohort.name}.yaml")
        assert run.config.cohort == alone.cohort
        assert run.config.splits == alone.splits


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"unknown key train\.epoch\. Did you mean train\.epochs\?"),
        ("trian.epochs=3", r"unknown key trian\. Did you mean train\?"),
        ("model.num_heads=7", r"num_heads=7 does not divide model\.embed_dim=512"),
        ("train.lr=fast", r"train\.lr='fast'"),
        ("train.epochs", "reads section.key=value"),
        ("model.source=40", r"model\.source=40 is not among data\.magnifications"),
        ("seed.deep=1", "seed"),
    ],
)
def test_a_wrong_setting_is_told_by_its_key(override, message):
    with pytest.raises(ConfigError, match=message):
        cfusion.load_config(None, [override])


def test_the_published_recipe_sets_its_section_and_refuses_what_contradicts_it():
    train = cfusion.load_config(None, ["train.recipe=published"]).train
    assert {key: getattr(train, key) for key in PUBLISHED_RECIPE} == PUBLISHED_RECIPE
    with pytest.raises(ConfigError, match=r"sets train\.lr=0\.0001; 0\.1 contradicts it"):
        cfusion.load_config(None, ["train.recipe=published", "train.lr=0.1"])


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "cohort: 5"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        cfusion.load_config(path)


@given(st.integers(1, 500), st.floats(1e-6, 1.0), st.sampled_from(["strict", "fixed-epoch", "published"]))
def test_a_configuration_survives_being_written(epochs, lr, protocol):
    config = cfusion.load_config(None, [f"train.epochs={epochs}", f"evaluation.protocol={protocol}"])
    config = config.model_copy(update={"train": config.train.model_copy(update={"lr": lr})})
    assert Config.model_validate(config.model_dump(mode="json")) == config

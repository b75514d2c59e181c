"""What `cfusion init` proposes passes a dry run as it is written, whatever the features are."""

import json
import re
import shlex
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from cfusion.cli.main import app
from cfusion.config import SCHEMA, Config, config_schema, load_config
from cfusion.errors import ConfigError, LayoutError
from cfusion.proposal.clinical_table import time_unit
from cfusion.proposal.recommended_settings import model_for, settings_for_patients
from cfusion.runs.run import Run

PATIENTS = 12
RNG = np.random.default_rng(0)


def h5_file(path: Path, side: int, tiles: int = 4, encoder: str | None = "uni_v1", **attrs: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    places = np.stack(np.divmod(np.arange(tiles), 2), axis=1) * side
    with h5py.File(path, "w") as file:
        features = file.create_dataset("features", data=RNG.standard_normal((tiles, 8), dtype=np.float32))
        if encoder:
            features.attrs["encoder"] = encoder
        coords = file.create_dataset("coords", data=places)
        coords.attrs.update({"patch_size": 256, "patch_size_level0": side, "overlap": 0, **attrs})


def slides(count: int = PATIENTS) -> list[str]:
    return [f"P{i:03d}_a" for i in range(count)]


def trident(folder: Path) -> Path:
    for slide in slides():
        for magnification, side, tiles in ((20, 256, 16), (10, 512, 4), (5, 1024, 1)):
            h5_file(folder / f"{magnification}x_256px_0px_overlap/features_uni_v1/{slide}.h5", side, tiles)
    return folder


def table(path: Path, scale: float = 1.0, **columns: str) -> Path:
    times = np.arange(1, PATIENTS + 1) * 1.5 * scale
    rows = pd.DataFrame({
        "patient": [s[:4] for s in slides()], "slide": slides(), "time": times, "event": np.arange(PATIENTS) % 2
    })  # fmt: skip
    rows.rename(columns=columns).to_csv(path, index=False)
    return path


def init(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["init", *map(str, arguments)])
    assert result.exit_code == code, result.exception or result.output
    return result


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dry_run(path: str) -> Run:
    """What `cfusion train --dry-run` reads."""
    return Run.prepare(load_config(path))


def test_three_folders_a_store_and_shards_are_read_by_crossfusion_unedited(here: Path):
    trident(Path("job"))
    result = init("--table", table(Path("clinical.csv")), "--features", "job")
    assert "12 patients, 6 events" in result.output
    config = dry_run("study.yaml").config
    assert (config.model.name, config.data.encoder, config.data.magnifications) == ("crossfusion", "uni", (20, 10, 5))
    assert "models: 6 (3 repeats × 2 folds), 20 epochs each: 120 steps of 8 bags" in result.output
    assert "repeat 0, 2 folds: 6 train, 0 choose, 6 are scored" in result.output
    command = re.search(r"cfusion (train study.yaml .*?) +#", result.output)
    _, path, *overrides = command[1].split()
    assert overrides == ["splits.repeats=1", "train.epochs=5", "output=runs/study-first-try"]
    assert len(Run.prepare(load_config(path, overrides)).splits) == 2
    text = Path("study.yaml").read_text()
    assert text.startswith(f"# yaml-language-server: $schema={SCHEMA}\n")
    assert all("  # " in line for line in text.splitlines() if re.match(r"  \w+: ", line))
    again = init("--table", "clinical.csv", "--features", "job", code=1)
    assert isinstance(again.exception, ConfigError)
    assert "already exists" in str(again.exception)
    for source in ("study-features", "study-shards"):
        init("--table", "clinical.csv", "--features", source, "--out", f"{source}.yaml")
        assert dry_run(f"{source}.yaml").config.model.name == "crossfusion"
    assert not Path("study-shards-shards").exists()


def test_commands_for_a_path_with_spaces_can_be_pasted(here: Path):
    trident(Path("job 1"))
    out = "my study.yaml"
    result = init("--table", table(Path("clinical.csv")), "--features", "job 1", "--out", out)
    commands = re.findall(r"^  (cfusion (?:null|train) .*?) +#", result.output, re.MULTILINE)
    assert [shlex.split(command)[2] for command in commands] == [out] * 3
    assert "output=runs/my study-first-try" in shlex.split(commands[1])
    assert f"`cfusion audit '{out}'`" in Path(out).read_text().replace("\n# ", " ")


def test_a_flat_folder_of_one_magnification_gets_a_model_that_reads_it(here: Path):
    for slide in slides():
        h5_file(Path(f"features_20x/{slide}.h5"), 512, encoder=None)
    result = init("--table", table(Path("clinical.csv")), "--features", "features_20x")
    assert "magnification 20x, from the name of the folder" in result.output
    assert "encoder unnamed, since the files state none" in result.output
    config = dry_run("study.yaml").config
    assert (config.model.name, config.data.magnifications) == ("amil", (20,))
    assert "cfusion preprocess derive" in re.sub(r"\n# ", " ", Path("study.yaml").read_text())
    init("--table", "clinical.csv", "--features", "features_20x", "--out", "b.yaml", "--encoder", "conch")
    assert dry_run("b.yaml").config.data.encoder == "conch"
    unused = init("--table", "clinical.csv", "--features", "b-shards", "--magnification", 20, "--out", "c.yaml", code=1)
    assert isinstance(unused.exception, LayoutError)
    assert "--magnification has no use" in str(unused.exception)


def test_a_table_without_slides_in_days_of_censored_patients(here: Path):
    for slide in slides():
        h5_file(Path(f"in/{slide}.h5"), 512, target_magnification=20)
    rows = pd.read_csv(table(Path("clinical.csv"), 365 / 12))
    rows["censorship"] = 1 - rows["event"]
    rows.drop(columns=["slide", "event"]).round().to_csv("clinical.csv", index=False)
    init("--table", "clinical.csv", "--features", "in")
    run = dry_run("study.yaml")
    assert run.config.cohort.time_unit == "days"
    assert run.config.cohort.event_is == "censored"
    assert run.cohort.cases["time_months"].max() == pytest.approx(18, rel=0.01)
    assert list(run.cohort.cases["event"].astype(int)) == list(rows["event"])
    assert len(run.cohort.slides) == PATIENTS


def test_unknown_columns_are_answered_with_those_to_rename(here: Path):
    h5_file(Path("in/P000_a.h5"), 512, target_magnification=20)
    table(Path("c.csv"), patient="Patient ID", slide="file_name", time="OS_months", event="status")
    refused = init("--table", "c.csv", "--features", "in", code=1)
    assert not Path("study-features").exists(), "the table is checked before features are imported"
    wanted = "Rename Patient ID to patient, file_name to slide, OS_months to time, status to event"
    assert wanted in str(refused.exception)
    assert not Path("study.yaml").exists()


@pytest.mark.parametrize(
    ("times", "unit"), [([3, 40, 120], "months"), ([30, 400, 2000], "days"), ([0.4, 3.2, 11.5], "years")]
)
def test_the_unit_of_times_is_guessed_and_says_what_to_check(times: list[float], unit: str):
    found, reason = time_unit(pd.Series(times))
    assert found == unit
    assert "months of follow-up" in reason


def test_what_is_recommended_exists_and_fits_the_number_of_patients():
    sections = Config().model_dump()
    for patients, events in ((20, 8), (69, 31), (450, 200), (1000, 60)):
        found = {s.key: s.value for s in [*settings_for_patients(patients, events), *model_for((40, 20))]}
        for key in found:
            section, name = key.split(".")
            assert name in sections[section]
        assert events / found["splits.folds"] >= 4
    assert {s.key: s.value for s in settings_for_patients(450, 200)}["evaluation.protocol"] == "strict"
    assert {s.key: s.value for s in model_for((40, 20))}["model.source"] == 20
    assert {s.key: s.value for s in model_for((0,))}["model.name"] == "mean_mil"


def test_the_schema_that_ships_is_that_of_the_configuration():
    """`cfusion configs schema --out cfusion/config.schema.json` makes it current."""
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == config_schema()
    assert CliRunner().invoke(app, ["configs", "schema"]).output == SCHEMA.read_text(encoding="utf-8")


def test_the_schema_accepts_shipped_configurations_and_refuses_unknown_keys():
    jsonschema = pytest.importorskip("jsonschema")
    for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(path.read_text()), config_schema())
    with pytest.raises(jsonschema.ValidationError, match="epoch"):
        jsonschema.validate({"train": {"epoch": 3}}, config_schema())

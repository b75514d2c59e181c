"""The public API in ten lines, as the README prints it."""

import dataclasses
import re
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml
from factories import make_cohort
from planted_bags import planted_slide

import cfusion
from cfusion.data.store import write_slide

ROOT = Path(__file__).parents[1]


def test_the_ten_lines_run_as_printed(tmp_path, monkeypatch):
    """The block of README.md itself, which is also that of the site, on a small cohort."""
    (block,) = re.findall(r"```python\n(import cfusion\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block.strip() in (ROOT / "docs/reference/python.head.md").read_text()
    files = make_cohort(tmp_path / "cohort", patients=60)
    (tmp_path / "configs").mkdir()
    values = files.config(tmp_path / "run").model_dump(mode="json")
    (tmp_path / "configs/tcga_blca.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block.replace("train.epochs=20", "train.epochs=2"), names)

    run, predictions, row = names["run"], names["predictions"], names["scores"].summary.iloc[0]
    assert len(run.history) == 2
    assert predictions["risk"].tolist() == pytest.approx(run.predictions["risk"].tolist())
    assert (row["cohort"], row["model"], row["protocol"]) == ("made_up", "amil", "strict")
    same = cfusion.score(run.predictions, names["cohort"], [names["split"]]).summary.iloc[0]
    assert row.to_dict() == pytest.approx(same.to_dict(), nan_ok=True)
    assert (tmp_path / "reports/blca/index.html").read_text().startswith("<!")


def test_a_notebook(tmp_path):
    """What one would type, cell by cell: train, score, and ask why a slide has its risk."""
    files = make_cohort(tmp_path / "cohort", patients=60)
    slide = planted_slide()[0]
    write_slide(tmp_path / "features", slide)

    config = files.config(tmp_path / "run", train={"epochs": 2})
    cohort = cfusion.read_cohort(config.cohort)
    split = cfusion.make_splits(cohort, config.splits)[0]
    run = cfusion.fit(config, cohort, split)
    scores = cfusion.score(run.predictions, cohort, [split], bootstrap=20)
    store = cfusion.FeatureStore.open(tmp_path / "features")
    explanation = cfusion.explain(run.model, store.read(slide.slide_id))
    worst = explanation.table("x20").nlargest(5, "gradient")

    assert {"x_px", "y_px", "attention", "gradient", "gradient_sd"} < set(worst.columns)
    assert worst["gradient"].is_monotonic_decreasing
    assert repr(store) == f"FeatureStore({tmp_path / 'features' / store.encoder}: 1 slide)"
    assert isinstance(run.predictions, pd.DataFrame)
    assert isinstance(scores.summary, pd.DataFrame)
    assert repr(cohort) == "Cohort(made_up: 60 patients, {} events, 61 slides, OS)".format(cohort.cases["event"].sum())
    assert re.fullmatch(r"Split\(fold 0: \d+ train, \d+ validation, 20 test\)", repr(split))
    assert re.fullmatch(r"FoldRun\(amil, fold 0: epoch [01] chosen after 2 epochs, 20 patients predicted\)", repr(run))
    assert repr(run.model) == "FittedModel(amil of made_up, fold 0: reads made-up at 20x, 10x, 5x)"
    assert re.fullmatch(r"Scores\(made_up amil \(strict\): C 0\.\d{3} \[0\.\d{3}, \d\.\d{3}\]\)", repr(scores))
    assert repr(explanation).startswith("Explanation(planted-0: risk ")
    for shown in (cohort, run, scores, explanation):
        page = shown._repr_html_()
        assert page.count("<table") == page.count("</table>") >= 1
        assert len(page) < 20_000


def test_a_configuration_shows_only_changed_settings():
    assert repr(cfusion.load_config(None, ["train.epochs=3"])) == "Config(train=TrainConfig(epochs=3))"


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = cfusion.trian


def _named(annotation) -> Iterator[type]:
    """The classes in an annotation, through its parameters."""
    if isinstance(annotation, type):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _named(part)


def _returned(thing) -> Iterator[type]:
    """The classes of this project that a function returns or a dataclass holds."""
    hints = typing.get_type_hints(thing, localns={"pd": pd})
    annotations = hints.values() if isinstance(thing, type) else [hints["return"]]
    for kind in (kind for annotation in annotations for kind in _named(annotation)):
        if kind.__module__.partition(".")[0] == "cfusion":
            yield kind


def test_what_public_functions_return_is_public():
    public = [getattr(cfusion, name) for name in cfusion._API]
    assert [thing.__name__ for thing in public] == list(cfusion._API)
    methods = [cfusion.FeatureStore.read, cfusion.FoldEnsemble.load, cfusion.FittedModel.load]
    results = [thing for thing in public if not isinstance(thing, type)] + methods
    held = [thing for thing in public if dataclasses.is_dataclass(thing)]
    missing = {kind for thing in results + held for kind in _returned(thing) if kind not in public}
    assert not missing


def test_the_version_has_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "cfusion/__init__.py"
    found = re.findall(r'^__version__ = "(.*)"$', (ROOT / "cfusion/__init__.py").read_text(), re.MULTILINE)
    assert found == [cfusion.__version__]


def test_the_command_prints_its_version_without_loading_torch():
    program = (
        "import sys\n"
        "from cfusion.cli.main import run\n"
        "sys.argv = ['cfusion', '--version']\n"
        "try:\n    run()\nexcept SystemExit as left:\n    assert not left.code, left.code\n"
        "heavy = {'torch', 'numpy', 'pandas', 'pydantic', 'mlflow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"cfusion {cfusion.__version__}\n"), done.stderr


def test_types_ship():
    assert (Path(cfusion.__file__).parent / "py.typed").is_file()

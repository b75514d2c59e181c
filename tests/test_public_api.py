"""The public API in ten lines, and a README that is true."""

import subprocess
from pathlib import Path

import pytest
import yaml
from factories import make_cohort

import cfusion

ROOT = Path(__file__).parents[1]


def test_the_ten_lines_run(tmp_path):
    files = make_cohort(tmp_path / "cohort", patients=60)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(files.config(tmp_path / "run").model_dump(mode="json")))

    config = cfusion.load_config(path, ["train.epochs=2"])
    cohort = cfusion.read_cohort(config.cohort)
    splits = cfusion.make_splits(cohort, config.splits)
    run = cfusion.fit(config, cohort, splits[0])
    predictions = cfusion.predict(run.model, config.data, splits[0].test)
    scores = cfusion.score(run.predictions, cohort, splits[:1])
    page = cfusion.write_report([scores], tmp_path / "report")

    assert predictions["risk"].tolist() == pytest.approx(run.predictions["risk"].tolist())
    assert 0 <= scores.summary["cindex_pooled"].iloc[0] <= 1
    assert page.read_text().startswith("<!")


def test_an_unknown_name_is_told():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = cfusion.trian


def test_the_readme_has_a_line_for_every_module():
    files = subprocess.run(["git", "ls-files", "*.py", "*.sh"], cwd=ROOT, capture_output=True, text=True, check=True)
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("## The tree") :]
    listed = {line.split()[0] for line in tree.splitlines() if line.split()}
    tracked = [Path(f) for f in files.stdout.split() if not f.startswith("tests/")]
    missing = [str(f) for f in tracked if f.name != "__init__.py" and f.name not in listed]
    assert not missing
    gone = {name for name in listed if name.endswith((".py", ".sh"))} - {f.name for f in tracked}
    assert not gone

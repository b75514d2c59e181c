"""`cfusion configs`, and what the shipped configurations do without any shards."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cfusion.cli.main import app
from cfusion.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_every_configuration_is_listed_and_one_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    listed = [line.split()[0] for line in call("configs", "list").output.splitlines()]
    assert listed == sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml"))
    assert call("configs", "copy", "tcga_blca").exit_code == 0
    assert (tmp_path / "tcga_blca.yaml").read_bytes() == (CONFIGS / "tcga_blca.yaml").read_bytes()
    assert call("configs", "copy", "sweeps/published", "new/grid.yaml").exit_code == 0
    assert (tmp_path / "new/grid.yaml").read_bytes() == (CONFIGS / "sweeps/published.yaml").read_bytes()
    (tmp_path / "tcga_blca.yaml").write_text("mine")
    refused = call("configs", "copy", "tcga_blca")
    assert isinstance(refused.exception, ConfigError)
    assert "already exists" in str(refused.exception)
    assert (tmp_path / "tcga_blca.yaml").read_text() == "mine"
    unknown = call("configs", "copy", "tcga_blka")
    assert "Did you mean tcga_blca?" in str(unknown.exception)


def test_a_shipped_cohort_is_audited_without_shards():
    result = call("audit", CONFIGS / "tcga_coad.yaml")
    assert result.exit_code == 0, result.output
    assert "features: not checked" in result.output
    assert "data/shards/tcga_coad/uni" in result.output


def test_what_a_packaged_manifest_would_download_is_said_without_a_network(tmp_path: Path):
    source = "package:tcga/manifests/tcga_blca.tsv"
    result = call("gdc", "download", source, "--out", tmp_path / "slides", "--dry-run", "--api", "http://127.0.0.1:1")
    assert result.exit_code == 0, result.output
    assert f"{source}: 457 slides, " in result.output
    assert not (tmp_path / "slides").exists()

"""The wheel, installed outside the clone: nothing that a command needs stays behind in the repository."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as installed from its wheel; its dependencies are those of these tests."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, folder: Path, *arguments: str, code: int = 0) -> str:
    """Run a Python of the installed package in `folder`, without the clone on its path; its output if it ends so."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_every_file_of_the_packages_is_in_the_wheel(installed: Path):
    kept = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    for package in ("cfusion", "preprocess", "launch"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(ROOT) in kept, path
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert Path("cfusion") / path.relative_to(ROOT) in kept, path


@pytest.mark.slow
def test_commands_work_outside_the_clone(installed: Path, tmp_path: Path):
    where = run(installed, tmp_path, "-c", "import cfusion, launch, preprocess; print(cfusion.__file__)")
    assert Path(where.strip()).is_relative_to(installed)

    def cfusion(*arguments: str, code: int = 0) -> str:
        return run(installed, tmp_path, "-m", "cfusion", *arguments, code=code)

    assert "cfusion demo" in cfusion("--help")
    assert "tcga_blca" in cfusion("configs", "list")
    cfusion("configs", "copy", "tcga_blca")
    assert "373 patients" in cfusion("audit", "tcga_blca.yaml")
    cfusion("configs", "copy", "sweeps/published", "grid.yaml")
    assert len(cfusion("sweep", "plan", "grid.yaml", "--list").splitlines()) == 1440
    assert "457 slides" in cfusion("gdc", "download", "package:tcga/manifests/tcga_blca.tsv", "--dry-run")
    assert "resolution" in cfusion("help", "resolution").lower()
    assert "#SBATCH" in cfusion("launch", "slurm", "tcga_blca.yaml", "--dry-run", code=2), "2: the shards are not there"


@pytest.mark.slow
def test_the_demo_starts_outside_the_clone(installed: Path, tmp_path: Path):
    run(installed, tmp_path, "-m", "cfusion", "phantom", "study", "--cases", "1")
    assert list((tmp_path / "study" / "slides").glob("*.svs"))
    assert (tmp_path / "study" / "cohort.csv").is_file()

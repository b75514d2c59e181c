"""The command as a user meets it: a process, its text, its exit code."""

import contextlib
import errno
import io
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from factories import CohortFiles, make_cohort

from cfusion.cli import main
from cfusion.console import RepeatsCounted, alike
from cfusion.files import atomic_path


def cfusion(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cfusion", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture
def config(files: CohortFiles, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    values = files.config(tmp_path / "run", train={"epochs": 2}).model_dump(mode="json")
    path.write_text(yaml.safe_dump(values))
    return path


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['cfusion', '--help']\n"
        "from cfusion.cli.main import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'mlflow', 'pandas', 'numpy', 'zarr', 'sksurv', 'openslide') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("[]"), done.stdout[-200:] + done.stderr
    for command in ("demo", "doctor", "preprocess", "train", "score", "report", "sweep"):
        assert f"  {command} " in done.stdout


@pytest.mark.slow
def test_what_would_run_is_printed_and_nothing_is_written(config, tmp_path):
    done = cfusion("train", config, "train.epochs=17", "--print-config")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["train"]["epochs"] == 17
    done = cfusion("train", config, "--dry-run")
    assert "made_up: 48 patients" in done.stdout
    assert "fold 2:" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "unknown key train.epoch. Did you mean train.epochs?"),
        pytest.param("data.shards=nowhere", "nowhere", marks=pytest.mark.slow),
        ("cohort.table=nothing.csv", "nothing.csv"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(config, tmp_path, override, message):
    done = cfusion("train", config, override)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_complete_run_gives_the_same_c_with_and_without_torchrun(config, tmp_path):
    single = cfusion("train", config, "parallel.precision=f64", OMP_NUM_THREADS="1")
    assert single.returncode == 0, single.stderr
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    output = tmp_path / "world"
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cfusion",
         "train", str(config), "parallel.precision=f64", f"output={output}"],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr[-3000:]
    first = (tmp_path / "run" / "predictions.csv").read_text().splitlines()
    second = (output / "predictions.csv").read_text().splitlines()
    assert len(first) == len(second) == 49
    risks = [
        [float(line.split(",")[first[0].split(",").index("risk")]) for line in lines[1:]] for lines in (first, second)
    ]
    assert risks[1] == pytest.approx(risks[0], abs=1e-9)
    assert launched.stdout.count("C within folds") == 1, "only rank 0 prints"


@pytest.mark.slow
def test_a_run_on_permuted_outcomes_ends_well_and_says_what_it_is(config, tmp_path):
    done = cfusion("train", config, "evaluation.permute_outcomes=1")
    assert done.returncode == 0, done.stderr
    assert (
        f"null run on permuted outcomes; to compare it with the real run: cfusion report RUN {tmp_path / 'run'}"
        in done.stdout
    )
    assert not (tmp_path / "run" / "report").exists()


@pytest.mark.slow
def test_doctor_says_what_is_here():
    done = cfusion("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch" in done.stdout
    assert "FAIL" not in done.stdout


@pytest.mark.slow
def test_the_error_for_a_slide_without_resolution_names_the_option_that_supplies_it(shared, tmp_path):
    slide = shared / "slides" / "tcga-cr-7395-01a-01-ts1.svs"
    done = cfusion("preprocess", slide, "--store", tmp_path / "features")
    assert done.returncode != 0
    assert "--default-mpp" in done.stderr + done.stdout
    assert "tcga-cr-7395" in done.stderr + done.stdout
    done = cfusion("preprocess", slide, "--store", tmp_path / "features", "--default-mpp", "0.5")
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "features" / "stain-texture" / f"{slide.stem}.zarr").is_dir()


@pytest.mark.slow
def test_a_real_slide_is_extracted_and_packed_into_shards(shared, tmp_path):
    done = cfusion("preprocess", shared / "slides" / "cmu_small_region.svs", "--store", tmp_path / "features")
    assert done.returncode == 0, done.stderr + done.stdout
    done = cfusion("preprocess", "shard", tmp_path / "features", "--out", tmp_path / "shards")
    assert done.returncode == 0, done.stderr + done.stdout
    done = cfusion("preprocess", "verify", tmp_path / "shards")
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.slow
def test_an_output_that_cannot_be_a_folder_is_refused(config, tmp_path):
    (tmp_path / "taken").touch()
    sweep = tmp_path / "sweep.yaml"
    base = yaml.safe_load(config.read_text())
    del base["output"]
    sweep.write_text(yaml.safe_dump({"name": "toy", "output": str(tmp_path / "taken"), "base": base}))
    done = cfusion("sweep", "run", sweep)
    assert done.returncode == 2, done.stderr
    assert "taken" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("Give another path, or change its permissions.")


def test_a_full_disk_ends_in_a_line(monkeypatch, capsys, tmp_path):
    full = typer.Typer()

    @full.command()
    def work() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "summary.csv"))

    monkeypatch.setattr(main, "app", full)
    monkeypatch.setattr(sys, "argv", ["cfusion"])
    with pytest.raises(SystemExit) as left:
        main.run()
    assert left.value.code == 2
    written = capsys.readouterr().err
    assert (
        written == f"error: {tmp_path}/summary.csv: No space left on device. Free some space, then run the same "
        "command again; it resumes.\n"
    )


def test_a_disk_that_is_full_in_the_middle_of_a_file_is_reported_with_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as full, atomic_path(tmp_path / "scores.csv"):
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write does
    assert full.value.filename == str(tmp_path / "scores.csv")


def test_a_file_never_replaces_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "results" / "kept.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    for target in ("results", ".", "", ".."):
        with pytest.raises(IsADirectoryError), atomic_path(target) as temporary:
            temporary.write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["results", "kept.txt"]
    assert kept.read_text() == "mine"
    with atomic_path("results") as temporary:  # a folder does
        temporary.mkdir()
        (temporary / "new.txt").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["results", "new.txt"]


def test_ctrl_c_leaves_with_its_code_and_says_how_to_go_on(monkeypatch, capsys):
    interrupted = typer.Typer()

    @interrupted.command()
    def work() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "app", interrupted)
    monkeypatch.setattr(sys, "argv", ["cfusion"])
    with pytest.raises(SystemExit) as left:
        main.run()
    assert left.value.code == 130
    assert "interrupted; run the same command again to resume" in capsys.readouterr().err


def test_alike_warnings_are_one_line_with_a_count_and_a_wait_is_reported_each_time():
    counted, out = RepeatsCounted(), io.StringIO()
    handler = logging.StreamHandler(out)
    handler.addFilter(counted)
    for slide in ("TCGA-2F-A9KO-01Z", "P001", "plain"):
        for args in (("slide %s: states %g µm/px", slide, 0.25 + len(slide)), ("slide %s refused: no tiles", slide)):
            handler.handle(logging.LogRecord("preprocess", logging.WARNING, "", 0, *args[:1], args[1:], None))
    for seconds in (60, 120):
        wait = logging.LogRecord("cfusion", logging.WARNING, "", 0, "waiting, %d s", (seconds,), None)
        wait.each_time = True
        handler.handle(wait)
    handler.handle(logging.LogRecord("preprocess", logging.INFO, "", 0, "slide %s", ("P002",), None))
    for table in ("a.csv", "a.csv", "b.csv"):
        layout = logging.LogRecord("cfusion", logging.INFO, "", 0, "%s: plain layout", (table,), None)
        layout.once = True
        handler.handle(layout)
    assert out.getvalue().splitlines() == [
        "slide TCGA-2F-A9KO-01Z: states 16.25 µm/px", "slide TCGA-2F-A9KO-01Z refused: no tiles", "waiting, 60 s",
        "waiting, 120 s", "slide P002", "a.csv: plain layout", "b.csv: plain layout",
    ]  # fmt: skip
    lines = counted.lines()
    assert [line.split(":")[0] for line in lines] == ["2 more like", "2 more like"]
    assert alike("a/b1.svs: 3 of 9", "") == alike("c2.svs: 4 of 7", "") == "# # of #"


def test_repeated_warnings_are_counted_at_the_end_of_a_command(tmp_path):
    code = (
        "import logging; import cfusion.cli.main as m\n"
        "def work():\n"
        "    m._common(False, False, False)\n"
        "    for i in range(5): logging.getLogger('preprocess').warning('slide %s: odd', f's{i}')\n"
        "m.app = work; m.run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr.splitlines() == ["slide s0: odd", "4 more like: slide s0: odd (all with --verbose)"]


def test_lines_that_are_logged_during_a_bar_stand_above_it_on_a_terminal(tmp_path):
    code = (
        "import logging; import cfusion.cli.main as m; from cfusion.console import progress\n"
        "def work():\n"
        "    m._common(False, False, False)\n"
        "    with progress('folds', 2) as bar:\n"
        "        logging.getLogger('cfusion').info('training: one after another'); bar.advance(2)\n"
        "m.app = work; m.run()"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment):
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the other side is closed
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert "\rtraining: one after another\r\n" in text
    assert re.search(r"\rfolds .* 2/2 ", text)

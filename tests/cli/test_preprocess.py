"""`cfusion preprocess` and `cfusion gdc` as a user types them."""

import re
from pathlib import Path

import pytest
import typer
from slide_factory import break_tile, tissue_picture, write_slide
from typer.testing import CliRunner

from cfusion.cli import cmd_gdc as gdc
from cfusion.cli import cmd_preprocess as preprocess
from cfusion.cli import main
from cfusion.cli.cmd_sweep import sweep
from cfusion.cli.options import TASK_OPTIONS
from cfusion.errors import ConfigError, DataError, PartialResultError
from launch import extract as executors
from launch.extract import FanOut
from launch.tasks.slurm_options import SlurmQueueOptions
from launch.tasks.task import TaskResources


def call(*arguments: str | Path, app=preprocess.app):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def call_main(*arguments: str):
    return CliRunner().invoke(main.app, arguments)


def test_options_may_stand_before_the_slides(tmp_path: Path):
    slide = write_slide(tmp_path / "a.svs", tissue_picture(700, 700))
    assert call("--store", tmp_path / "store", "--threads", 1, slide).exit_code == 0
    assert (tmp_path / "store" / "summary.csv").is_file()
    for flag in ("-h", "--help"):
        assert "verify" in call_main("preprocess", flag).output


def test_what_a_cluster_is_asked_for(tmp_path: Path, monkeypatch):
    asked = []

    def fan_out(config, plan, *, overwrite):
        asked.append((config.threads, plan))
        raise DataError("enough")

    monkeypatch.setattr(executors, "fan_out", fan_out)
    slide = write_slide(tmp_path / "a.svs", tissue_picture(300, 300))
    call(slide, "--executor", "slurm", "--tasks", 3, "--gpus", 1, "--partition", "gpu", "--hours", 1.5)
    call(slide, "--executor", "ray", "--threads", 7)
    call(slide, "--executor", "ray", "--threads", 7, "--cpus", 2, "--max-parallel", 5, "--ray-address", "n1:6379")
    call(slide, "--executor", "slurm", "--mem", 8, "--chunk", 2, "--cpus", 3, "--retries", 0)
    slurm = FanOut(
        "slurm", tasks=3, resources=TaskResources(gpus=1, hours=1.5, slurm=SlurmQueueOptions(partition="gpu"))
    )
    assert asked == [
        (4, slurm),
        (7, FanOut("ray", resources=TaskResources(cpus=7))),
        (7, FanOut("ray", resources=TaskResources(cpus=2, max_parallel=5), address="n1:6379")),
        (3, FanOut("slurm", retries=0, resources=TaskResources(cpus=3, mem_gb=8, chunk=2))),
    ]


def test_options_of_tasks_are_those_of_a_sweep():
    shared = {name for names in TASK_OPTIONS.values() for name in names} | {"executor", "retries"}

    def options(app: typer.Typer) -> dict[str, tuple[list[str], str]]:
        command = typer.main.get_command(app).commands["run"]
        return {p.name: (p.opts, p.help) for p in command.params if p.name in shared}

    assert options(preprocess.app) == options(sweep)
    assert options(sweep).keys() == shared


@pytest.mark.parametrize(
    ("executor", "option"),
    [
        ("local", "--cpus"),
        ("local", "--tasks"),
        ("ray", "--partition"),
        ("slurm", "--ray-address"),
    ],
)
def test_options_that_the_executor_ignores_are_refused(tmp_path: Path, executor, option):
    refused = call(tmp_path, "--executor", executor, option, "1")
    assert isinstance(refused.exception, ConfigError)
    assert f"{option} does not go with --executor {executor}" in str(refused.exception)


def test_a_folder_without_features_is_no_store(tmp_path: Path):
    for command in ("verify", "inspect"):
        refused = call(command, tmp_path)
        assert isinstance(refused.exception, DataError)
        assert "contains no features" in str(refused.exception)


@pytest.mark.parametrize("form", [(), ("run",)], ids=["short", "run"])
def test_slides_become_features_and_are_then_skipped(tmp_path: Path, form):
    slide = write_slide(tmp_path / "a.svs", tissue_picture(700, 700))
    first = call(*form, slide, "--store", tmp_path / "store")
    assert first.exit_code == 0
    assert re.search(r"done +1 +[1-9]\d* *\n", first.output)
    assert re.search(r"failed +0 +0 *\n", first.output)
    assert (tmp_path / "store/sheets/a.jpg").is_file()
    assert re.search(r"skipped +1 +0 *\n", call(*form, slide, "--store", tmp_path / "store").output)


@pytest.mark.slow
def test_the_real_slides_as_the_readme_has_them(shared: Path, tmp_path: Path):
    small, large = (shared / "slides" / f"{n}.svs" for n in ("cmu_small_region", "tcga-cr-7395-01a-01-ts1"))
    assert call(small, "--store", tmp_path).exit_code == 0
    refused = call(large, "--store", tmp_path)
    assert isinstance(refused.exception, DataError)
    assert "its file does not state its resolution" in str(refused.exception)
    assert "--default-mpp" in str(refused.exception)
    assert call(large, "--store", tmp_path, "--default-mpp", 0.25).exit_code == 0
    assert "2 slides match the digests recorded" in call("verify", tmp_path).output
    listed = call("inspect", tmp_path).output
    assert "0.499 (mpp)" in listed
    drawn = call("inspect", tmp_path, "--slide", "cmu_small_region", "--out", tmp_path / "a.png")
    assert drawn.exit_code == 0
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_folder_with_a_bad_slide_is_done_in_part(tmp_path: Path):
    slides = tmp_path / "slides"
    slides.mkdir()
    write_slide(slides / "good.svs", tissue_picture(1300, 700, share=1.5))
    write_slide(slides / "partly.svs", tissue_picture(1300, 700, share=1.5))
    break_tile(slides / "partly.svs", 0)
    (slides / "bad.svs").write_bytes(b"nothing")
    result = call(slides, "--store", tmp_path / "store")
    assert isinstance(result.exception, PartialResultError)
    assert "of 3 slides 1 failed" in str(result.exception)
    assert "failed  bad: " in result.output
    assert "partly  partly: 1 of 2 cells cannot be read" in result.output
    assert isinstance(call(slides, "--store", tmp_path / "other", "--strict").exception, DataError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--magnifications", "20,10,6"), "expected each to be half the one before"),
        (("--magnifications", "fine"), "expected numbers, such as 20,10,5"),
        (("--resolution", "about"), "resolution='about'"),
        (("--encoder", "uni9"), "encoder 'uni9' is unknown. Known: stain-texture"),
        (("--executor", "pbs"), "expected one of local, slurm, ray"),
        (("--tasks", "4"), "--tasks does not go with --executor local. Leave it out, or give --executor slurm or ray"),
        (("--hours", "2"), "--hours does not go with --executor local. Leave it out, or give --executor slurm."),
        (("--executor", "slurm", "--strict"), "--strict does not go with --executor slurm"),
        (("--device", "cuda:77", "--encoder", "uni"), "device 'cuda:77' is unavailable"),
        (("--threads", "0"), "threads=0"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path, arguments, message):
    slide = write_slide(tmp_path / "a.svs", tissue_picture(300, 300))
    result = call(slide, "--store", tmp_path / "store", *arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
    assert not (tmp_path / "store").exists()


def test_a_changed_store_is_found(tmp_path: Path):
    slide = write_slide(tmp_path / "a.svs", tissue_picture(700, 700))
    call(slide, "--store", tmp_path / "store")
    chunk = tmp_path / "store/stain-texture/a.zarr/x20/features/c/0/0"
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    result = call("verify", tmp_path / "store")
    assert "WRONG   stain-texture/a: slide a: x20/features differs from its digest" in result.output
    assert isinstance(result.exception, DataError)


def test_a_manifest_becomes_a_call_of_gdc_client(tmp_path: Path):
    source = "package:tcga/manifests/tcga_blca.tsv"
    result = call("manifest", source, "--out", tmp_path / "m.tsv", "--folder", "some slides", app=gdc.app)
    assert "457 slides" in result.output
    assert f"gdc-client download --manifest {tmp_path / 'm.tsv'} --dir 'some slides'" in result.output
    refused = call("download", source, "--out", tmp_path, "--first", 1, "--api", "http://127.0.0.1:1", app=gdc.app)
    assert isinstance(refused.exception, PartialResultError)
    assert "unreachable" in refused.output


def test_a_batch_size_is_a_number_of_tiles_or_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("preprocess.extraction.preprocess_slides", lambda config, **_: seen.append(config) or 1 / 0)
    command = typer.main.get_command(preprocess.app)
    for given in ("auto", "7"):
        with pytest.raises(ZeroDivisionError):
            command(["run", str(tmp_path), "--batch-size", given, "--tf32"], standalone_mode=False)
    assert [config.batch_size for config in seen] == ["auto", 7]
    assert all(config.tf32 for config in seen)
    with pytest.raises(ConfigError, match=r"--batch-size few: expected a whole number, or auto"):
        command(["run", str(tmp_path), "--batch-size", "few"], standalone_mode=False)
    with pytest.raises(ConfigError, match=r"batch_size=0: expected a number of tiles from 1, or auto"):
        command(["run", str(tmp_path), "--batch-size", "0"], standalone_mode=False)


def test_strict_and_a_process_for_each_gpu_do_not_go_together(tmp_path: Path):
    command = typer.main.get_command(preprocess.app)
    with pytest.raises(ConfigError, match="--strict stops at the first slide that fails"):
        command(["run", str(tmp_path), "--strict", "--process-per-gpu"], standalone_mode=False)
    with pytest.raises(ConfigError, match="process-per-gpu"):
        command(["run", str(tmp_path), "--executor", "slurm", "--process-per-gpu"], standalone_mode=False)

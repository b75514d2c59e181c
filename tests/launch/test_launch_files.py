"""The files of launch/accelerate and launch/deepspeed are true: each loads, and what can start here starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from typer.testing import CliRunner

from cfusion.cli.main import app
from cfusion.config import ParallelConfig
from cfusion.training.zero import deepspeed_config

LAUNCH = Path(__file__).parents[2] / "launch"
PROCESSES = {"cpu": (1, 2), "one_gpu": (1, 1), "one_node": (1, 8), "nodes": (4, 32)}
"""Machines and processes of each file."""


def test_every_file_is_named_here():
    assert {path.stem for path in (LAUNCH / "accelerate").iterdir()} == set(PROCESSES)
    assert len(list((LAUNCH / "deepspeed").glob("*.json"))) == 6


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_loads_its_file(name):
    loaded = load_config_from_file(str(LAUNCH / "accelerate" / f"{name}.yaml"))
    assert (loaded.num_machines, loaded.num_processes) == PROCESSES[name]
    single = loaded.num_processes == 1
    assert loaded.distributed_type == (DistributedType.NO if single else DistributedType.MULTI_GPU)
    assert not loaded.use_cpu, "with it, accelerate starts one process"
    assert loaded.mixed_precision == "no", "the configuration decides"
    assert not loaded.deepspeed_config, "the configuration decides"


WORKER = """
import sys
from cfusion.config import ParallelConfig
from cfusion.training.world import join_world
runtime = join_world(ParallelConfig(engine=sys.argv[1]))
gathered = runtime.gather([runtime.rank])
if runtime.is_main:
    print("RANKS", gathered, runtime.worlds())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "engine", "ranks"),
    [
        ("cpu", "ddp", [0, 1]),
        ("one_gpu", "ddp", [0]),
        ("cpu", "zero2", [0, 1]),
    ],
)
def test_a_file_starts_the_processes_it_names_in_one_world(tmp_path, file, engine, ranks):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launcher = Path(sys.executable).with_name("accelerate-launch")
    command = [launcher, "--config_file", LAUNCH / "accelerate" / f"{file}.yaml", script, engine]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(LAUNCH.parent)}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = [found for found in done.stdout.splitlines() if found.startswith("RANKS")]
    assert line.startswith(f"RANKS {ranks}")
    assert line.count(f": {len(ranks)}") == (2 if engine == "ddp" else 3), "every library sees the same world"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("device", "precision"), [("gpu", "bf16"), ("cpu", "f32")])
def test_a_deepspeed_file_is_what_the_program_hands_over_and_deepspeed_takes_it(stage, device, precision):
    path = LAUNCH / "deepspeed" / f"zero{stage}.{device}.json"
    shown = json.loads(path.read_text())
    parallel = ParallelConfig(engine=f"zero{stage}", precision=precision)
    assert shown == deepspeed_config(parallel, on_cpu=device == "cpu")
    from deepspeed import DeepSpeedConfig

    assert DeepSpeedConfig(str(path)).zero_config.stage == stage


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("slurm/two_nodes.sbatch", ["slurm", "configs/tcga_blca.yaml", "--python", "python"]),
        (
            "kubernetes/two_nodes.yaml",
            ["k8s", "configs/tcga_blca.yaml", "--image", "cfusion:latest", "--claim", "data"],
        ),
    ],
)
def test_an_example_is_what_the_command_writes(monkeypatch, path, arguments):
    monkeypatch.chdir(LAUNCH.parent)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    done = CliRunner().invoke(app, ["launch", *arguments, "--nodes", "2", "--gpus", "8", "--dry-run"])
    if arguments[0] == "slurm":  # prints the script before it checks the data, and the example's shards are not here
        assert "data/shards/tcga_blca/uni/index.json" in str(done.exception), done.output
    else:
        assert done.exit_code == 0, done.output
    assert (LAUNCH / path).read_text() == done.stdout, f"regenerate it with --out launch/{path}"

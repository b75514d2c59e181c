"""A wrong number or kind of processes is refused by every process, before training starts."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from spawn import run_world

import cfusion.training.runtime as runtime_module
import cfusion.training.world as world_module
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import reducer_difference, wrapped_in_a_world_of_one
from benchmarks.gpu.steps import share
from cfusion.config import ParallelConfig
from cfusion.doctor.checks import CHECKS, check_node
from cfusion.errors import ConfigError, MissingExtraError
from cfusion.machine_limits import gpu_share
from cfusion.training.runtime import Runtime
from cfusion.training.world import join_world, launched


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Puts back what starting an engine sets."""
    for name in (
        "DS_ACCELERATOR",
        "LOCAL_WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_USE_AGENT_STORE",
        "TORCHELASTIC_RESTART_COUNT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return monkeypatch


def other_program() -> None:
    """In a worker: the second process runs other source files."""
    if os.environ["RANK"] == "1":
        world_module.program_digest = lambda: "edited"
    with pytest.raises(
        ConfigError, match=r"Ranks \[1\] differ from rank 0 in: program .* Start all of them from the same files"
    ):
        join_world(ParallelConfig())


@pytest.mark.slow
def test_processes_of_another_version_of_the_program_stop_at_the_start(tmp_path):
    run_world(2, other_program, tmp_path)


@pytest.mark.parametrize("precision", ["f64", "fp16"])
def test_zero_refuses_a_precision_it_does_not_compute_in(environment, precision):
    environment.setattr(torch.cuda, "is_available", lambda: precision == "fp16")
    environment.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=rf"precision={precision} needs parallel.engine=ddp. Use f32 or bf16"):
        join_world(ParallelConfig(engine="zero2", precision=precision))


@pytest.mark.parametrize("package", ["deepspeed", "transformers"])
def test_zero_without_its_extra_names_it(environment, package):
    environment.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}, which is not installed.*cfusion\[deepspeed\]"):
        join_world(ParallelConfig(engine="zero2"))


@pytest.mark.parametrize(
    ("engine", "runs"),
    [("zero2", DistributedType.MULTI_CPU), ("ddp", DistributedType.DEEPSPEED), ("ddp", DistributedType.FSDP)],
)
def test_another_engine_than_the_one_asked_for_is_refused(environment, engine, runs):
    """Accelerate ignores or uses DeepSpeed depending only on its environment."""
    import cfusion.training.zero as zero

    for module in (runtime_module, zero):
        environment.setattr(module, "Accelerator", lambda **_: SimpleNamespace(distributed_type=runs))
    environment.setattr(zero, "DeepSpeedPlugin", lambda **_: None)
    environment.setattr(zero, "_import_deepspeed", lambda: None)
    zero.ZeroRuntime.accelerate.cache_clear()
    with pytest.raises(
        ConfigError, match=rf"The configuration has parallel.engine={engine}, but Accelerate runs {runs.value}"
    ):
        join_world(ParallelConfig(engine=engine))


@pytest.mark.parametrize("who", ["Accelerate", "torch.distributed", "DeepSpeed"])
def test_a_library_that_sees_another_world_is_refused(environment, who):
    environment.setattr(Runtime, "worlds", lambda self: {"Accelerate": 1, "torch.distributed": 1, who: 2})
    with pytest.raises(ConfigError, match=rf"The launcher started 1 processes, but {who} sees 2"):
        join_world(ParallelConfig())


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2"}, r"srun started 2 separate tasks; each of them would run the complete training"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, r"mpirun started 4 separate tasks"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"},
            r"should start several processes but started one",
        ),
    ],
)
def test_launcher_of_unconnected_processes_is_refused(environment, variables, message):
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        join_world(ParallelConfig())
    environment.setenv("WORLD_SIZE", "1")
    assert launched() == 1, "a launcher that sets the world size takes precedence"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE=two: expected the number of processes"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, r"WORLD_SIZE=2 without MASTER_ADDR, MASTER_PORT"),
        (
            {"WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"},
            r"started the processes again.*python -m launch\.torchrun",
        ),
    ],
)
def test_inconsistent_variables_are_reported_by_a_run_and_by_the_doctor(environment, variables, message):
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        join_world(ParallelConfig())
    environment.setattr("cfusion.doctor.checks.CHECKS", [item for item in CHECKS if item[0] == "launcher"])
    (check,) = check_node()
    assert (check.passed, check.required) == (False, True)
    assert variables["WORLD_SIZE"] in check.detail or "started the processes again" in check.detail


def test_accelerates_own_accumulation_is_off_whatever_the_environment_says(environment):
    environment.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    runtime = join_world(ParallelConfig())
    weight = torch.nn.Parameter(torch.ones((), dtype=runtime.dtype, device=runtime.device))
    runtime.backward(weight * 2)
    assert weight.grad == 2


def test_more_processes_than_gpus_are_refused(environment):
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: 2)
    environment.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"4 processes were started on this node, which has 2 GPUs. Start 2"):
        join_world(ParallelConfig())


def test_fp16_without_a_gpu_is_refused(environment):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match=r"fp16 needs a GPU"):
        join_world(ParallelConfig(precision="fp16"))


def test_bf16_is_refused_on_a_gpu_without_it_and_warned_of_on_such_a_processor(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ConfigError, match=r"this GPU has no bf16 arithmetic\. Use f32 or fp16"):
        world_module.check_precision("bf16", on_cpu=False)
    for instructions, text in (
        ("AVX512", ""),
        ("AVX2", "bf16 is many times slower than f32 here: AVX2 has no bf16"),
    ):
        caplog.clear()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda known=instructions: known)
        world_module.check_precision("bf16", on_cpu=True)
        assert text in caplog.text
        assert bool(text) == bool(caplog.text)


@pytest.mark.parametrize(
    ("on_cpu", "has_bf16", "precision"), [(True, True, "f32"), (False, True, "bf16"), (False, False, "f32")]
)
def test_precision_auto_is_bf16_where_the_gpu_has_it(monkeypatch, caplog, on_cpu, has_bf16, precision):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    with caplog.at_level("INFO"):
        decided = world_module.with_own_precision(ParallelConfig(), on_cpu=on_cpu)
    assert decided.precision == precision
    assert (f"parallel.precision=auto: {precision}" in caplog.text) is not on_cpu
    for given in ("f32", "fp16", "f64"):
        assert world_module.with_own_precision(ParallelConfig(precision=given), on_cpu=on_cpu).precision == given


@pytest.mark.parametrize(("scale", "usable"), [(1024.0, True), (0.5, False)])
def test_in_fp16_a_scale_too_large_skips_a_step_and_one_too_small_stops(scale, usable):
    moved = []
    runtime = Runtime.__new__(Runtime)
    runtime.accelerator = SimpleNamespace(
        unscale_gradients=lambda: None, scaler=SimpleNamespace(get_scale=lambda: scale)
    )
    optimizer = SimpleNamespace(param_groups=[{}], step=lambda: moved.append(1), zero_grad=lambda: None)
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.grad = torch.full((1, 1), float("inf"))
    norm = runtime.clip(layer, 1.0)
    assert norm is not None
    assert not norm.isfinite()
    assert runtime.advance(optimizer, lr=0.1, clip_norm=1.0, finite=False) is usable
    assert moved == [1], "the scaler skips the step and lowers the scale"


def nccl_step(engine: str) -> None:
    """In a worker: one process on NCCL sums, and its engine runs bf16."""
    runtime = join_world(ParallelConfig(engine=engine, precision="bf16", global_batch=1))
    assert "nccl" in torch.distributed.get_backend()
    model = torch.nn.Linear(3, 1)
    wrapped, optimizer = runtime.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    with runtime.accumulate(wrapped, last=True):
        with runtime.autocast():
            output = wrapped(torch.ones(2, 3, device=runtime.device))
        assert output.dtype == torch.bfloat16
        runtime.backward(output.float().square().mean())
    norm = runtime.clip(wrapped, 1.0)
    assert norm is None or float(norm) > 0
    assert runtime.advance(optimizer, lr=0.1, clip_norm=1.0, finite=True)
    assert runtime.sum([2.0]) == [2.0]


def reducer_step() -> None:
    """In a worker: a world of one wraps the model, and its gradients go through the reducer."""
    runtime = join_world(ParallelConfig(precision="bf16" if torch.cuda.is_available() else "f32", global_batch=2))
    bench = Bench(quick=True, minutes=1.0, shared=Path(), json_file=None)
    with wrapped_in_a_world_of_one():
        difference = reducer_difference(bench, runtime, [share(bench, 32), share(bench, 48)])
    assert difference < (1e-3 if torch.cuda.is_available() else 1e-5)


@pytest.mark.slow
def test_the_reducer_of_ddp_gives_the_gradients_of_a_bare_model(tmp_path):
    run_world(1, reducer_step, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: python -m pytest -m gpu")
def test_the_reducer_on_nccl(tmp_path):
    run_world(1, reducer_step, tmp_path)


def patient_work(folder: Path) -> None:
    """In a worker: rank 0 works for longer than a collective may wait, and the others get what it returns."""
    runtime = join_world(ParallelConfig(precision="f32", timeout_minutes=2 / 60))

    def work() -> str:
        time.sleep(6)
        return "scores"

    assert runtime.on_main(work) == "scores"
    (folder / f"done_{runtime.rank}").touch()
    runtime.barrier()


@pytest.mark.slow
def test_work_of_rank_0_may_take_longer_than_a_collective_waits(tmp_path):
    run_world(2, patient_work, tmp_path, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("done_*")) == ["done_0", "done_1"]


@pytest.mark.parametrize(
    ("on_cpu", "ranked", "connected", "made"),
    [(False, True, False, 1), (True, True, False, 0), (False, False, False, 0), (False, True, True, 0)],
)
def test_a_gpu_run_exchanges_objects_over_gloo(monkeypatch, on_cpu, ranked, connected, made):
    calls = []
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **options: calls.append((backend, options))
    )
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: connected)
    monkeypatch.setenv("LOCAL_RANK", "0") if ranked else monkeypatch.delenv("LOCAL_RANK", raising=False)
    runtime_module.connect(ParallelConfig(timeout_minutes=3), on_cpu=on_cpu)
    assert len(calls) == made
    for backend, options in calls:
        assert backend == "cuda:nccl,cpu:gloo"
        assert round(options["timeout"].total_seconds()) == 180


def test_a_process_of_a_sweeps_slot_keeps_to_its_share_of_its_gpu(environment):
    limits = []
    environment.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: limits.append(given))
    world_module._limit_gpu_memory(gpu_share())
    assert limits == []
    environment.setenv("CFUSION_GPU_SHARE", "0.25")
    environment.setenv("LOCAL_RANK", "1")
    world_module._limit_gpu_memory(gpu_share())
    assert limits == [(0.25, 1)]


@pytest.mark.parametrize("connected", [True, False])
def test_every_process_group_is_destroyed_at_the_end_whatever_its_backend(monkeypatch, connected):
    destroyed = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: connected)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: destroyed.append(1))
    world_module._disconnect()
    assert len(destroyed) == connected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: python -m pytest -m gpu")
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_bf16_on_nccl(tmp_path, engine):
    run_world(1, nccl_step, tmp_path, engine)

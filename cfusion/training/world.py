"""Joins the launched processes, and stops if they do not match what was launched.

Accelerate reads the number of processes from its environment. If that is wrong, it silently trains N separate models.
Every process therefore asserts that it sees what was launched, and that all run the same program.
"""

from __future__ import annotations

import atexit
import logging
import os

import torch

from cfusion.child_processes import stop_with_parent
from cfusion.config import ParallelConfig
from cfusion.console import waiting_for
from cfusion.errors import ConfigError
from cfusion.gpu_settings import let_segments_grow
from cfusion.machine_limits import gpu_share, usable_cores
from cfusion.models.depthwise import choose_depthwise
from cfusion.program import program_digest
from cfusion.training.arithmetic import set_arithmetic
from cfusion.training.connection import check_network, check_port, connecting
from cfusion.training.foreign_variables import settle_variables
from cfusion.training.runtime import Runtime
from cfusion.training.zero import ZeroRuntime

logger = logging.getLogger(__name__)

_SINGLES = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec",
            "MV2_COMM_WORLD_SIZE": "mpirun_rsh"}  # fmt: skip
"""Variables with a launcher's number of tasks, for tasks that cannot find each other."""


def launched() -> int:
    """Return the number of processes that the launcher started.

    Raises:
        ConfigError: It started several unconnected processes, or one instead of several, or its variables are
            inconsistent.
    """
    if "WORLD_SIZE" in os.environ:
        return _torchrun_size()
    for variable, launcher in _SINGLES.items():
        tasks = os.environ.get(variable, "1")
        if tasks != "1":
            raise ConfigError(
                f"{launcher} started {tasks} separate tasks; each of them would run the complete training.",
                "Let it start torchrun with one task per node, as cfusion launch slurm does, or start a single task.",
                topic="world",
            )
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
        raise ConfigError(
            "accelerate launch should start several processes but started one, as it does with --cpu and MULTI_CPU.",
            "Use torchrun, or accelerate-launch with launch/accelerate/cpu.yaml.",
            topic="world",
        )
    return 1


def _torchrun_size() -> int:
    size = os.environ["WORLD_SIZE"]
    if not size.isdecimal() or int(size) < 1:
        raise ConfigError(f"WORLD_SIZE={size}: expected the number of processes.", "Unset it.", topic="world")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if int(size) > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE={size} without {', '.join(missing)}: the processes cannot find each other.",
            "Start with torchrun, which sets all of them, or unset WORLD_SIZE.",
            topic="world",
        )
    for name in ("RANK", "LOCAL_RANK"):
        rank = os.environ.get(name, "0")
        if not rank.isdecimal() or int(rank) >= int(size):
            raise ConfigError(
                f"{name}={rank} with WORLD_SIZE={size}: expected a number below it.",
                "They are of different jobs: unset both, or start with torchrun, which sets them.",
                topic="world",
            )
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and again != "0":
        raise ConfigError(
            "torchrun started the processes again, but its store still holds the addresses of those that died.",
            "Use python -m launch.torchrun, which takes the same arguments; or export "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun.",
            topic="world",
        )
    return int(size)


def join_world(parallel: ParallelConfig) -> Runtime:
    """Join the processes started by `torchrun` or `accelerate launch`, or run as a single process.

    Raises:
        ConfigError: The number of processes does not divide the global batch or exceeds the node's GPUs, the precision
            or `parallel.depthwise` is unavailable here, the interface, host name or port cannot be used, or a library
            sees another number of processes than the launcher started.
        ExchangeError: The processes cannot connect.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent(os.getppid())
    expected = launched()
    settle_variables(zero=parallel.engine != "ddp")
    check_divides(parallel.global_batch, expected)
    on_cpu = not torch.cuda.is_available()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())  # torch counts the machine's cores, whatever a container or job may use
    if not on_cpu:
        let_segments_grow()
        _check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count())
        _limit_gpu_memory(gpu_share())
    parallel = with_own_precision(parallel, on_cpu=on_cpu)
    check_precision(parallel.precision, on_cpu=on_cpu)
    set_arithmetic(on_cpu=on_cpu, deterministic=parallel.deterministic)
    choose_depthwise(parallel.depthwise, on_cpu=on_cpu)
    kind = Runtime if parallel.engine == "ddp" else ZeroRuntime
    if expected > 1 and not torch.distributed.is_initialized():  # else the port is held by this process's own store
        check_network()
        check_port()
    if expected > 1:
        logger.info(
            "%d processes; one that waits for the others for %g min fails (parallel.timeout_minutes)",
            expected, parallel.timeout_minutes,
        )  # fmt: skip
    with connecting(expected), waiting_for("the other processes to connect"):
        runtime = kind(kind.accelerate(parallel, on_cpu=on_cpu), parallel)
    for who, seen in runtime.worlds().items():
        if seen != expected:
            raise ConfigError(
                f"The launcher started {expected} processes, but {who} sees {seen}.",
                "Start with torchrun, or with accelerate launch and a file of launch/accelerate.",
                topic="world",
            )
    runtime.agree("program (its source files, or the version of torch)", program_digest())
    atexit.unregister(_disconnect)
    atexit.register(_disconnect)
    return runtime


def check_divides(global_batch: int, world_size: int) -> None:
    """Refuse a global batch that the processes cannot share evenly, and name the nearest one that they can."""
    if global_batch % world_size:
        nearest = max(world_size, round(global_batch / world_size) * world_size)
        raise ConfigError(
            f"parallel.global_batch={global_batch} cannot be shared by {world_size} processes.",
            f"The nearest possible value is parallel.global_batch={nearest}.",
            topic="world",
        )


def with_own_precision(parallel: ParallelConfig, *, on_cpu: bool) -> ParallelConfig:
    """Return the settings with `precision: auto` decided for this device: bf16 on a GPU that has it, else f32."""
    if parallel.precision != "auto":
        return parallel
    bf16 = not on_cpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if not on_cpu:
        chosen = "bf16" if bf16 else "f32, as it has no bf16"
        logger.info("parallel.precision=auto: %s on %s", chosen, torch.cuda.get_device_name())
    return parallel.model_copy(update={"precision": "bf16" if bf16 else "f32"})


def check_precision(precision: str, *, on_cpu: bool) -> None:
    """Refuse a precision that this machine does not support, and warn of one that its processor emulates.

    Raises:
        ConfigError: fp16 without a GPU, or bf16 on a GPU without it.
    """
    if on_cpu and precision == "fp16":
        raise ConfigError("parallel.precision=fp16 needs a GPU.", "Use f32 or bf16 on a CPU.")
    if precision != "bf16":
        return
    if not on_cpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("parallel.precision=bf16: this GPU has no bf16 arithmetic.", "Use f32 or fp16.")
    if on_cpu and (instructions := torch.backends.cpu.get_cpu_capability()) in ("DEFAULT", "AVX2"):
        logger.warning("parallel.precision=bf16 is many times slower than f32 here: %s has no bf16.", instructions)


def _check_gpus(processes: int, gpus: int) -> None:
    if processes > gpus:
        raise ConfigError(
            f"{processes} processes were started on this node, which has {gpus} GPUs.",
            f"Start {gpus}, one per GPU (--nproc-per-node {gpus}), or set CUDA_VISIBLE_DEVICES= to compute on the CPU.",
            topic="world",
        )


def _limit_gpu_memory(share: float) -> None:
    """Keep this process to its share of its GPU; the others belong to other runs of a sweep."""
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share, int(os.environ.get("LOCAL_RANK", "0")))


def _disconnect() -> None:
    """Stop the threads of Gloo and NCCL.

    Gloo's abort a process that ends before them after all its work (pytorch issue 190489), and torch warns of resources
    of NCCL that leak.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

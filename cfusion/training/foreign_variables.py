"""Environment variables of other jobs and programs that would change where or how a run computes.

A shell of an interactive job, a batch script or a framework leaves them behind, and the libraries below read them. What
only misleads is removed, with one line that says so; what asks for something that this program does not do is refused.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, MutableMapping

from cfusion.console import is_rank_zero
from cfusion.errors import ConfigError

logger = logging.getLogger(__name__)

_OF_A_WORLD = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
"""Of a launcher; without WORLD_SIZE they are of another job, and each would name a process of a world."""

_OF_MPI = tuple(
    f"{prefix}{suffix}"
    for prefix, suffixes in {
        "OMPI_COMM_WORLD_": ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"),
        "MV2_COMM_WORLD_": ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"),
        "PMI_": ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"),
        "MPI_": ("LOCALNRANKS", "LOCALRANKID"),
    }.items()
    for suffix in suffixes
)
"""Of MPI; several tasks of MPI are refused (`cfusion.training.world.launched`), and torchrun's variables win."""

_OF_ACCELERATE: Mapping[str, tuple[str, ...]] = {
    "ACCELERATE_TORCH_DEVICE": (),
    "ACCELERATE_DYNAMO_BACKEND": ("no",),
    "ACCELERATE_DYNAMO_MODE": ("default",),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": ("false",),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": ("false",),
    "ACCELERATE_MIXED_PRECISION": ("no",),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1",),
    "ACCELERATE_DOWNCAST_BF16": ("no", "false"),
    "ACCELERATE_CPU_AFFINITY": ("false", "0"),
    "ACCELERATE_DEBUG_MODE": ("false", "0"),
}
"""Of Accelerate, with the values that change nothing: the configuration decides device, precision and steps."""

_OF_NCCL: Mapping[str, tuple[str, ...]] = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("1", "2", "3"),
    "NCCL_ASYNC_ERROR_HANDLING": ("1", "2", "3"),
}
"""Of torch, with the values that leave NCCL's watchdog on: without it, processes wait for a lost one without end."""

_ENGINES = (
    "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_TP",
    "ACCELERATE_USE_SAGEMAKER",
)  # fmt: skip
"""Of Accelerate: another engine than those of `parallel.engine`."""

_TRUE = ("true", "1", "yes", "y", "t", "on")


def settle_variables(environ: MutableMapping[str, str] = os.environ, *, zero: bool = False) -> list[str]:
    """Remove variables of other jobs and programs from the environment; return and log them as `NAME=VALUE`.

    Args:
        environ: The environment.
        zero: Whether the run's engine is DeepSpeed.

    Raises:
        ConfigError: A variable asks for another engine.
    """
    engines = (*_ENGINES, *(() if zero else ("ACCELERATE_USE_DEEPSPEED",)))
    for name in engines:
        if environ.get(name, "").lower() in _TRUE:
            raise ConfigError(
                f"{name}={environ[name]} asks Accelerate for another engine than parallel.engine.",
                f"Unset it (unset {name}), or start with torchrun; parallel.engine has ddp, zero1, zero2 and zero3.",
                topic="world",
            )
    for name in _OF_MPI:  # srun sets some for every step, so there is nothing to say
        environ.pop(name, None)
    found = [name for name in _OF_A_WORLD if name in environ and "WORLD_SIZE" not in environ]
    settings = {**_OF_ACCELERATE, **_OF_NCCL}
    found += [name for name, harmless in settings.items() if name in environ and environ[name].lower() not in harmless]
    removed = [f"{name}={environ.pop(name)}" for name in found]
    if removed and is_rank_zero():
        logger.warning("ignored, since they are of another job or program: %s", ", ".join(removed))
    return removed

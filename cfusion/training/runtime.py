"""The door to Accelerate: devices, precision, collectives, and what a process keeps of the model (DDP)."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn

from cfusion.config import ParallelConfig
from cfusion.errors import ConfigError

ItemT = TypeVar("ItemT")

TIMEOUT = datetime.timedelta(minutes=10)
"""A process that waits this long for the others gives up."""

_DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.float32, "fp16": torch.float32}
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass(frozen=True)
class Part:
    """What this process keeps of one parameter or buffer: elements `start`, `start` + 1, … of its flattened values.

    Attributes:
        shape: Of the whole.
        start: First element.
        values: The elements, to read and to write; in the shape of the whole where all of them are here.
        moments: What the optimizer keeps of the same elements, by its names for it; to read and to write.
        writes: Whether this process is the one that writes them to a checkpoint.
    """

    shape: torch.Size
    start: int
    values: Tensor
    moments: dict[str, Tensor]
    writes: bool


class Runtime:
    """The processes of a run and what this one is among them; here each of them holds the whole model (DDP).

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        device: Where this process computes.
        dtype: Type of parameters and of the features handed to the model.
        sharded_forward: Whether a forward pass needs all processes, which then have to make equally many.
    """

    def __init__(self, accelerator: Accelerator, parallel: ParallelConfig) -> None:
        self.sharded_forward = False
        self.accelerator = accelerator
        self.parallel = parallel
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.dtype = _DTYPES[parallel.precision]

    @staticmethod
    def accelerate(parallel: ParallelConfig, *, on_cpu: bool) -> Accelerator:
        """Accelerate for this engine.

        Raises:
            ConfigError: Accelerate was told of another engine.
        """
        if on_cpu:
            # Without this, a process under torchrun on a machine without a GPU believes that it is alone.
            os.environ["ACCELERATE_USE_CPU"] = "true"
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=parallel.precision if parallel.precision == "fp16" else "no",
            # Steps are put together here; a variable of the environment would have Accelerate divide each loss again.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=TIMEOUT),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
        if accelerator.distributed_type not in _REPLICATED:
            raise another_engine(parallel, accelerator.distributed_type.value)
        return accelerator

    def worlds(self) -> dict[str, int]:
        """Number of processes as each library sees it."""
        torch_sees = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return {"Accelerate": self.accelerator.num_processes, "torch.distributed": torch_sees}

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, logs and tracks."""
        return self.rank == 0

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Move the model to the device and wrap it so that gradients are averaged over processes."""
        model.to(device=self.device, dtype=self.dtype)
        # Of small depthwise kernels alone, whose copies cost nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        wrapped, optimizer = self.accelerator.prepare(model, optimizer)
        return wrapped, optimizer

    def release(self) -> None:
        """Drop the references Accelerate holds, so that the next fold starts with free memory."""
        self.accelerator.free_memory()

    @contextlib.contextmanager
    def accumulate(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """One forward and backward of a step: gradients are exchanged in the step's last one alone."""
        exchanged = last or self.accelerator.distributed_type == DistributedType.NO
        with contextlib.nullcontext() if exchanged else self.accelerator.no_sync(model):
            yield

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The arithmetic of a forward pass in training."""
        dtype = _AUTOCAST.get(self.parallel.precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
        self.accelerator.backward(loss)

    def advance(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, lr: float, clip_norm: float | None
    ) -> float:
        """Clip the gradient to `clip_norm`, move the parameters, and return the norm that the gradient had.

        Where the norm is not finite no parameter moves. In fp16 that also happens where the scale of the loss was too
        large; it is then halved, and the norm told is 0 until the scale has no room left.
        """
        limit = float("inf") if clip_norm is None else clip_norm
        norm = float(self.accelerator.clip_grad_norm_(model.parameters(), limit))
        scaler = self.accelerator.scaler
        if math.isfinite(norm) or scaler is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(norm) and scaler is not None and scaler.get_scale() >= 1:
            return 0.0
        return norm

    @property
    def loss_scale(self) -> dict[str, float]:
        """State of the scaler of losses, which moves from step to step; empty where the precision is not fp16."""
        scaler = self.accelerator.scaler
        return {} if scaler is None else scaler.state_dict()

    @loss_scale.setter
    def loss_scale(self, state: dict[str, float]) -> None:
        if state:
            self.accelerator.scaler.load_state_dict(state)

    def parts(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Part]:
        """What this process keeps of the model and of its optimizer, by the names of the parameters."""
        parameters = dict(model.named_parameters())
        return {
            name: Part(
                tensor.shape,
                0,
                tensor.detach(),
                moments_of(optimizer, parameters[name]) if name in parameters else {},
                writes=self.is_main,
            )
            for name, tensor in model.state_dict(keep_vars=True).items()
        }

    def publish(self, model: nn.Module, parts: dict[str, Part]) -> None:
        """Have the model compute with what was written to `parts`, which here are its own parameters."""

    def whole(self, parts: dict[str, Part], values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors like `parts`, of all processes put together, the same on each."""
        return values

    def bare(self, model: nn.Module, parts: dict[str, Part]) -> nn.Module:
        """The model as a plain module that needs no other process."""
        return model

    def sum(self, values: list[float]) -> list[float]:
        """Sums of `values` over all processes, the same on each."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, items: list[ItemT]) -> list[ItemT]:
        """The items of all processes, in the order of their ranks."""
        return gather_object(items) if self.world_size > 1 else items

    def from_main(self, value: ItemT) -> ItemT:
        """The value that rank 0 holds."""
        if self.world_size == 1:
            return value
        box = [value]
        broadcast_object_list(box, from_process=0)
        return box[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    def agree(self, what: str, value: str) -> None:
        """Refuse to go on where processes differ in `value`.

        Raises:
            ConfigError: Some rank holds another value; the ranks are named.
        """
        values = self.gather([value])
        differing = [rank for rank, other in enumerate(values) if other != values[0]]
        if differing:
            raise ConfigError(
                f"Ranks {differing} have another {what} than rank 0.",
                "Start all of them from the same files and the same version of the program.",
                topic="world",
            )


def another_engine(parallel: ParallelConfig, runs: str) -> ConfigError:
    """What to raise where Accelerate runs something else than the engine of the configuration."""
    return ConfigError(
        f"parallel.engine={parallel.engine} was asked for, but Accelerate runs {runs}.",
        "Start with torchrun, without ACCELERATE_* variables; a process runs one engine in its life.",
        topic="world",
    )


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The moments of Adam and AdamW of a parameter; where there are none yet, those it starts from."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state

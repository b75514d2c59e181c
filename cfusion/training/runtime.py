"""Wraps Accelerate: devices, precision, collectives, and each process's part of the model (DDP)."""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Callable, Iterator
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
from cfusion.console import waiting_for
from cfusion.errors import ConfigError

ItemT = TypeVar("ItemT")

_OTHERS = "the other processes of this run"
_DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.float32, "fp16": torch.float32}
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


PATIENCE = datetime.timedelta(hours=24)
"""How long processes wait for work that only rank 0 does."""


def connect(parallel: ParallelConfig, *, on_cpu: bool) -> None:
    """Connect the processes of a GPU run: NCCL for tensors of GPUs, gloo for objects and barriers.

    Accelerate would use NCCL for both. A barrier or an object that waits for rank 0 would then be a kernel on the GPU,
    and the watchdog of NCCL ends the process when it waits too long.
    """
    if on_cpu or "LOCAL_RANK" not in os.environ or torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group("cuda:nccl,cpu:gloo", timeout=_timeout(parallel))


def _timeout(parallel: ParallelConfig) -> datetime.timedelta:
    return datetime.timedelta(minutes=parallel.timeout_minutes, microseconds=1)


def waiting(parallel: ParallelConfig, **options: Any) -> InitProcessGroupKwargs:
    """Return for Accelerate how long a process waits for the others.

    Accelerate leaves out what equals its own default of 10 minutes, and gloo then waits for 30; hence the microsecond.
    """
    return InitProcessGroupKwargs(timeout=_timeout(parallel), **options)


@dataclass(frozen=True)
class Part:
    """The elements of one parameter or buffer that this process keeps: a range of its flattened values.

    Attributes:
        shape: Shape of the complete tensor.
        start: Index of the first element.
        values: The elements, for reading and writing; in the tensor's shape if all of them are here.
        moments: The optimizer's state of the same elements, by its names for it; for reading and writing.
        writes: Whether this process writes them to a checkpoint.
    """

    shape: torch.Size
    start: int
    values: Tensor
    moments: dict[str, Tensor]
    writes: bool


class Runtime:
    """The processes of a run, and this process's place among them; under DDP each holds the complete model.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        device: Device of this process.
        dtype: Type of parameters and of the features passed to the model.
        sharded_forward: Whether a forward pass needs all processes, so each must make the same number of passes.
    """

    def __init__(self, accelerator: Accelerator, parallel: ParallelConfig) -> None:
        self.sharded_forward = False
        self.accelerator = accelerator
        self.parallel = parallel
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.dtype = _DTYPES[parallel.precision]  # `join_world` has decided what auto means

    @staticmethod
    def accelerate(parallel: ParallelConfig, *, on_cpu: bool) -> Accelerator:
        """Create the Accelerator for this engine.

        Raises:
            ConfigError: Accelerate already runs another engine.
        """
        if on_cpu:
            # Without this, a process under torchrun on a machine without a GPU assumes that it is the only one.
            os.environ["ACCELERATE_USE_CPU"] = "true"
        connect(parallel, on_cpu=on_cpu)
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=parallel.precision if parallel.precision == "fp16" else "no",
            # The stepper assembles the steps; an environment variable could make Accelerate divide each loss again.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[
                waiting(parallel),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
        if accelerator.distributed_type not in _REPLICATED:
            raise another_engine(parallel, accelerator.distributed_type.value)
        return accelerator

    def worlds(self) -> dict[str, int]:
        """Return the number of processes that each library sees."""
        torch_sees = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return {"Accelerate": self.accelerator.num_processes, "torch.distributed": torch_sees}

    @property
    def is_one_cpu_process(self) -> bool:
        """Whether this process is the only one and computes on a CPU, so that its cores are free for several folds."""
        return self.world_size == 1 and self.device.type == "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, logs and tracking records."""
        return self.rank == 0

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Move the model to the device and wrap it so that gradients are averaged over processes.

        In fp16 each fold begins with a new loss scale: one that another fold has left behind would not be there after
        a resume.
        """
        if self.accelerator.scaler is not None:
            self.accelerator.scaler = torch.amp.GradScaler(self.device.type)
        model.to(device=self.device, dtype=self.dtype)
        # The warning concerns only small depthwise kernels, whose copies cost nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # The model is where it should be. To place it, Accelerate would import torch's distributed tensors, for 1 s.
        place = None if self.accelerator.distributed_type == DistributedType.DEEPSPEED else [False, False]
        wrapped, optimizer = self.accelerator.prepare(model, optimizer, device_placement=place)
        return wrapped, optimizer

    def release(self) -> None:
        """Drop the references that Accelerate holds, so that the next fold starts with free memory."""
        self.accelerator.free_memory()

    @contextlib.contextmanager
    def accumulate(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Run one forward and backward pass of a step; gradients are exchanged only in the last one."""
        exchanged = last or self.accelerator.distributed_type == DistributedType.NO
        with contextlib.nullcontext() if exchanged else self.accelerator.no_sync(model):
            yield

    def autocast(self, *, published: bool = False) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast context of a forward pass, in training and in evaluation.

        `published`: where the precision is f32, compute in fp16 on a GPU, as the published program does; no loss is
        scaled then. A CPU stays at f32.
        """
        dtype = _AUTOCAST.get(self.parallel.precision)
        if published and self.parallel.precision == "f32" and self.device.type == "cuda":
            dtype = torch.float16
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def held_casts(self, *, published: bool) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which several passes share the weights' casts, if `parallel.hold_casts`.

        Autocast keeps the casts until its outermost context ends.
        """
        return self.autocast(published=published) if self.parallel.hold_casts else contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
        with contextlib.ExitStack() as stack:
            if self.parallel.hold_casts:
                # Within `held_casts` the backward pass would compute some f32 operations in half precision.
                stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if self.world_size > 1:
                stack.enter_context(waiting_for(_OTHERS))
            self.accelerator.backward(loss)

    def clip(self, model: nn.Module, clip_norm: float | None) -> Tensor | None:
        """Clip the gradient to `clip_norm` (None: not at all) and return its norm before, on the device.

        None is returned where `advance` clips.
        """
        self.accelerator.unscale_gradients()
        return nn.utils.clip_grad_norm_(model.parameters(), float("inf") if clip_norm is None else clip_norm)

    def advance(self, optimizer: torch.optim.Optimizer, *, lr: float, clip_norm: float | None, finite: bool) -> bool:
        """Update the parameters with the clipped gradient.

        If the gradient is not finite, no parameter changes. In fp16 this also happens if the loss scale was too large:
        it is then halved, which is no failure until the scale cannot be reduced further.

        Args:
            optimizer: As returned by `prepare`.
            lr: Learning rate.
            clip_norm: As given to `clip`, where that does nothing.
            finite: Whether the norm of the gradient is finite.

        Returns:
            Whether the gradient was usable.
        """
        scaler = self.accelerator.scaler
        if finite or scaler is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        optimizer.zero_grad()
        return finite or (scaler is not None and scaler.get_scale() >= 1)

    @property
    def loss_scale(self) -> dict[str, float]:
        """State of the loss scaler, which changes between steps; empty unless the precision is fp16."""
        scaler = self.accelerator.scaler
        return {} if scaler is None else scaler.state_dict()

    @loss_scale.setter
    def loss_scale(self, state: dict[str, float]) -> None:
        if state:
            self.accelerator.scaler.load_state_dict(state)

    def parts(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Part]:
        """Return the parts of the model and its optimizer state that this process keeps, by parameter name."""
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
        """Make the model use the values written to `parts`; under DDP these are its own parameters."""

    def assembled(self, parts: dict[str, Part], values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Assemble tensors like `parts` from all processes; the result is the same on each."""
        return values

    def bare(self, model: nn.Module, parts: dict[str, Part]) -> nn.Module:
        """Return the model as a plain module that does not need the other processes."""
        return model

    def sum(self, values: list[float] | Tensor) -> list[float]:
        """Sum `values`, f64, over all processes; the result is the same on each.

        Values on a GPU are read only here, so that the host waits for it once.
        """
        if self.world_size == 1:
            return values if isinstance(values, list) else values.tolist()
        if isinstance(values, list):
            values = torch.tensor(values, dtype=torch.float64, device=self.device)
        with waiting_for(_OTHERS):
            torch.distributed.all_reduce(values)
            return values.tolist()

    def gather(self, items: list[ItemT]) -> list[ItemT]:
        """Gather the items of all processes, in the order of their ranks."""
        if self.world_size == 1:
            return items
        with waiting_for(_OTHERS):
            return gather_object(items)

    def from_main(self, value: ItemT) -> ItemT:
        """Return the value of rank 0."""
        if self.world_size == 1:
            return value
        box = [value]
        with waiting_for(_OTHERS):
            broadcast_object_list(box, from_process=0)
        return box[0]

    def on_main(self, work: Callable[[], ItemT]) -> ItemT:
        """Call `work` on rank 0 only, and return its result on every rank.

        The others wait for it longer than for a collective, up to `PATIENCE`: scores and figures may take a while. If
        rank 0 ends, they fail at once.
        """
        if self.world_size == 1:
            return work()
        group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        try:
            box = [work() if self.is_main else None]
            with waiting_for("rank 0 of this run"):
                torch.distributed.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
        finally:
            torch.distributed.destroy_process_group(group)
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until every process arrives."""
        if self.world_size > 1:
            with waiting_for(_OTHERS):
                torch.distributed.barrier()

    def agree(self, what: str, value: str) -> None:
        """Refuse to continue if processes differ in `value`.

        Raises:
            ConfigError: Some rank holds another value; the message names the ranks.
        """
        values = self.gather([value])
        differing = [rank for rank, other in enumerate(values) if other != values[0]]
        if differing:
            raise ConfigError(
                f"Ranks {differing} differ from rank 0 in: {what}.",
                "Start all of them from the same files and the same version of the program.",
                topic="world",
            )


def another_engine(parallel: ParallelConfig, runs: str) -> ConfigError:
    """Create the error for an Accelerate that runs a different engine than configured."""
    return ConfigError(
        f"The configuration has parallel.engine={parallel.engine}, but Accelerate runs {runs}.",
        "Start with torchrun, without ACCELERATE_* variables. A process can run only one engine.",
        topic="world",
    )


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return the moments of Adam and AdamW of a parameter; before the first step, their initial values."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        # The fused update counts the steps on the device of the parameter.
        where = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
        state["step"] = torch.tensor(0.0, device=where)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state

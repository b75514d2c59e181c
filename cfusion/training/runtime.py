"""The one door to Accelerate: processes, devices, precision and collectives.

Accelerate decides from its environment how many processes it sees, and where it is wrong it trains N separate models
without a word. `start` asserts that what it sees is what was launched.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn

from cfusion.config import ParallelConfig
from cfusion.errors import ConfigError

ItemT = TypeVar("ItemT")

_DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.float32, "fp16": torch.float32}
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Runtime:
    """The processes of a run and what this one is among them.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        device: Where this process computes.
        dtype: Type of parameters and of the features handed to the model.
    """

    def __init__(self, accelerator: Accelerator, parallel: ParallelConfig) -> None:
        self.accelerator = accelerator
        self.parallel = parallel
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.dtype = _DTYPES[parallel.precision]

    @staticmethod
    def launched() -> int:
        """Number of processes the launcher started."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @classmethod
    def start(cls, parallel: ParallelConfig) -> Runtime:
        """Join the processes that `torchrun` or `accelerate launch` started, or run alone.

        Raises:
            ConfigError: The number of processes does not divide the global batch, the precision is not to be had
                here, or Accelerate sees another world than the launcher made.
        """
        launched = cls.launched()
        check_divides(parallel.global_batch, launched)
        on_cpu = not torch.cuda.is_available()
        if on_cpu and parallel.precision == "fp16":
            raise ConfigError("parallel.precision=fp16 needs a GPU.", "Use f32 or bf16 on a CPU.")
        if parallel.engine != "ddp":
            raise ConfigError(f"parallel.engine={parallel.engine} is not available yet.", "Use parallel.engine=ddp.")
        if on_cpu:
            # Without this, a process under torchrun on a machine without a GPU believes that it is alone.
            os.environ["ACCELERATE_USE_CPU"] = "true"
            # The gradient of an indexed tensor is otherwise added up by several threads in whatever order they come.
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=parallel.precision if parallel.precision == "fp16" else "no",
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=10)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            ],
        )
        if accelerator.num_processes != launched:
            raise ConfigError(
                f"The launcher started {launched} processes, but Accelerate sees {accelerator.num_processes}.",
                "Start with torchrun, or with accelerate launch and a file of launch/accelerate.",
            )
        return cls(accelerator, parallel)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, logs and tracks."""
        return self.rank == 0

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Move the model to the device and wrap it so that gradients are averaged over processes."""
        model.to(device=self.device, dtype=self.dtype)
        wrapped, optimizer = self.accelerator.prepare(model, optimizer)
        return wrapped, optimizer

    def release(self) -> None:
        """Drop the references Accelerate holds, so that the next fold starts with free memory."""
        self.accelerator.free_memory()

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model without the wrapper of `prepare`."""
        return self.accelerator.unwrap_model(model)

    @contextlib.contextmanager
    def accumulate(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """One forward and backward of a step: gradients are exchanged in the step's last one alone."""
        autocast = _AUTOCAST.get(self.parallel.precision)
        with contextlib.ExitStack() as stack:
            if not last and self.accelerator.distributed_type != DistributedType.NO:
                stack.enter_context(self.accelerator.no_sync(model))
            if autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, dtype=autocast))
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
        self.accelerator.backward(loss)

    def clip(self, model: nn.Module, max_norm: float | None) -> float:
        """Clip the gradient to `max_norm` and return the norm it had."""
        limit = float("inf") if max_norm is None else max_norm
        return float(self.accelerator.clip_grad_norm_(model.parameters(), limit))

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
            )


def check_divides(global_batch: int, world_size: int) -> None:
    """Refuse a global batch that processes cannot share evenly, naming the nearest that they can."""
    if global_batch % world_size:
        nearest = max(world_size, round(global_batch / world_size) * world_size)
        raise ConfigError(
            f"parallel.global_batch={global_batch} cannot be shared by {world_size} processes.",
            f"The nearest that can is parallel.global_batch={nearest}.",
        )

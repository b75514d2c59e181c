"""ZeRO: DeepSpeed distributes moments (stage 1), gradients (2) and parameters (3) over the processes.

Accelerate starts DeepSpeed, and this module drives its engine. Gradients are exchanged at the engine's accumulation
boundary; the engine's step clips, checks for non-finite values, and updates. Every process keeps a part of each
parameter in f32, as slices of flat tensors; `parts` presents them one by one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch import Tensor, nn

from cfusion.config import ParallelConfig
from cfusion.errors import ConfigError, MissingExtraError
from cfusion.training.runtime import Part, Runtime, another_engine, connect, moments_of, waiting

_NEVER = 1 << 62

BUCKET = 1 << 25
"""Number of parameters exchanged at a time, or held complete under ZeRO-3: 128 MiB in f32."""


class ZeroRuntime(Runtime):
    """The processes of a run under DeepSpeed."""

    def __init__(self, accelerator: Accelerator, parallel: ParallelConfig) -> None:
        super().__init__(accelerator, parallel)
        self.sharded_forward = parallel.engine == "zero3"
        self._engine: Any = None
        self._blank: nn.Module | None = None

    @staticmethod
    @functools.cache  # Accelerate accepts only one plugin per process
    def accelerate(parallel: ParallelConfig, *, on_cpu: bool) -> Accelerator:
        """Create the Accelerator with DeepSpeed.

        Raises:
            MissingExtraError: DeepSpeed or transformers, which Accelerate's plugin imports, is not installed.
            ConfigError: ZeRO does not support the precision, or Accelerate ignored the plugin.
        """
        if parallel.precision in ("f64", "fp16"):
            raise ConfigError(
                f"parallel.precision={parallel.precision} needs parallel.engine=ddp.",
                f"Use f32 or bf16 with {parallel.engine}.",
            )
        if on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        # With this set, Accelerate ignores the plugin and runs DDP without accumulation.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        _import_deepspeed()
        _single_process_group()
        connect(parallel, on_cpu=on_cpu)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # where DeepSpeed prints the kernels it found
                accelerator = Accelerator(
                    cpu=False,
                    mixed_precision="no",
                    deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config(parallel, on_cpu=on_cpu)),
                    kwargs_handlers=[waiting(parallel, backend="gloo" if on_cpu else "nccl")],
                )
        except NotImplementedError as error:
            raise another_engine(parallel, "another stage already") from error
        finally:  # Accelerate sets it for itself; the next run of this process may have another engine
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            raise another_engine(parallel, accelerator.distributed_type.value)
        return accelerator

    def worlds(self) -> dict[str, int]:
        """Return the number of processes that each library sees."""
        import deepspeed.comm

        return super().worlds() | {"DeepSpeed": deepspeed.comm.get_world_size()}

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Pass model and optimizer to a DeepSpeed engine, which then owns the model's parameters."""
        self._blank = _without_values(model)
        wrapped, optimizer = super().prepare(model, optimizer)
        self._engine = wrapped
        if self._engine.zero_optimization_stage() != int(self.parallel.engine[-1]):
            raise ConfigError(f"DeepSpeed runs stage {self._engine.zero_optimization_stage()}.", topic="world")
        return wrapped, optimizer

    def release(self) -> None:
        """Remove the engine's hooks from the model and drop the engine."""
        if self._engine is not None:
            self._engine.destroy()
        self._engine = None
        super().release()

    @contextlib.contextmanager
    def accumulate(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Run one forward and backward pass of a step."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, and distribute it if the engine's stage requires that."""
        self._engine.backward(loss)

    def clip(self, model: nn.Module, clip_norm: float | None) -> Tensor | None:
        """Leave it to the engine's step, which knows the gradient's norm over all processes."""
        return None

    def advance(self, optimizer: torch.optim.Optimizer, *, lr: float, clip_norm: float | None, finite: bool) -> bool:
        """Clip the gradient, update the parameters, and return whether its norm is finite; else the engine skips it."""
        for group in optimizer.param_groups:
            group["lr"] = lr
        self._engine.optimizer.clip_grad = 0.0 if clip_norm is None else clip_norm
        self._engine.step()
        return finite and math.isfinite(self._engine.get_global_grad_norm())

    def parts(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Part]:
        """Return the slices of each parameter that this process keeps in f32, with moments; buffers are complete."""
        zero = self._engine.optimizer
        found = _slices_of_stage_3 if self.sharded_forward else _slices_of_stages_1_and_2
        parts = {name: Part(tensor.shape, 0, tensor, {}, writes=self.is_main) for name, tensor in model.named_buffers()}
        for name, parameter in model.named_parameters():
            shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
            flat, offset, start, count = found(zero, parameter)
            moments = {}
            for key, value in moments_of(zero.optimizer, flat).items():
                moments[key] = value if value.ndim == 0 else value[offset : offset + count]
            parts[name] = Part(shape, start, flat.detach()[offset : offset + count], moments, writes=True)
        return parts

    @torch.no_grad()
    def publish(self, model: nn.Module, parts: dict[str, Part]) -> None:
        """Make the model use the values in `parts`."""
        if not self.sharded_forward:
            self._engine.optimizer.update_lp_params()
            return
        # Otherwise parameters gathered for the last forward pass would be reused for the next one.
        self._engine.optimizer.parameter_offload.partition_all_parameters()
        for name, parameter in model.named_parameters():
            values = parts[name].values
            parameter.ds_tensor.data.view(-1)[: values.numel()].copy_(values)  # type: ignore[attr-defined]

    def assembled(self, parts: dict[str, Part], values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Assemble, on the CPU of every process, tensors that the processes hold in slices."""
        gathered = {}
        for name, part in parts.items():
            full = torch.zeros(part.shape.numel(), dtype=values[name].dtype, device=self.device)
            if part.writes:
                full[part.start : part.start + values[name].numel()] = values[name].flatten()
            torch.distributed.all_reduce(full)
            gathered[name] = full.view(part.shape).cpu()
        return gathered

    def bare(self, model: nn.Module, parts: dict[str, Part]) -> nn.Module:
        """Return a separate module with the model's parameters, gathered from all processes."""
        assert self._blank is not None
        module = copy.deepcopy(self._blank).to_empty(device="cpu")
        module.load_state_dict(self.assembled(parts, {name: part.values for name, part in parts.items()}))
        return module


def deepspeed_config(parallel: ParallelConfig, *, on_cpu: bool) -> dict[str, Any]:
    """Build DeepSpeed's configuration; the rest, such as the learning rate, is set before each step."""
    zero: dict[str, Any] = {"stage": int(parallel.engine[-1]), "overlap_comm": not on_cpu, "contiguous_gradients": True}
    # DeepSpeed's default buckets suit models of 10⁹ parameters: half of that is 2 GB on every process.
    zero["reduce_bucket_size"] = BUCKET
    if parallel.engine == "zero3":
        zero |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_max_live_parameters": BUCKET}
        # The optimizer updates a group of parameters at a time, with temporaries of its size.
        zero |= {"stage3_max_reuse_distance": BUCKET, "sub_group_size": BUCKET}
        # A parameter kept complete on every process would not see what `publish` writes to its slices.
        zero["stage3_param_persistence_threshold"] = 0
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Accelerate sets 1 if this is missing.
        "gradient_clipping": 0.0,
        "steps_per_print": _NEVER,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if parallel.precision == "bf16":
        # DeepSpeed disables an autocast that its configuration does not mention. Parameters, moments and sums of
        # gradients stay f32, since no module is listed whose gradients may be exchanged in bf16.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings


def _without_values(model: nn.Module) -> nn.Module:
    """Copy a module to the meta device without a second set of parameters in memory."""
    parameters = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    buffers = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, parameters | buffers)


def _import_deepspeed() -> None:
    for package in ("deepspeed", "transformers"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, "deepspeed", "parallel.engine=zero1, zero2 or zero3") from error
    # It prints its search for compilers and kernels to standard output, and calls functions that torch has renamed.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # On CPUs it would compile an extension for reductions in shared memory at the first start. A start that is killed
    # meanwhile leaves a lock in the user's cache for which every later start, on every node, waits without end. Gloo
    # does these reductions.
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _single_process_group() -> None:
    """Create a process group of one if no launcher did, since DeepSpeed always needs one."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _slices_of_stages_1_and_2(zero: Any, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
    """Return the flat tensor, the offset in it, the first element of the parameter, and the number of elements."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return zero.single_partition_of_fp32_groups[0], 0, 0, 0
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return flat, mapping.hp_fragment_address.start, mapping.lp_fragment_address.start, mapping.hp_fragment_address.numel


def _slices_of_stage_3(zero: Any, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
    """Do the same for stage 3: each parameter is cut into equal parts by rank, and the last part is padded."""
    group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
    start = min(length * torch.distributed.get_rank(), parameter.ds_numel)  # type: ignore[attr-defined]
    count = min(length, parameter.ds_numel - start)  # type: ignore[attr-defined]
    return zero.fp32_partitioned_groups_flat[group], offset, start, count

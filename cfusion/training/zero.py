"""ZeRO: DeepSpeed spreads moments (stage 1), gradients (2) and parameters (3) over the processes.

Accelerate starts it, this module drives its engine: gradients are exchanged by the engine's own accumulation boundary,
and its step clips, checks for values that are not finite, and moves. Every process keeps a part of each parameter in
f32, as slices of flat tensors; `parts` shows them one by one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from cfusion.config import ParallelConfig
from cfusion.errors import ConfigError, MissingExtraError
from cfusion.training.runtime import TIMEOUT, Part, Runtime, another_engine, moments_of

_NEVER = 1 << 62

BUCKET = 1 << 25
"""Parameters that are exchanged, or under ZeRO-3 held whole, at a time: 128 MiB in f32."""


class ZeroRuntime(Runtime):
    """The processes of a run under DeepSpeed."""

    def __init__(self, accelerator: Accelerator, parallel: ParallelConfig) -> None:
        super().__init__(accelerator, parallel)
        self.sharded_forward = parallel.engine == "zero3"
        self._engine: Any = None
        self._blank: nn.Module | None = None

    @staticmethod
    @functools.cache  # Accelerate takes a plugin once in the life of a process
    def accelerate(parallel: ParallelConfig, *, on_cpu: bool) -> Accelerator:
        """Accelerate with DeepSpeed below it.

        Raises:
            MissingExtraError: DeepSpeed or transformers, which Accelerate's plugin imports, is not installed.
            ConfigError: ZeRO has no such precision, or Accelerate passed over the plugin.
        """
        if parallel.precision in ("f64", "fp16"):
            raise ConfigError(
                f"parallel.precision={parallel.precision} goes with parallel.engine=ddp alone.",
                f"Use f32 or bf16 with {parallel.engine}.",
            )
        if on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        # With this set, Accelerate passes over the plugin and runs DDP without accumulation.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        _import_deepspeed()
        _alone()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # where DeepSpeed prints what it compiles
                accelerator = Accelerator(
                    cpu=False,
                    mixed_precision="no",
                    deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config(parallel, on_cpu=on_cpu)),
                    kwargs_handlers=[InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=TIMEOUT)],
                )
        except NotImplementedError as error:
            raise another_engine(parallel, "another stage already") from error
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            raise another_engine(parallel, accelerator.distributed_type.value)
        return accelerator

    def worlds(self) -> dict[str, int]:
        """Number of processes as each library sees it."""
        import deepspeed.comm

        return super().worlds() | {"DeepSpeed": deepspeed.comm.get_world_size()}

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Hand model and optimizer to a DeepSpeed engine; the model's own parameters are then the engine's."""
        self._blank = _without_values(model)
        wrapped, optimizer = super().prepare(model, optimizer)
        self._engine = wrapped
        if self._engine.zero_optimization_stage() != int(self.parallel.engine[-1]):
            raise ConfigError(f"DeepSpeed runs stage {self._engine.zero_optimization_stage()}.", topic="world")
        return wrapped, optimizer

    def release(self) -> None:
        """Take the engine's hooks off the model and drop it."""
        if self._engine is not None:
            self._engine.destroy()
        self._engine = None
        super().release()

    @contextlib.contextmanager
    def accumulate(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """One forward and backward of a step."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing: the engine computes in the precision that its configuration names."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, and share it out where the engine's stage wants that."""
        self._engine.backward(loss)

    def advance(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, lr: float, clip_norm: float | None
    ) -> float:
        """Clip the gradient, move the parameters, and return the norm; the engine skips a step that is not finite."""
        for group in optimizer.param_groups:
            group["lr"] = lr
        self._engine.optimizer.clip_grad = 0.0 if clip_norm is None else clip_norm
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def parts(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Part]:
        """The slices of each parameter that this process keeps in f32, with their moments; buffers whole."""
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
        """Have the model compute with what is in `parts`."""
        if not self.sharded_forward:
            self._engine.optimizer.update_lp_params()
            return
        # Parameters that were gathered for the last forward pass would be taken for the next one too.
        self._engine.optimizer.parameter_offload.partition_all_parameters()
        for name, parameter in model.named_parameters():
            values = parts[name].values
            parameter.ds_tensor.data.view(-1)[: values.numel()].copy_(values)  # type: ignore[attr-defined]

    def whole(self, parts: dict[str, Part], values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put together on the CPU of every process what the processes hold in slices."""
        gathered = {}
        for name, part in parts.items():
            full = torch.zeros(part.shape.numel(), dtype=values[name].dtype, device=self.device)
            if part.writes:
                full[part.start : part.start + values[name].numel()] = values[name].flatten()
            torch.distributed.all_reduce(full)
            gathered[name] = full.view(part.shape).cpu()
        return gathered

    def bare(self, model: nn.Module, parts: dict[str, Part]) -> nn.Module:
        """A module of its own with the model's parameters, which are gathered from all processes."""
        assert self._blank is not None
        module = copy.deepcopy(self._blank).to_empty(device="cpu")
        module.load_state_dict(self.whole(parts, {name: part.values for name, part in parts.items()}))
        return module


def deepspeed_config(parallel: ParallelConfig, *, on_cpu: bool) -> dict[str, Any]:
    """What DeepSpeed is told; what is not here and matters, such as the learning rate, is set before each step."""
    zero: dict[str, Any] = {"stage": int(parallel.engine[-1]), "overlap_comm": not on_cpu, "contiguous_gradients": True}
    # DeepSpeed's own buckets are made for models of 10⁹ parameters: half of that is 2 GB on every process.
    zero["reduce_bucket_size"] = BUCKET
    if parallel.engine == "zero3":
        zero |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_max_live_parameters": BUCKET}
        # The optimizer moves a group of parameters at a time, with temporaries of its size.
        zero |= {"stage3_max_reuse_distance": BUCKET, "sub_group_size": BUCKET}
        # One that stays whole on every process would not see what `publish` writes to its slices.
        zero["stage3_param_persistence_threshold"] = 0
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Accelerate fills in 1 where nothing stands here.
        "gradient_clipping": 0.0,
        "steps_per_print": _NEVER,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if parallel.precision == "bf16":
        # DeepSpeed turns autocast off that it was not told of. Parameters, moments and, as no module is named whose
        # gradients may be exchanged in bf16, sums of gradients stay f32.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of a module on the meta device, made without a second set of parameters in memory."""
    parameters = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    buffers = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, parameters | buffers)


def _import_deepspeed() -> None:
    for package in ("deepspeed", "transformers"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, "deepspeed", "parallel.engine=zero1, zero2 or zero3") from error
    # It writes to standard output what it found of compilers and kernels, and calls what torch has renamed.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _alone() -> None:
    """DeepSpeed wants a process group even for one process; make a world of one where no launcher did."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _slices_of_stages_1_and_2(zero: Any, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
    """Flat tensor, offset in it, first element of the parameter, number of elements."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return zero.single_partition_of_fp32_groups[0], 0, 0, 0
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return flat, mapping.hp_fragment_address.start, mapping.lp_fragment_address.start, mapping.hp_fragment_address.numel


def _slices_of_stage_3(zero: Any, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
    """As above; each parameter is cut into equal parts by rank, the last of them padded."""
    group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
    start = min(length * torch.distributed.get_rank(), parameter.ds_numel)  # type: ignore[attr-defined]
    count = min(length, parameter.ds_numel - start)  # type: ignore[attr-defined]
    return zero.fp32_partitioned_groups_flat[group], offset, start, count

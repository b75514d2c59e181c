"""What the figures depend on: versions, device, arithmetic, and the speed of a large matrix product."""

from __future__ import annotations

import platform

import accelerate
import torch

from benchmarks.gpu.bench import Bench
from cfusion.config import ParallelConfig
from cfusion.machine_limits import memory_bytes, usable_cores
from cfusion.training.world import join_world


def measure(bench: Bench) -> None:
    """Tell the versions, the device and the settings that the program chooses."""
    join_world(ParallelConfig())
    bench.tell(
        "Python, torch, accelerate", f"{platform.python_version()}, {torch.__version__}, {accelerate.__version__}"
    )
    bench.tell("cores that this process may use", float(usable_cores()))
    bench.tell("memory that this process may use", memory_bytes() / 1e9, "GB")
    bench.tell("device", bench.device_name)
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        bench.tell("memory of the GPU", properties.total_memory / 1e9, "GB")
        bench.tell("GPUs", float(torch.cuda.device_count()))
        bench.tell("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
        bench.tell("bf16 arithmetic", str(torch.cuda.is_bf16_supported(including_emulation=False)))
    bench.tell("TF32 for products, for convolutions", str(_tf32()))
    bench.tell("attention by cuDNN", str(torch.backends.cuda.cudnn_sdp_enabled()) if bench.on_gpu else "no GPU")
    dtype = "bf16, 8192³" if bench.on_gpu else "f32, 2048³"
    bench.tell(f"matrix product, {dtype}", bench.peak / 1e12, "TFLOP/s", note="the peak for every share of it below")


def _tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

"""Measure the load of the machine as MLflow system metrics, and record its environment."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil

from cfusion.files import write_json, write_text
from cfusion.machine_limits import memory_bytes, usable_cores

_LAUNCH = (
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "OMP_NUM_THREADS",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "CUDA_VISIBLE_DEVICES",
)


class Machine:
    """Samples CPU, memory and GPU load; CPU load is averaged since the previous sample."""

    def __init__(self) -> None:
        psutil.cpu_percent()
        self._process = psutil.Process()

    def sample(self) -> dict[str, float]:
        """Return metrics under the names of MLflow's system metrics, which its pages show in a separate tab."""
        memory = psutil.virtual_memory()
        return {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": round(memory.used / 1e6, 1),
            "system/system_memory_usage_percentage": memory.percent,
            "system/process_memory_usage_megabytes": round(self._process.memory_info().rss / 1e6, 1),
            **_gpus(),
        }


def _gpus() -> dict[str, float]:
    metrics: dict[str, float] = {}
    torch = sys.modules.get("torch")  # the process that sends records imports this module and needs no torch
    if torch is None or not torch.cuda.is_initialized():
        return metrics
    i = torch.cuda.current_device()  # asking another GPU for its memory would occupy hundreds of MB on it
    try:
        free, total = torch.cuda.mem_get_info(i)
        metrics[f"system/gpu_{i}_memory_usage_megabytes"] = round((total - free) / 1e6, 1)
        metrics[f"system/gpu_{i}_memory_usage_percentage"] = round(100 * (1 - free / total), 1)
        metrics[f"system/gpu_{i}_utilization_percentage"] = float(torch.cuda.utilization(i))
    except _refusals():
        pass  # The samples are an extra: no driver that refuses one may end a run.
    return metrics


def _refusals() -> tuple[type[Exception], ...]:
    """Errors of torch, of a driver, and of NVML, whose package torch imports to ask for the utilization."""
    nvml = getattr(sys.modules.get("pynvml"), "NVMLError", None)
    return (ModuleNotFoundError, RuntimeError, OSError, *([nvml] if nvml else []))


def write_environment(folder: Path) -> Path:
    """Write `requirements.txt` (every installed package, pinned) and `environment.json` to `folder`; return it."""
    # Each access to a distribution's metadata parses its file.
    found = (distribution.metadata for distribution in importlib.metadata.distributions())
    packages = sorted({f"{metadata['Name']}=={metadata['Version']}" for metadata in found}, key=str.lower)
    write_text(folder / "requirements.txt", "\n".join(packages) + "\n")
    write_json(folder / "environment.json", _environment())
    return folder


def _environment() -> dict[str, Any]:
    import torch

    from cfusion.gpu_settings import meaning_of_f32

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "f32": meaning_of_f32(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "launch": {name: os.environ[name] for name in _LAUNCH if name in os.environ},
    }

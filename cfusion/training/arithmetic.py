"""Sets, for the process, which of its alternative algorithms torch may take; the numbers of a run depend on them."""

from __future__ import annotations

import os
from typing import Literal

import torch

from cfusion.gpu_settings import set_tf32


def set_arithmetic(*, on_cpu: bool, deterministic: Literal["auto"] | bool) -> None:
    """Choose torch's algorithms for a device, whatever the environment or another library has chosen before.

    On a GPU, f32 means IEEE single precision for products and for convolutions, which torch treats differently by
    default; TF32 is off for both. Attention never goes to cuDNN: it makes a plan for every bag length, which takes tens
    of milliseconds, and keeps each plan.

    Args:
        on_cpu: Whether the process computes on a CPU.
        deterministic: Whether the same run gives the same bits again; auto: on a CPU.
    """
    chosen = on_cpu if deterministic == "auto" else deterministic
    # Without it, several threads sum the gradient of an indexed tensor in an arbitrary order.
    # `use_deterministic_algorithms` does the same and also imports torch's compiler, which takes seconds.
    torch.set_deterministic_debug_mode("error" if chosen else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if on_cpu:
        return
    if chosen:
        # Read when cuBLAS makes its first workspace; without it, torch refuses products in this mode.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    set_tf32(False)
    torch.backends.cudnn.benchmark = False  # it would measure again for every bag length
    torch.backends.cudnn.deterministic = chosen
    torch.backends.cuda.enable_cudnn_sdp(False)

"""Settings of torch that hold for a process on a GPU, whatever the environment or another library has chosen before."""

from __future__ import annotations

import os

import torch

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def set_tf32(allowed: bool) -> None:
    """Choose whether f32 products and convolutions may round their inputs to TF32; torch treats the two differently."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def meaning_of_f32() -> str:
    """Return what f32 means for products and convolutions of this process."""
    if not torch.cuda.is_available():
        return "single precision"
    rounded = {"products": torch.backends.cuda.matmul.allow_tf32, "convolutions": torch.backends.cudnn.allow_tf32}
    tf32 = " and ".join(name for name, allowed in rounded.items() if allowed)
    return f"TF32 for {tf32}" if tf32 else "single precision"


def let_segments_grow() -> None:
    """Let the allocator extend its blocks: bags of many lengths then leave fewer gaps. The user's own settings win."""
    if any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        return
    choose = getattr(torch.cuda.memory, "_set_allocator_settings", None)
    if choose is not None:
        choose("expandable_segments:True")

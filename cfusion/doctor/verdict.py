"""What a machine is ready for, from its checks, and what is missing for the rest."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence

from cfusion.doctor.checks import Check

_TRAINING = ("torch", "collectives", "mlflow", "memory", "disk", "network", "launcher")
USES: Mapping[str, tuple[str, ...]] = {
    "CPU training": _TRAINING,
    "GPU training": (*_TRAINING, "gpu"),
    "training with ZeRO": (*_TRAINING, "deepspeed"),
    "extraction": ("torch", "openslide", "memory", "disk"),
    "jobs on SLURM": ("slurm",),
}
"""What people do with the program, and the checks that it needs."""

_HOW_TO_GET = {
    "gpu": "a driver and a build of torch for CUDA",
    "deepspeed": "pip install 'cfusion[deepspeed]'",
    "openslide": "pip install openslide-bin",
    "slurm": "run it on a node that submits jobs",
}


def verdict(checks: Sequence[Check]) -> dict[str, list[str]]:
    """Return for each use what is missing, as `check: detail (how to get it)`; an empty list if it is ready."""
    failed = {check.name: check for check in checks if not check.passed}
    missing = {}
    for use, needed in USES.items():
        names = [name for name in needed if name in failed]
        missing[use] = [f"{name}: {failed[name].detail}{_how(name)}" for name in names]
    return missing


def describe_verdict(missing: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the verdict as lines: what the machine is ready for, then what the rest lacks."""
    ready = [_named(use) for use, causes in missing.items() if not causes]
    yield f"ready for {', '.join(ready)}" if ready else "ready for nothing yet"
    for use, causes in missing.items():
        if causes:
            yield f"not for {use}: {'; '.join(causes)}"


def _named(use: str) -> str:
    if use != "extraction":
        return use
    has_networks = importlib.util.find_spec("timm") is not None
    return (
        "extraction with every encoder"
        if has_networks
        else ("extraction with stain-texture (for networks: pip install 'cfusion[encoders]')")
    )


def _how(name: str) -> str:
    return f" ({_HOW_TO_GET[name]})" if name in _HOW_TO_GET else ""

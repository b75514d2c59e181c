"""Checks of one machine: each says in a line what was found and, where it failed, what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: What was looked at.
        passed: Whether it is as a run needs it.
        told: What was found, or what to do.
        required: Whether a run cannot do without it.
    """

    name: str
    passed: bool
    told: str
    required: bool = True


def check_node() -> list[Check]:
    """All checks of this machine; a check that raises has failed, with its error as what it tells."""
    return [_attempt(*item) for item in CHECKS]


def _attempt(name: str, required: bool, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check(), required)
    except Exception as error:  # noqa: BLE001 - whatever a library raises is the finding
        return Check(name, False, " ".join(str(error).split())[:160] or type(error).__name__, required)


def _torch() -> str:
    import torch

    product = torch.ones(8, 8) @ torch.ones(8, 8)
    assert product[0, 0] == 8
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("no GPU is visible; runs use the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def _openslide() -> str:
    importlib.import_module("preprocess.slides")
    return f"library {importlib.metadata.version('openslide-bin')}, {importlib.metadata.version('openslide-python')}"


def _mlflow() -> str:
    from cfusion.config import TrackingConfig
    from cfusion.tracking import TrackedRun
    from cfusion.tracking.delivery import send
    from cfusion.tracking.server import tracking_uri

    with tempfile.TemporaryDirectory() as folder:
        tracking, output = TrackingConfig(experiment="doctor"), Path(folder) / "run"
        TrackedRun.begin(tracking, output, "doctor", {}).close()
        send(output, tracking_uri(tracking, output))
    return f"{importlib.metadata.version('mlflow')}, a run was recorded"


def _memory() -> str:
    import psutil

    free = psutil.virtual_memory().available / GIB
    if free < 2:
        raise RuntimeError(f"{free:.1f} GiB free; a run needs 2")
    return f"{free:.1f} GiB free, {os.cpu_count()} cores"


def _disk() -> str:
    free = shutil.disk_usage(".").free / GIB
    if free < 5:
        raise RuntimeError(f"{free:.1f} GiB free here; the demo needs 2, a cohort of features 5 and more")
    return f"{free:.1f} GiB free here"


def _deepspeed() -> str:
    return importlib.metadata.version("deepspeed")


CHECKS: tuple[tuple[str, bool, Callable[[], str]], ...] = (
    ("torch", True, _torch),
    ("gpu", False, _gpu),
    ("openslide", True, _openslide),
    ("mlflow", True, _mlflow),
    ("memory", True, _memory),
    ("disk", True, _disk),
    ("deepspeed", False, _deepspeed),
)
"""Name, whether a run cannot do without it, and the check."""

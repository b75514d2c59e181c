"""Checks of one machine; each reports in one line what it found and, if it failed, what to do."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

from cfusion.child_processes import python_command
from cfusion.locks import missing_flock
from cfusion.machine_limits import free_memory_bytes, usable_cores

GIB = 1 << 30

WRITTEN_MIB = 64

MOST_SECONDS_APART = 2.0
"""Larger differences between clocks make timestamps of runs and files useless."""


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: What was checked.
        passed: Whether it meets what a run needs.
        detail: What was found, or what to do.
        required: Whether every run needs it.
    """

    name: str
    passed: bool
    detail: str
    required: bool = True


def check_node() -> list[Check]:
    """Run all checks of this machine. A check that raises has failed; its error becomes the detail."""
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


def _collectives() -> str:
    from torch import cuda, distributed

    if not distributed.is_gloo_available():
        raise RuntimeError("this torch has no gloo; runs of several processes need it")
    nccl = f"NCCL {'.'.join(map(str, cuda.nccl.version()))}" if distributed.is_nccl_available() else "no NCCL"
    if cuda.is_available() and not distributed.is_nccl_available():
        raise RuntimeError("there is a GPU, but this torch has no NCCL")
    return f"gloo, {nccl}"


def _openslide() -> str:
    from preprocess.slides import open_slide

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.tiff"
        picture = np.full((256, 256, 3), (180, 90, 140), np.uint8)
        # A centimetre of 40,000 px is 0.25 µm/px.
        tifffile.imwrite(path, picture, tile=(128, 128), resolution=(40_000, 40_000), resolutionunit="CENTIMETER")
        slide = open_slide(path)
        read = slide.read_rgba(64, 64, 64, 64)[..., :3]
        slide.close()
    if (read != picture[:64, :64]).any():
        raise RuntimeError("a generated slide was read back with other pixels")
    return f"library {importlib.metadata.version('openslide-bin')}, a generated slide was read back"


def _mlflow() -> str:
    from cfusion.config import TrackingConfig
    from cfusion.tracking import TrackedRun
    from cfusion.tracking.address import tracking_uri
    from cfusion.tracking.delivery import send

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        tracking = TrackingConfig(experiment="doctor", uri=f"sqlite:///{folder}/mlflow.db")
        TrackedRun.begin(tracking, output, "doctor", {}).close()
        send(output, tracking_uri(tracking, output))
    return f"{importlib.metadata.version('mlflow')}, a run was recorded"


def _mlflow_server() -> str:
    from cfusion.secret_text import without_secrets
    from cfusion.tracking.address import checked_uri, connect, unavailable

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise RuntimeError("MLFLOW_TRACKING_URI is not set; runs are tracked in sqlite files next to them")
    started = time.monotonic()
    with unavailable(checked_uri(uri)):
        connect(uri).search_experiments(max_results=1)
    return f"{without_secrets(uri)} answered in {time.monotonic() - started:.2f} s"


def _memory() -> str:
    free = free_memory_bytes() / GIB
    if free < 2:
        raise RuntimeError(f"{free:.1f} GiB free; a run needs 2")
    return f"{free:.1f} GiB free, {usable_cores()} cores"


def _disk() -> str:
    free = shutil.disk_usage(".").free / GIB
    if free < 5:
        raise RuntimeError(f"{free:.1f} GiB free here; the demo needs 2, a cohort of features 5 and more")
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=".") as stream:
        started = time.monotonic()
        for _ in range(WRITTEN_MIB):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
        rate = WRITTEN_MIB / (time.monotonic() - started)
    return f"{free:.1f} GiB free here, {rate:.0f} MiB/s written"


def _clock() -> str:
    with tempfile.NamedTemporaryFile(dir=".") as stream:
        before = time.time()
        stream.write(b"x")
        stream.flush()
        stamped = Path(stream.name).stat().st_mtime
    apart = max(before - stamped, stamped - time.time(), 0.0)
    if apart > MOST_SECONDS_APART:
        raise RuntimeError(f"{apart:.0f} s from the clock of the disk here; check NTP on both")
    return f"within {max(apart, 0.1):.1f} s of the clock of the disk here"


def _locks() -> str:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        cause = missing_flock(Path(folder) / "lock")
    if cause is not None:
        raise RuntimeError(
            f"no flock on the file system here ({cause}); a file ending in .held stands for a lock, and one of another "
            "host stays after a crash. Mount it with flock (Lustre: -o flock)"
        )
    return "flock works on the file system here"


def _deepspeed() -> str:
    # A separate process, because the import takes over logging and chooses a device for good.
    code = (
        "import transformers, deepspeed; from deepspeed.accelerator import get_accelerator as found;"
        "print('', deepspeed.__version__, found().device_name(), found().communication_backend_name())"
    )
    done = subprocess.run([*python_command(), "-c", code], capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        raise RuntimeError(f"cannot be imported: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    version, device, backend = done.stdout.split()[-3:]
    return f"{version}, on {device} with {backend}"


def _slurm() -> str:
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not on the PATH; cfusion launch slurm needs a login node")
    done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()


def _network() -> str:
    from cfusion.training.connection import check_network, check_port

    found = check_network()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # in a world, the processes have opened it
        check_port()
    return found


def _launcher() -> str:
    from cfusion.training.world import launched

    started = launched()
    return f"started {started} process{'' if started == 1 else 'es'}"


CHECKS: tuple[tuple[str, bool, Callable[[], str]], ...] = (
    ("torch", True, _torch),
    ("gpu", False, _gpu),
    ("collectives", True, _collectives),
    ("deepspeed", False, _deepspeed),
    ("openslide", True, _openslide),
    ("mlflow", True, _mlflow),
    ("mlflow server", False, _mlflow_server),
    ("memory", True, _memory),
    ("disk", True, _disk),
    ("clock", False, _clock),
    ("locks", False, _locks),
    ("slurm", False, _slurm),
    ("network", True, _network),
    ("launcher", True, _launcher),
)
"""Name, whether every run needs it, and the check."""

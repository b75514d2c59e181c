"""DistributedDataParallel with its reducer, and ZeRO 1 to 3, against one process without either.

Each runs in a separate process; DDP and ZeRO under torchrun, in a world of one: NCCL on a GPU, gloo on a CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast, get_args
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.bench import Bench, Limit
from benchmarks.gpu.steps import network, share
from benchmarks.gpu.timing import seconds_per_call
from cfusion.child_processes import python_path
from cfusion.config import ParallelConfig, TrainConfig
from cfusion.survival.losses import LOSSES
from cfusion.training.optimizers import make_optimizer
from cfusion.training.runtime import Runtime
from cfusion.training.step import Share, Stepper
from cfusion.training.world import join_world

Engine = Literal["plain", "ddp", "zero1", "zero2", "zero3"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
STEPS = 4
SECONDS = 60.0
"""Time after which a process that is stuck is ended."""


@contextmanager
def wrapped_in_a_world_of_one() -> Iterator[None]:
    """Let Accelerate wrap a model in DistributedDataParallel also for a single process, to exercise its reducer."""
    distributed = property(lambda state: state.distributed_type != DistributedType.NO)
    with mock.patch.object(PartialState, "use_distributed", distributed):
        yield


def measure(bench: Bench) -> None:
    """Run the engines in turn; what DDP and ZeRO train must be what a plain process trains."""
    found: dict[Engine, dict[str, list[float]]] = {}
    for engine in ENGINES:
        if engine.startswith("zero"):
            missing = [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]
            if missing:
                bench.skip(engine, f"{missing[0]} is not installed")
                continue
        if bench.left < 0:
            bench.skip(engine, "no time left in this part")
            continue
        outcome = _start(bench, engine)
        if isinstance(outcome, str):
            bench.skip(engine, f"failed: {outcome}")
            bench.failed.append(engine)
            continue
        found[engine] = outcome
        _tell(bench, engine, found)


def _tell(bench: Bench, engine: Engine, found: dict[Engine, dict[str, list[float]]]) -> None:
    ours = found[engine]
    bench.tell(f"{engine}: a step of two bags", 1e3 * ours["seconds"][0], "ms")
    if bench.on_gpu:
        bench.tell(f"{engine}: peak memory", ours["memory"][0], "GB")
    if "gradient" in ours:
        bench.tell(f"{engine}: gradient through the reducer, relative difference", ours["gradient"][0], "", Limit(1e-3))
    if engine != "plain" and "plain" in found:
        pairs = zip(ours["losses"], found["plain"]["losses"], strict=True)
        worst = max(abs(a - b) / abs(b) for a, b in pairs)
        bench.tell(f"{engine}: loss over {STEPS} steps, largest relative difference to plain", worst, "", Limit(1e-3))


def _start(bench: Bench, engine: Engine) -> dict[str, list[float]] | str:
    """Run an engine in its process; return what it measured, or the end of what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        command = [
            sys.executable, *([] if engine == "plain" else torchrun), "-m", "benchmarks.gpu", "--child", engine,
            "--json", str(out), *(["--quick"] if bench.quick else []),
        ]  # fmt: skip
        root = Path(__file__).parents[2]
        try:
            subprocess.run(
                command, check=True, cwd=root, capture_output=True, text=True, timeout=SECONDS + max(0.0, bench.left),
                env={**os.environ, "PYTHONPATH": python_path()},
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            return _cause(error.stderr)
        except subprocess.TimeoutExpired:
            return "no result in time"
        return cast(dict[str, list[float]], json.loads(out.read_text(encoding="utf-8")))


def _cause(text: str) -> str:
    """Return the error of the process from what it and torchrun wrote: torchrun's own comes after it."""
    lines = [re.sub(r"^\[\w+\]:", "", line) for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    own = [line for line in errors if "ChildFailedError" not in line]
    return next(iter(reversed(own)), lines[-1] if lines else "no output")[:400]


def child(bench: Bench, engine: str) -> dict[str, list[float]]:
    """In the engine's process: train a few steps of two bags, each in a separate forward pass."""
    kind = "ddp" if engine == "plain" else engine
    parallel = ParallelConfig.model_validate(
        {"engine": kind, "precision": "bf16" if bench.on_gpu else "f32", "global_batch": 2}
    )
    runtime = join_world(parallel)
    shares = [share(bench, tiles) for tiles in ((32, 48) if bench.quick else (2048, 12_288))]
    measured: dict[str, list[float]] = {}
    if engine == "ddp":
        with wrapped_in_a_world_of_one():
            measured["gradient"] = [reducer_difference(bench, runtime, shares)]
            steps = _stepper(bench, runtime)
    else:
        steps = _stepper(bench, runtime)
    step = functools.partial(steps.step, shares, cases=2, lr=1e-4)
    measured["losses"] = [step().loss for _ in range(STEPS)]
    measured["seconds"] = [seconds_per_call(step, 0.5 if bench.quick else 3.0)]
    if bench.on_gpu:
        measured["memory"] = [torch.cuda.max_memory_allocated() / 1e9]
    return measured


def _stepper(bench: Bench, runtime: Runtime) -> Stepper:
    module = network(bench, dropout=0.0)
    model, optimizer = runtime.prepare(module, make_optimizer(module, TrainConfig()))
    model.train()
    return Stepper(runtime, model, optimizer, LOSSES["nll"], 0.0, 1.0)


def reducer_difference(bench: Bench, runtime: Runtime, shares: list[Share]) -> float:
    """Relative difference between the gradients of a wrapped and of a bare model over the same shares.

    Raises:
        RuntimeError: The model was not wrapped, so that there is no reducer.
    """
    gradients = []
    for wrapped in (True, False):
        module = network(bench, dropout=0.0).to(bench.device)
        model = runtime.prepare(module, make_optimizer(module, TrainConfig()))[0] if wrapped else module
        if isinstance(model, DistributedDataParallel) != wrapped:
            raise RuntimeError(f"the model is a {type(model).__name__}; expected wrapped: {wrapped}")
        model.train()
        if wrapped:
            Stepper(runtime, model, torch.optim.SGD(module.parameters()), LOSSES["nll"], 0.0, None).accumulate(
                shares, cases=2
            )
        else:
            for one in shares:
                with runtime.autocast():
                    output = model(one.batch)
                (LOSSES["nll"](output, one.targets, alpha=0.0).sum() / 2).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
        runtime.release()
    through, plain = gradients
    return float((through - plain).norm() / plain.norm())

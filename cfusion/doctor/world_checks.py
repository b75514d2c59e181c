"""Checks of several processes: how many each library sees, their latency and bandwidth, their clocks."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable

import torch

from cfusion.config import ParallelConfig
from cfusion.doctor.checks import MOST_SECONDS_APART, Check, check_node
from cfusion.training.runtime import Runtime
from cfusion.training.world import join_world, launched

SIZES_BYTES = (1 << 16, 1 << 22, 1 << 26)
"""Gradients of one layer, of gated attention (1M parameters in f32), and most of those of CrossFusion (23M)."""

ROUNDS = 7


def check_world() -> list[Check]:
    """Check the processes that a launcher started; every process calls this and gets the same list.

    One process of each node also checks its node. The list has all checks of the first node, and the failed required
    checks of the other nodes.

    Raises:
        ConfigError: Accelerate or torch.distributed sees other processes than the launcher started.
    """
    runtime = join_world(ParallelConfig(precision="f32", global_batch=launched()))
    try:
        return _checks(runtime)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _checks(runtime: Runtime) -> list[Check]:
    leads = os.environ.get("LOCAL_RANK", "0") == "0"
    everywhere = runtime.gather([(platform.node(), check_node() if leads else [])])
    nodes = [(name, checks) for name, checks in everywhere if checks]
    checked = list(nodes[0][1])
    for name, checks in nodes[1:]:
        failed = [check for check in checks if check.required and not check.passed]
        checked += [Check(f"{name} {check.name}", False, check.detail) for check in failed]
    bandwidths = [_bandwidth(runtime, size) for size in SIZES_BYTES]
    return [*checked, _world(runtime, [name for name, _ in nodes]), _latency(runtime), *bandwidths, _clocks(runtime)]


def seconds(runtime: Runtime, work: Callable[[], object]) -> float:
    """Return the median over `ROUNDS` of the time that the slowest process takes for a collective."""
    work()
    times = []
    for _ in range(ROUNDS):
        runtime.barrier()
        started = time.perf_counter()
        work()
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(max(together) for together in zip(*runtime.gather([times]), strict=True))


def bus_bandwidth(world_size: int, size: int, taken: float) -> float:
    """Return bytes per second that an all-reduce moved over each link: 2(n − 1)/n of its size, as in NCCL's tests."""
    return 2 * (world_size - 1) / world_size * size / taken


def _world(runtime: Runtime, nodes: list[str]) -> Check:
    seen = ", ".join(f"{who} sees {count}" for who, count in runtime.worlds().items())
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else "no backend"
    where = f"{len(nodes)} nodes" if len(nodes) > 1 else nodes[0]
    return Check("world", True, f"{runtime.world_size} processes on {where}, {backend}: {seen}")


def _latency(runtime: Runtime) -> Check:
    taken = _all_reduce(runtime, 4)
    return Check("latency", True, f"all-reduce of 4 bytes in {taken * 1e6:.0f} µs")


def _bandwidth(runtime: Runtime, size: int) -> Check:
    taken = _all_reduce(runtime, size)
    rate = bus_bandwidth(runtime.world_size, size, taken) / 1e9
    return Check("bandwidth", True, f"all-reduce of {size / (1 << 20):g} MiB in {taken * 1e3:.2f} ms, {rate:.2f} GB/s")


def _all_reduce(runtime: Runtime, size: int) -> float:
    tensor = torch.ones(size // 4, device=runtime.device)
    if runtime.world_size == 1:
        return seconds(runtime, tensor.clone)
    taken = seconds(runtime, lambda: torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.AVG))
    if not torch.allclose(tensor, torch.ones_like(tensor)):
        raise RuntimeError(f"an all-reduce of {size} bytes gave a wrong mean")
    return taken


def _clocks(runtime: Runtime) -> Check:
    """Compare clocks that are read as processes leave a barrier, so the difference is accurate to about the latency."""
    read = []
    for _ in range(ROUNDS):
        runtime.barrier()
        read.append(time.time())
    clocks = runtime.gather([read])
    offsets = [statistics.median(b - a for a, b in zip(clocks[0], other, strict=True)) for other in clocks]
    apart = max(offsets) - min(offsets)
    return Check("clocks", apart <= MOST_SECONDS_APART, f"{apart * 1e3:.1f} ms apart at most", required=False)

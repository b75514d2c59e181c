"""Start gloo workers: the same function in several processes, as torchrun would start it."""

from __future__ import annotations

import gc
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cfusion.child_processes import forked_context


def free_port() -> int:
    """A loopback port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_world(
    world_size: int, function: Callable[..., Any], folder: Path, *arguments: Any, timeout: float = 180
) -> None:
    """Call `function(*arguments)` in `world_size` processes that find each other; raise if one of them fails.

    The function writes what the test wants to see below `folder`. Processes are forked from a server that has imported
    the program and started no thread: importing it takes longer than most of the functions called here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = forked_context()
    port = free_port()
    workers = [
        context.Process(target=_worker, args=(rank, world_size, port, function, folder, arguments))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(timeout)
    finally:
        alive = [worker for worker in workers if worker.is_alive()]
        for worker in alive:
            worker.kill()
            worker.join()
    errors = [path.read_text() for path in sorted(folder.glob("error_*.txt"))]
    assert not errors, "\n".join(errors)
    assert not alive, f"{len(alive)} of {world_size} processes did not end in {timeout} s"
    assert all(worker.exitcode == 0 for worker in workers), [worker.exitcode for worker in workers]


def _worker(
    rank: int, world_size: int, port: int, function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    gc.freeze()
    import torch

    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        (folder / f"error_{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

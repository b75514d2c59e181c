"""One training step of CrossFusion against its plain transcription: seconds and peak memory.

    python -m benchmarks.model_step [--quick] [--json FILE]
    python -m benchmarks.model_step --slide 100000
    python -m benchmarks.model_step --tiles 32 128 --channels 192 --width 128 --repeats 30    # small bags

Both sides run forward and backward on the same bag, each in separate processes that take turns, so that a busy
machine slows both; medians are shown. `theirs` has the published dropouts; `ours` has them (`published`) or
the default recipe, without dropout of attention weights. Arithmetic is f32, on CUDA bf16 under autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.arithmetic import operations
from benchmarks.published_model import PublishedCrossFusion
from benchmarks.table import Row, options, present
from cfusion.models import build_model

HEADS, BINS = 4, 4
SIDES = ("theirs", "default", "published")


@dataclass(frozen=True)
class Widths:
    """Channels of the embeddings and of the model."""

    channels: int = 1024
    model: int = 512


WIDTHS = Widths()


def build(side: str, widths: Widths = WIDTHS) -> nn.Module:
    """The transcription, or our model with the default or the published dropouts."""
    if side == "theirs":
        return PublishedCrossFusion(widths.channels, BINS, widths.model, HEADS, 1)
    return build_model(
        "crossfusion", backbone_dim=widths.channels, n_bins=BINS, embed_dim=widths.model, num_heads=HEADS,
        published=side == "published",
    )  # fmt: skip


def bag(tiles: int, channels: int = WIDTHS.channels) -> list[Tensor]:
    """One bag [1, N_m, d] at 5x, 10x and 20x, with `tiles` tiles at 20x."""
    return [torch.randn(1, -(-tiles // share), channels) for share in (16, 4, 1)]


def step(model: nn.Module, bags: list[Tensor], device: str) -> None:
    """Forward and backward."""
    mixed = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()
    with mixed:
        output = model(*bags)
    (output if isinstance(output, Tensor) else output.logits).square().sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    side: str, tiles: int, device: str, repeats: int, optimizer: bool, widths: Widths = WIDTHS
) -> dict[str, float]:
    """Seconds of the fastest step and peak memory in GB of this process, or on CUDA of the device."""
    torch.manual_seed(0)
    model = build(side, widths).to(device).train()
    adam = torch.optim.AdamW(model.parameters()) if optimizer else None
    bags = [b.to(device) for b in bag(tiles, widths.channels)]
    step(model, bags if device == "cuda" else [b[:, :16] for b in bags], device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(model, bags, device)
        if adam is not None:
            adam.step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "peak": peak_memory(device)}


def peak_memory(device: str) -> float:
    """Peak memory in GB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")) / 1e9


def flops(tiles: int, widths: Widths = WIDTHS) -> float:
    """Floating-point operations of a step of our model, matrix products and convolutions, counted without data."""
    with torch.device("meta"):
        model, values = build("default", widths), bag(tiles, widths.channels)
        return operations(lambda: step(model, values, "meta"))


def matrix_peak(device: str) -> float:
    """Operations a second of a large matrix product in the arithmetic of the step."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        _ = a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def child(side: str, tiles: int, arguments: argparse.Namespace, optimizer: bool = False) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [
        sys.executable, "-m", "benchmarks.model_step", "--child", side, "--tiles", str(tiles), "--device",
        arguments.device, "--threads", str(arguments.threads), "--repeats", str(arguments.repeats),
        "--channels", str(arguments.channels), "--width", str(arguments.width),
    ]  # fmt: skip
    command += ["--optimizer"] if optimizer else []
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    return json.loads(run.stdout)


def compare(tiles: int, arguments: argparse.Namespace) -> list[Row]:
    """Rows of one bag size."""
    runs = [{side: child(side, tiles, arguments) for side in SIDES} for _ in range(arguments.rounds)]
    middle = {s: {k: statistics.median(run[s][k] for run in runs) for k in ("seconds", "peak")} for s in SIDES}
    rows = [
        Row(f"{tiles} tiles, {side} dropouts: {what}", middle[side][key], middle["theirs"][key], unit, "lower")
        for side in ("default", "published")
        for what, key, unit in (("time", "seconds", "s"), ("peak memory", "peak", "GB"))
    ]
    operations_of_step = flops(tiles, Widths(arguments.channels, arguments.width))
    rate, peak = operations_of_step / middle["default"]["seconds"], matrix_peak(arguments.device)
    return [*rows, Row(f"{tiles} tiles: arithmetic, theirs = matrix product", rate / 1e9, peak / 1e9, "GFLOP/s")]


def main() -> None:
    """Run what the command line asks for."""
    parser = options(__doc__)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1024, 4096, 16384], help="tiles at 20x")
    parser.add_argument("--channels", type=int, default=WIDTHS.channels, help="width of the embeddings")
    parser.add_argument("--width", type=int, default=WIDTHS.model, help="width of the model")
    parser.add_argument("--slide", type=int, help="also: one step with AdamW on a slide of this many tiles, only ours")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side and size")
    parser.add_argument("--repeats", type=int, default=1, help="steps timed in each process")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--optimizer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        tiles = arguments.tiles[0]
        widths = Widths(arguments.channels, arguments.width)
        one = measure(arguments.child, tiles, arguments.device, arguments.repeats, arguments.optimizer, widths)
        print(json.dumps(one))
        return
    if arguments.quick:
        arguments.tiles, arguments.rounds = [256], 1
    rows = [row for tiles in arguments.tiles for row in compare(tiles, arguments)]
    if arguments.slide:
        slide = child("default", arguments.slide, arguments, optimizer=True)
        rows += [
            Row(f"{arguments.slide} tiles with AdamW: time", slide["seconds"], None, "s", "lower"),
            Row(f"{arguments.slide} tiles with AdamW: peak memory", slide["peak"], None, "GB", "lower"),
        ]
    title = f"One step of CrossFusion, D = {arguments.width}, embeddings of {arguments.channels}"
    present(title, rows, arguments.json)


if __name__ == "__main__":
    main()

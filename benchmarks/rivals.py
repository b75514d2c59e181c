"""One training step of every model on one large bag, compared with CrossFusion's: seconds and peak memory.

    python -m benchmarks.rivals [--tiles N ...] [--models NAME ...] [--quick] [--json FILE]

A square of tissue with `--tiles` tiles at 20x, a quarter at 10x, a sixteenth at 5x, embeddings of 1536 channels, f32,
the program's default options of each model, one bag, negative log-likelihood, forward and backward, no optimizer. Each
model runs in separate processes, medians over `--rounds` of the fastest of `--repeats` steps; peak memory is that of
the process, bag and program included. The graph of a model that reads one is built before the step, as the loader's
threads do, and has a separate row. `ours` is CrossFusion, `theirs` the other model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.model_step import peak_memory
from benchmarks.table import Row, options, present
from cfusion.models import build_model
from cfusion.models.registry import MODELS, spatial_graph
from cfusion.neighbours import nearest_tiles
from cfusion.survival.losses import nll
from cfusion.types import BagBatch, Targets

CHANNELS, BINS = 1536, 4
SIDES = {"x5": 4, "x10": 2, "x20": 1}
"""Tiles of 20x along the side of a tile."""


def square(tiles: int) -> BagBatch:
    """One bag of a square piece of tissue with about `tiles` tiles at 20x."""
    side = max(4 * round(tiles**0.5 / 4), 4)
    generator = torch.Generator().manual_seed(0)
    features, positions = {}, {}
    for name, share in SIDES.items():
        places = torch.cartesian_prod(torch.arange(side // share), torch.arange(side // share))
        positions[name] = places[None]
        features[name] = torch.randn(1, len(places), CHANNELS, generator=generator)
    return BagBatch(features, None, positions, ("square",))


def measure(name: str, tiles: int, repeats: int) -> dict[str, float]:
    """Seconds of building the graph and of the fastest step, and peak memory in GB of this process."""
    torch.manual_seed(0)
    model = build_model(name, backbone_dim=CHANNELS, n_bins=BINS).train()
    bag = square(tiles)
    targets = Targets(torch.tensor([1]), torch.tensor([True]), torch.tensor([20.0]))
    start = time.perf_counter()
    graphs = spatial_graph(name, (20, 10, 5), {})
    assert bag.positions is not None
    tables = {of: torch.from_numpy(nearest_tiles(bag.positions[of][0].numpy(), k))[None] for of, k in graphs.items()}
    graph = time.perf_counter() - start
    bag = dataclasses.replace(bag, neighbours=tables or None)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        nll(model(bag).logits, targets).sum().backward()
        seconds.append(time.perf_counter() - start)
    return {"graph": graph if tables else 0.0, "seconds": min(seconds), "peak": peak_memory("cpu")}


def child(name: str, tiles: int, arguments: argparse.Namespace) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.rivals", "--child", "--models", name, "--tiles", str(tiles)]
    command += ["--repeats", str(arguments.repeats), "--threads", str(arguments.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], check=True)
    return json.loads(done.stdout)


def compare(tiles: int, arguments: argparse.Namespace) -> list[Row]:
    """Rows of one size: every model's step and memory, compared with CrossFusion's."""
    names = ["crossfusion", *(name for name in arguments.models if name != "crossfusion")]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            runs[name].append(child(name, tiles, arguments))
    found = {name: {key: statistics.median(run[key] for run in of) for key in of[0]} for name, of in runs.items()}
    ours = found["crossfusion"]
    rows = []
    for name in names:
        rows.append(Row(f"{tiles} tiles, {name}: step", ours["seconds"], found[name]["seconds"], "s", "lower"))
        rows.append(Row(f"{tiles} tiles, {name}: peak memory", ours["peak"], found[name]["peak"], "GB", "lower"))
        if found[name]["graph"]:
            rows.append(Row(f"{tiles} tiles, {name}: its graph", found[name]["graph"], None, "s", "lower"))
    return rows


def main() -> None:
    """Measure each model and print rows."""
    parser = options(__doc__)
    parser.add_argument("--tiles", type=int, nargs="+", default=[16384], help="tiles at 20x")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each model and size")
    parser.add_argument("--repeats", type=int, default=2, help="steps timed in each process")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(measure(arguments.models[0], arguments.tiles[0], arguments.repeats)))
        return
    if arguments.quick:
        arguments.tiles, arguments.rounds, arguments.repeats = [256], 1, 1
    rows = [row for tiles in arguments.tiles for row in compare(tiles, arguments)]
    present(f"One step of each model, embeddings of {CHANNELS}, {arguments.threads} threads", rows, arguments.json)


if __name__ == "__main__":
    main()

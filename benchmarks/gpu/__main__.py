"""The acceptance run: what the first hour on a GPU must settle, in one command.

    python -m benchmarks.gpu [--quick] [--json FILE] [--part PART …] [--minutes 9] [--shared FOLDER]

Rows are printed as they are measured, each with its limit or aim if it has one, and written to FILE after each of them.
The run adapts to the minutes given: parts share what is left, and what does not fit is a row that says so. A part that
needs a package, a folder or a GPU that is missing is skipped by name. Without a GPU the parts run on the CPU; aims for
speed are then not checked.

`benchmarks/gpu_wheels.sh` collects the packages for a node without a package index.

Exit codes: 0: done. 3: a limit was missed, or a part failed (listed).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.bench import Bench
from benchmarks.table import options

PARTS = {
    "environment": 1.0, "attention": 0.5, "convolution": 0.5, "steps": 2.0, "settings": 1.0, "golden": 0.5,
    "engines": 2.0, "loading": 2.0, "comparison": 2.5, "extraction": 2.0,
}  # fmt: skip
"""Parts in their order, each a module of this package, and their weight in the time."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = options(__doc__)
    made.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    made.add_argument("--minutes", type=float, default=9.0, help="time of the run")
    shared = Path(os.environ.get("CFUSION_SHARED", "../shared"))
    made.add_argument("--shared", type=Path, default=shared, help="folder with published weights and slides")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Run the parts, print a summary, and leave with 3 if something was missed."""
    chosen = parser().parse_args()
    if chosen.child:
        from benchmarks.gpu.engines import child

        measured = child(
            Bench(quick=chosen.quick, minutes=chosen.minutes, shared=chosen.shared, json_file=None), chosen.child
        )
        chosen.json.write_text(json.dumps(measured), encoding="utf-8")
        return
    bench = Bench(quick=chosen.quick, minutes=chosen.minutes, shared=chosen.shared, json_file=chosen.json)
    sys.stdout.write(f"device: {bench.device_name}\n")
    weights = {name: PARTS[name] for name in PARTS if name in chosen.part}
    for name in weights:
        later = sum(list(weights.values())[list(weights).index(name) :])
        bench.run(name, _part(name), weights[name] / later)
    missed = [figure for figure in bench.figures if figure.kept is False]
    skipped = sum(figure.value is None for figure in bench.figures)
    sys.stdout.write(f"{len(bench.figures) - skipped} figures, {len(missed)} limits missed, {skipped} rows skipped\n")
    if bench.quick or not bench.on_gpu:
        sys.stdout.write("Small sizes or no GPU: this shows only that the parts run. Speed on a GPU: not measured.\n")
    if bench.failed:
        sys.stdout.write(f"failed: {', '.join(bench.failed)}\n")
    if missed or bench.failed:
        sys.exit(3)


def _part(name: str) -> Callable[[Bench], None]:
    def measure(bench: Bench) -> None:
        try:
            module = importlib.import_module(f"benchmarks.gpu.{name}")
        except ModuleNotFoundError as error:
            bench.skip("all", f"{error.name} is not installed")
            return
        module.measure(bench)

    return measure


if __name__ == "__main__":
    main()

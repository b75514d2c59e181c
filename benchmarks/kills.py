"""Trainings that are killed with kill -9 at random moments, again and again, and must end with the same bytes.

    python -m benchmarks.kills [--kills N] [--seed S] [--quick] [--json FILE]

A training is started, killed after a random part of the time that an undisturbed one takes, and started again by the
same command until it ends. Its predictions, models and histories must then be those of the undisturbed one, byte for
byte, nothing half-written may be left, and no process may have printed a traceback. Cases: folds one after another,
with tracking in a database, folds side by side, and folds that share a read. Prints a line for each kill.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.crossval_files import Size, make_files
from benchmarks.table import Row, options, present
from cfusion.child_processes import forked_context
from cfusion.files import digest_file

CASES = {
    "folds one after another, tracked": ("separate", True),
    "folds side by side": ("side-by-side", False),
    "folds that share a read": ("together", False),
}
"""Value of `train.folds`, and whether the run is tracked in a database."""
_KEPT = ("predictions.csv", "model.safetensors", "history.csv")


@dataclass(frozen=True)
class Series:
    """What came of the kills of one case.

    Attributes:
        kills: Number of kills that met a running process.
        starts: Number of starts.
        wrong: What was not as in the undisturbed run, in words.
    """

    kills: int
    starts: int
    wrong: tuple[str, ...]


def write_study(folder: Path) -> None:
    """Write a small cohort in `folder`."""
    make_files(folder, Size(40, 32, 4), ("x20",))


def write_config(folder: Path, output: Path, folds: str, *, tracked: bool) -> Path:
    """Write the configuration of a run of the cohort in `folder`."""
    config = {
        "cohort": {"name": "kills", "table": str(folder / "table.csv")},
        "splits": {"directory": str(folder / "splits")},
        "data": {"shards": str(folder / "shards"), "magnifications": [20.0]},
        "model": {"name": "amil", "embed_dim": 16},
        "train": {"epochs": 4, "patience": None, "micro_batch": 4, "folds": folds},
        "parallel": {"global_batch": 8},
        "evaluation": {"bootstrap": 20, "protocol": "fixed-epoch"},
        "tracking": {"enabled": tracked, "uri": f"sqlite:///{output.with_suffix('.db')}"},
        "output": str(output),
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, log: Path) -> multiprocessing.process.BaseProcess:
    """Start `cfusion train`, forked from a server that has imported the program; its output goes to `log`."""
    process = forked_context().Process(target=_train, args=(str(config), str(log)))
    process.start()
    return process


def _train(config: str, log: str) -> None:
    with Path(log).open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = ["cfusion", "train", config]
    from cfusion.cli.main import run

    run()


def kept(output: Path) -> dict[str, str]:
    """Return the digests of what decides the numbers of a run, by path in its folder."""
    files = sorted(path for name in _KEPT for path in output.rglob(name))
    return {str(path.relative_to(output)): digest_file(path) for path in files}


def kill_until_done(config: Path, log: Path, seconds: float, draw: random.Random, most: int) -> Iterator[float]:
    """Start a run again and again, and kill it up to `most` times; yields the second of each kill.

    Raises:
        RuntimeError: A start that was not killed did not end well.
    """
    kills = 0
    while True:
        process = start(config, log)
        if kills == most:
            process.join()
        else:
            after = draw.uniform(0, seconds)
            process.join(after)
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
                yield after
                continue
        if process.exitcode:
            raise RuntimeError(f"a start that was not killed left with {process.exitcode}:\n{log.read_text()[-2000:]}")
        return


def run_case(folder: Path, case: str, kills: int, draw: random.Random) -> Series:
    """Kill runs of one of `CASES` `kills` times; a run that ends is compared, and the next one begins."""
    folds, tracked = CASES[case]
    first = forked_context().Process(target=os.getpid)
    first.start()
    first.join()  # the program is imported, which is not part of the time below
    undisturbed = folder / "undisturbed"
    process = start(write_config(folder, undisturbed, folds, tracked=tracked), folder / "undisturbed.log")
    began = time.monotonic()
    process.join()
    seconds = time.monotonic() - began
    if process.exitcode:
        raise RuntimeError((folder / "undisturbed.log").read_text()[-2000:])
    wanted = kept(undisturbed)
    done, starts, wrong, run = 0, 0, [], 0
    while done < kills:
        run += 1
        output, log = folder / f"run_{run}", folder / f"run_{run}.log"
        config = write_config(folder, output, folds, tracked=tracked)
        for after in kill_until_done(config, log, seconds, draw, kills - done):
            done += 1
            starts += 1
            print(f"  run {run}: killed after {after:.2f} s", flush=True)
        starts += 1
        wrong += [f"run {run}: {problem}" for problem in problems(output, log, wanted)]
    return Series(done, starts, tuple(wrong))


def problems(output: Path, log: Path, wanted: dict[str, str]) -> list[str]:
    """Return, in words, how a run that ended differs from the undisturbed one."""
    found = kept(output)
    differ = [name for name in wanted if found.get(name) != wanted[name]]
    lost = [str(path) for path in output.rglob("*") if path.name.endswith((".tmp", ".part"))]
    traceback = ["a traceback in its output"] if "Traceback" in log.read_text(errors="replace") else []
    return [*(f"{name} differs" for name in differ), *(f"{path} is left" for path in lost), *traceback]


def main() -> None:
    """Kill, and print what came of it; leaves with 1 if anything was wrong."""
    parser = options(__doc__)
    parser.add_argument("--kills", type=int, default=200, help="kills over all cases")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    kills = 6 if arguments.quick else arguments.kills
    draw = random.Random(arguments.seed)
    rows, wrong = [], []
    scratch = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        for number, name in enumerate(CASES):
            folder = scratch / str(number)
            write_study(folder)
            share = kills // len(CASES) + (number < kills % len(CASES))
            print(f"{name}: {share} kills", flush=True)
            series = run_case(folder, name, share, draw)
            wrong += [f"{name}, {problem}" for problem in series.wrong]
            rows += [Row(f"{name}: kills", series.kills, None, "kills"),
                     Row(f"{name}: wrong", len(series.wrong), None, "differences", better="lower")]  # fmt: skip
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    present("kill -9 and start again", rows, arguments.json)
    print("\n".join(wrong) or "every run ended with the bytes of the undisturbed one")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()

"""What a small run costs besides its training: a five-fold cross-validation of a tiny model from the command line.

    python -m benchmarks.start [--quick] [--json FILE] [--repeats N] [--folder DIR]

60 patients, small bags of 16 channels, AMIL of width 16, two epochs: the training itself is about a second. Rows: the
complete command with its defaults; the same without tracking; only the imports; the help. Wall time, which depends on
what else the machine does, and CPU time of all processes, which depends on it less. Medians; nothing to compare with.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from benchmarks.crossval_commands import QUICK, ROOT, Cost, cost_of, make_study, medians, our_command
from benchmarks.table import Row, options, present

IMPORTS = "import cfusion.runs.crossval, cfusion.runs.run, cfusion.report.runs"
"""What `cfusion train` imports before and after training."""


def measure(folder: Path, repeats: int) -> dict[str, list[Cost]]:
    """Costs of each command; they take turns."""
    make_study(folder / "files", QUICK)
    found: dict[str, list[Cost]] = {}
    for repeat in range(repeats):
        train = our_command(folder / "files", QUICK, folder / f"tracked_{repeat}", as_published=False)
        quiet = our_command(folder / "files", QUICK, folder / f"untracked_{repeat}", as_published=False)
        commands = {
            "five folds": train,
            "five folds, tracking.enabled=false": [*quiet, "tracking.enabled=false"],
            "imports": [sys.executable, "-c", IMPORTS],
            "train --help": [sys.executable, "-m", "cfusion", "train", "--help"],
        }
        for name, command in commands.items():
            found.setdefault(name, []).append(cost_of(command, folder))
            print(f"{name}, {repeat + 1} of {repeats}: {found[name][-1]}", flush=True)
    return found


def main() -> None:
    """Measure, print, and write the rows."""
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; default: the system's")
    arguments = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        found = measure(Path(scratch), 1 if arguments.quick else arguments.repeats)
    costs = {name: medians(measured) for name, measured in found.items()}
    rows = [
        Row(f"{name}: {words}", figure, None, "s", "lower")
        for name, cost in costs.items()
        for words, figure in (("wall", cost.wall), ("CPU time", cost.cpu))
    ]
    present(f"Starting, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}", rows, arguments.json)


if __name__ == "__main__":
    main()

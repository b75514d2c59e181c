"""Processes of this program: started from its own files, and ended with the process that started them.

Python puts the working folder before the installed packages, so a user's `launch.py` or `preprocess.py` there would be
run in place of the package. Every process is therefore started with `-P` and finds the program by PYTHONPATH.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""Folder of the packages cfusion, launch and preprocess."""

PARENT = "CFUSION_PARENT"
"""Variable with the number of the process whose end asks this one to stop; see `child_environment`."""

_IMPORTED = ("cfusion.runs.crossval", "cfusion.training.group.group")
"""Modules that the server of `forked_context` imports."""

_SIGNAL_AT_PARENTS_END = 1  # PR_SET_PDEATHSIG of prctl


def python_command() -> list[str]:
    """Return the command of the interpreter, which does not import from the working folder."""
    return [sys.executable, "-P"]


def python_path() -> str:
    """Return the PYTHONPATH with which a process finds this program, installed or not."""
    there = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, there)]))


def child_environment(*, ends_with_this: bool = True) -> dict[str, str]:
    """Return the environment of a child process.

    Args:
        ends_with_this: The child (see `stop_with_parent`) is asked to stop when this process ends.
    """
    own = {"PYTHONPATH": python_path(), "PYTHONSAFEPATH": "1"}
    return {**os.environ, **own, **({PARENT: str(os.getpid())} if ends_with_this else {})}


def forked_context() -> ForkServerContext:
    """Return a context whose processes are forked from a server that has imported the program and started no thread.

    Importing takes longer than a small training. The processes have the environment of the server's start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


def forget_working_folder() -> None:
    """Stop importing from the working folder, where `python -m cfusion` would look first."""
    here = Path.cwd().resolve()
    if not sys.flags.safe_path and here != ROOT.resolve():
        sys.path[:1] = [path for path in sys.path[:1] if Path(path or ".").resolve() != here]


def stop_with_parent(parent: int | None = None) -> None:
    """Have the system send SIGTERM to this process when its parent ends, even by kill -9.

    Args:
        parent: Number of the parent; None: of `child_environment`, and without that variable this does nothing.
    """
    named = os.environ.pop(PARENT, None)
    if parent is None:
        if named is None:
            return
        parent = int(named)
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(_SIGNAL_AT_PARENTS_END, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)

"""A SLURM of one node on loopback: munged, slurmctld and slurmd of this machine, for tests; and tasks for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from spawn import free_port

from cfusion.interruption import stop_requested

DAEMONS = ("munged", "slurmctld", "slurmd")
_START_SECONDS = 60

CONFIGURATION = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
SlurmctldPidFile={folder}/log/slurmctld.pid
SlurmdPidFile={folder}/log/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
JobRequeue=1
MinJobAge=3600
ReturnToService=2
KillWait=5
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why there can be no SLURM here; empty if there can."""
    missing = [name for name in (*DAEMONS, "sbatch") if shutil.which(name) is None]
    if missing:
        return f"no SLURM ({', '.join(missing)} of Debian's slurm-wlm and munge)"
    return "" if os.getuid() == 0 else "a SLURM for tests needs root"


@contextlib.contextmanager
def slurm_of_one_node() -> Iterator[Path]:
    """Start the daemons; yields the file for SLURM_CONF, and ends them at the end of the block."""
    # A path of pytest's would be too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield _start(folder, started)
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, started: list[subprocess.Popen[bytes]]) -> Path:
    folder.chmod(0o755)
    for name, mode in (("state", 0o755), ("spool", 0o755), ("log", 0o755), ("run", 0o755), ("munge", 0o700)):
        (folder / name).mkdir(mode=mode)
        (folder / name).chmod(mode)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(
        folder=folder, host=host, ports=(free_port(), free_port()), cores=psutil.cpu_count(),
    ))  # fmt: skip
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    munge = folder / "munge"
    commands = (
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/run/munge.sock",
         "--num-threads=1", f"--pid-file={munge}/pid", f"--log-file={munge}/log",
         f"--seed-file={munge}/seed"],
        ["slurmctld", "-D", "-c", "-i"],
        ["slurmd", "-D", "-c"],
    )  # fmt: skip
    for command in commands:
        log = (folder / "log" / f"{command[0]}.out").open("wb")
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        log.close()
        if command[0] == "munged":
            _until(lambda: (folder / "run" / "munge.sock").exists(), folder)
    _until(lambda: "State=IDLE" in said(configuration, "scontrol", "show", "node", host), folder)
    return configuration


def _until(found, folder: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while not found():
        if time.monotonic() > end:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted((folder / "log").iterdir()))
            raise RuntimeError(f"SLURM did not start:\n{logs}")
        time.sleep(0.2)


def said(configuration: Path, *command: str) -> str:
    """What a command of SLURM prints."""
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@dataclass(frozen=True)
class TaskEnd:
    """How a task went."""

    name: str
    how: str
    stopped: bool = False
    retry: bool = False


@dataclass(frozen=True)
class Marked:
    """A task that marks its start in `folder`; with `waits` it lasts until it is asked to stop, the first time."""

    name: str
    folder: Path
    waits: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def __call__(self) -> list[TaskEnd]:
        marks = self.folder / f"{self.name}.starts"
        with marks.open("a") as stream:
            stream.write(f"{os.environ['SLURM_JOB_ID']} {os.environ.get('CFUSION_TEST_SETUP', '')}\n")
        if not self.waits or len(marks.read_text().splitlines()) > 1:
            return [TaskEnd(self.name, "done")]
        while not stop_requested():
            time.sleep(0.1)
        return [TaskEnd(self.name, "stopped", stopped=True)]

    def lost(self, cause: str, *, stopped: bool = False) -> list[TaskEnd]:
        return [TaskEnd(self.name, f"lost: {cause}", stopped)]

    def refused(self, cause: str) -> list[TaskEnd]:
        return [TaskEnd(self.name, f"refused: {cause}")]

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from spawn import free_port

from cfusion.interruption import stop_requested

DAEMONS = ("munged", "slurmctld", "slurmd")
ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db")
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
MinJobAge={remembered}
ReturnToService=2
KillWait=5
{accounting}
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

DATABASE = """
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={ports[2]}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[3]}
StorageUser=slurm
StorageLoc=accounting
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/log/slurmdbd.pid
"""


def why_not(*, accounting: bool = False) -> str:
    """Why there can be no SLURM here, or none with accounting; empty if there can."""
    wanted = (*DAEMONS, "sbatch", *(ACCOUNTING if accounting else ()))
    missing = [name for name in wanted if shutil.which(name) is None]
    if missing:
        packages = "slurm-wlm, munge, slurmdbd and mariadb-server" if accounting else "slurm-wlm and munge"
        return f"no SLURM ({', '.join(missing)} of Debian's {packages})"
    return "" if os.getuid() == 0 else "a SLURM for tests needs root"


@contextlib.contextmanager
def slurm_of_one_node(*, accounting: bool = False) -> Iterator[Path]:
    """Start the daemons; yields the file for SLURM_CONF, and ends them at the end of the block.

    `accounting`: with slurmdbd on a MariaDB, and a controller that soon forgets the jobs that have ended.
    """
    # A path of pytest's would be too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield _start(folder, started, accounting=accounting)
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for step in _left_of(folder / "slurm.conf"):  # it would wait for its daemon without end
            step.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, started: list[subprocess.Popen[bytes]], *, accounting: bool) -> Path:
    folder.chmod(0o755)
    for name, mode in (("state", 0o755), ("spool", 0o755), ("log", 0o755), ("run", 0o755), ("munge", 0o700)):
        (folder / name).mkdir(mode=mode)
        (folder / name).chmod(mode)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    ports = tuple(free_port() for _ in range(4))
    storage = "none"
    if accounting:
        storage = f"slurmdbd\nAccountingStorageHost=127.0.0.1\nAccountingStoragePort={ports[2]}"
        storage += f"\nAccountingStoragePass={folder}/run/munge.sock"  # the socket of munge is asked for by this name
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(
        folder=folder, host=host, ports=ports, cores=psutil.cpu_count(), remembered=2 if accounting else 3600,
        accounting=f"AccountingStorageType=accounting_storage/{storage}",
    ))  # fmt: skip

    def start(*command: str) -> None:
        log = (folder / "log" / f"{command[0]}.out").open("wb")
        environment = {**os.environ, "SLURM_CONF": str(configuration)}
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        log.close()

    munge = folder / "munge"
    start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/run/munge.sock",
          "--num-threads=1", f"--pid-file={munge}/pid", f"--log-file={munge}/log",
          f"--seed-file={munge}/seed")  # fmt: skip
    _until(lambda: (folder / "run" / "munge.sock").exists(), folder)
    if accounting:
        _start_accounting(folder, ports, start)
        _until(lambda: "loopback" in said(configuration, "sacctmgr", "-i", "add", "cluster", "loopback"), folder)
    start("slurmctld", "-D", "-c", "-i")
    start("slurmd", "-D", "-c")
    _until(lambda: "State=IDLE" in said(configuration, "scontrol", "show", "node", host), folder)
    return configuration


def _start_accounting(folder: Path, ports: tuple[int, ...], start: Callable[..., None]) -> None:
    """Start a MariaDB that only loopback reaches, which asks nobody for a password, and slurmdbd on it."""
    data = folder / "data"
    with (folder / "log" / "mariadb-install-db.out").open("wb") as log:
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db"],
            stdout=log, stderr=log, check=True,
        )  # fmt: skip
    start("mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={folder}/run/db.sock",
          f"--pid-file={folder}/run/db.pid", "--bind-address=127.0.0.1", f"--port={ports[3]}", "--skip-grant-tables",
          "--innodb-buffer-pool-size=32M", "--skip-log-bin")  # fmt: skip
    _until(lambda: answers(ports[3]), folder)
    settings = folder / "slurmdbd.conf"
    settings.write_text(DATABASE.format(folder=folder, ports=ports))
    settings.chmod(0o600)
    start("slurmdbd", "-D")
    _until(lambda: answers(ports[2]), folder)


def answers(port: int) -> bool:
    """Whether something listens on a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _left_of(configuration: Path) -> list[psutil.Process]:
    """Return the processes of jobs of this cluster that still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            # psutil does not see it, as steps write their title over its beginning.
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if f"SLURM_CONF={configuration}".encode() in environment:
                found.append(process)
    return found


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

    @property
    def word(self) -> str:
        return self.how


@dataclass(frozen=True)
class Marked:
    """A task that marks its start in `folder`.

    Attributes:
        waits: It lasts until it is asked to stop, the first time.
        deaf: It lasts until it is killed.
    """

    name: str
    folder: Path
    waits: bool = False
    deaf: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def __call__(self) -> list[TaskEnd]:
        marks = self.folder / f"{self.name}.starts"
        with marks.open("a") as stream:
            stream.write(f"{os.environ['SLURM_JOB_ID']} {os.environ.get('CFUSION_TEST_SETUP', '')}\n")
        while self.deaf:
            time.sleep(0.1)
        if not self.waits or len(marks.read_text().splitlines()) > 1:
            return [TaskEnd(self.name, "done")]
        while not stop_requested():
            time.sleep(0.1)
        return [TaskEnd(self.name, "stopped", stopped=True)]

    def lost(self, cause: str, *, stopped: bool = False) -> list[TaskEnd]:
        return [TaskEnd(self.name, f"lost: {cause}", stopped)]

    def refused(self, cause: str) -> list[TaskEnd]:
        return [TaskEnd(self.name, f"refused: {cause}")]

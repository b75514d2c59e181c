"""One lock: who holds it is named, the dead hold nothing, and a file system without flock has a substitute."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cfusion import locks
from cfusion.locks import HeldError, hold, holder

HOLD = """
import sys, time
from pathlib import Path
from cfusion.locks import hold
if sys.argv[2] != "flock":
    import fcntl
    def flock(fd, operation):
        raise OSError(int(sys.argv[2]), "no flock")
    fcntl.flock = flock
with hold(Path(sys.argv[1])) as descriptors:
    if sys.argv[3:]:
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], pass_fds=descriptors)
        print(child.pid, flush=True)
    print("held", flush=True)
    sys.stdin.read()
"""


def other_process(path: Path, kind: str = "flock", *more: str) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(path), kind, *more]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def killed(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


@pytest.fixture(params=["flock", str(errno.ENOSYS), str(errno.ENOTSUP), str(errno.ENOLCK)])
def kind(request, monkeypatch) -> str:
    if request.param != "flock":

        def flock(fd, operation):
            raise OSError(int(request.param), "no flock")

        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


def test_the_holder_is_named_and_a_killed_one_is_replaced(tmp_path, kind):
    path = tmp_path / "folder" / "a.lock"
    assert holder(path) == (None, False)
    process = other_process(path, kind)
    assert process.stdout.readline() == "held\n"
    try:
        who, held = holder(path)
        assert held
        assert (who.host, who.pid) == (socket.gethostname(), process.pid)
        with pytest.raises(HeldError, match=f"process {process.pid} on {socket.gethostname()}"), hold(path):
            pass
    finally:
        killed(process)
    who, held = holder(path)
    assert (who.pid, held) == (process.pid, False), "killed: the lock is free, and the dead process is still on record"
    with hold(path):
        assert holder(path)[0].pid == os.getpid()
        assert holder(path)[1]
    assert holder(path) == (None, False)


@pytest.mark.parametrize(
    ("variables", "job"),
    [({}, ""), ({"SLURM_JOB_ID": "13"}, "13"),
     ({"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2"}, "10_2")],
)  # fmt: skip
def test_a_holder_in_slurm_is_named_with_its_job(tmp_path, monkeypatch, variables, job):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with hold(tmp_path / "a.lock"):
        who, held = holder(tmp_path / "a.lock")
    assert held
    assert who.job == job
    assert str(who).endswith(f"(SLURM's job {job})") is bool(job)


def test_a_child_that_has_the_descriptor_holds_the_lock_after_its_parent_is_killed(tmp_path):
    path = tmp_path / "a.lock"
    process = other_process(path, "flock", "child")
    child = int(process.stdout.readline())
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    try:
        assert holder(path)[1]
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdin.close()
        process.stdout.close()
    deadline = time.monotonic() + 30
    while holder(path)[1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not holder(path)[1]


def test_missing_flock_is_reported_once(tmp_path, monkeypatch, caplog):
    def flock(fd, operation):
        raise OSError(errno.ENOSYS, "no flock")

    monkeypatch.setattr(fcntl, "flock", flock)
    locks._warn_once.cache_clear()
    for name in ("a.lock", "b.lock"):
        with hold(tmp_path / name) as descriptors:
            assert descriptors == ()
    assert caplog.text.count("The file system has no flock") == 1


def test_another_error_of_the_file_system_is_not_taken_for_a_missing_flock(tmp_path, monkeypatch):
    def flock(fd, operation):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken"), hold(tmp_path / "a.lock"):
        pass


def test_a_lock_file_that_is_not_kept_leaves_with_its_holder(tmp_path, kind):
    path = tmp_path / "a.lock"
    with hold(path, keep=False):
        assert holder(path)[1]
        with pytest.raises(HeldError), hold(path, keep=False):
            pass
    with hold(path, keep=False):
        pass
    assert list(tmp_path.iterdir()) == []

"""Checkpoints: which are kept, which is resumed, and what happens if one cannot be written or read."""

import contextlib
import errno
import itertools
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import cfusion.training.checkpoint as checkpoint
from cfusion.config import ParallelConfig
from cfusion.errors import CheckpointError
from cfusion.files import digest_json, write_json
from cfusion.training import checkpoint_files
from cfusion.training.checkpoint import Checkpoints, TrainState
from cfusion.training.snapshot import Snapshot
from cfusion.training.world import join_world

IDENTITY = {"model": {"name": "amil", "embed_dim": 16}, "seed": 7}


class Training:
    """A small network that trains on noise, with its checkpoints."""

    def __init__(
        self, folder: Path, *, width: int = 3, keep: int = 2, identity=IDENTITY, engine: str = "ddp",
        background: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        runtime = join_world(ParallelConfig(global_batch=1))
        runtime.parallel = ParallelConfig(global_batch=1, engine=engine)
        self.model = nn.Sequential(nn.Linear(width, 4), nn.Linear(4, 1))
        self.width = width
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.snapshot = Snapshot(runtime.parts(self.model, self.optimizer))
        self.snapshot.average = self.snapshot.parameters()
        card = {"model": "made up"}
        self.checkpoints = Checkpoints(folder, identity, runtime, keep=keep, card=card, background=background)
        self.state = TrainState()

    def step(self, *, best: bool = False) -> None:
        noise = torch.Generator().manual_seed(self.state.step)
        self.model(torch.randn(5, self.width, generator=noise)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        self.state.history.append({"loss": 1 / (1 + self.state.step)})
        if best:
            self.state.best_epoch, self.state.best_score = self.state.step, 0.5
            self.snapshot.best = self.snapshot.parameters()

    def save(self, *, now: bool = True) -> None:
        self.checkpoints.save(self.state, self.snapshot, now=now)

    def load(self) -> TrainState | None:
        self.state = self.checkpoints.load(self.snapshot) or self.state
        return self.state

    def everything(self) -> dict[str, torch.Tensor]:
        best = {f"best/{name}": tensor for name, tensor in self.snapshot.best.items()}
        return best | {key: piece.values.clone() for key, piece in self.snapshot.pieces().items()}


def assert_same(one: Training, other: Training) -> None:
    assert one.state == other.state
    ours, theirs = one.everything(), other.everything()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_state_is_restored_to_the_bit(tmp_path):
    training = Training(tmp_path)
    training.step(best=True)
    training.step()
    training.save()
    again = Training(tmp_path)
    again.load()
    assert_same(again, training)
    training.step()
    again.step()
    assert_same(again, training)


def test_fp16_loss_scale_is_restored(tmp_path):
    """Only a GPU computes in fp16, but the scaler is the same on a CPU."""
    training = Training(tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    training.checkpoints.runtime.accelerator.scaler = scaler
    for gradient in (1.0, float("inf"), 1.0):
        parameter = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        scaler.scale(parameter * gradient).sum().backward()
        scaler.step(optimizer)
        scaler.update()
    training.state.loss_scale = training.checkpoints.runtime.loss_scale
    training.step()
    training.save()
    again = Training(tmp_path)
    fresh = torch.amp.GradScaler("cpu", growth_interval=3)
    again.checkpoints.runtime.accelerator.scaler = fresh
    again.checkpoints.runtime.loss_scale = again.load().loss_scale
    assert fresh.state_dict() == scaler.state_dict()
    assert (fresh.get_scale(), fresh.state_dict()["_growth_tracker"]) == (512.0, 1)


def test_newest_are_kept_with_the_best_they_refer_to(tmp_path):
    training = Training(tmp_path, keep=3)
    for number in range(1, 8):
        training.step(best=number in (2, 4, 6))
        training.save()
    assert names(tmp_path) == [
        "best_epoch_0004", "best_epoch_0006", "step_00000005", "step_00000006", "step_00000007",
    ]  # fmt: skip


def test_files_are_plain_safetensors_with_the_names_of_the_parameters(tmp_path):
    training = Training(tmp_path)
    training.step(best=True)
    training.save()
    best = load_file(tmp_path / "best_epoch_0001" / "rank_00000.safetensors")
    assert {name.removeprefix("model/") for name in best} == set(training.model.state_dict())
    state = load_file(tmp_path / "step_00000001" / "rank_00000.safetensors")
    assert {key.split("/")[0] for key in state} == {"model", "average", "exp_avg", "exp_avg_sq", "step"}
    assert json.loads((tmp_path / "step_00000001" / "state.json").read_text())["card"] == {"model": "made up"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 2', '"step": 9'))


DAMAGES = {
    "truncated tensors": ("rank_00000.safetensors", truncate),
    "one flipped bit": ("rank_00000.safetensors", flip),
    "no tensors": ("rank_00000.safetensors", Path.unlink),
    "no numbers": ("state.json", Path.unlink),
    "edited numbers": ("state.json", edit),
    "half the numbers": ("state.json", truncate),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_falls_back_to_the_previous_with_a_warning(tmp_path, caplog, damage):
    training = Training(tmp_path)
    training.step(best=True)
    training.save()
    before = Training(tmp_path)
    before.load()
    training.step()
    training.save()
    file, hurt = DAMAGES[damage]
    hurt(tmp_path / "step_00000002" / file)
    again = Training(tmp_path)
    with caplog.at_level(logging.WARNING):
        again.load()
    assert_same(again, before)
    assert "step_00000002" in caplog.text
    assert "Using the previous checkpoint." in caplog.text
    assert names(tmp_path) == ["best_epoch_0001", "step_00000001"], "the damaged one does not count as the newest"


def test_a_damaged_best_is_a_damaged_checkpoint(tmp_path):
    training = Training(tmp_path)
    training.step(best=True)
    training.save()
    flip(tmp_path / "best_epoch_0001" / "rank_00000.safetensors")
    with pytest.raises(CheckpointError, match=r"best_epoch_0001.* is damaged .*No checkpoint is complete. Delete"):
        Training(tmp_path).load()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"identity": IDENTITY | {"seed": 8}}, r"differs in seed \(7 there, 8 here\)"),
        (
            {"identity": {"model": {"name": "amil", "embed_dim": 32}, "seed": 7}, "width": 5},
            r"differs in model.embed_dim \(16 there, 32 here\)",
        ),
        ({"width": 5}, r"another model: 0.weight is of shape \[4, 3\] there and of shape \[4, 5\] here"),
        ({"engine": "zero2"}, r"written with parallel.engine=ddp; this run has zero2"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_and_stays(tmp_path, other, message):
    training = Training(tmp_path)
    training.step()
    training.save()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=message):
        Training(tmp_path, **other).load()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    training = Training(tmp_path)
    training.step()
    monkeypatch.setattr(checkpoint, "CHECKPOINT_FORMAT", 1)
    training.save()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"has format 1; this program reads 2"):
        Training(tmp_path).load()


@pytest.mark.parametrize("at", ["_write_tensors", "put_in_place"])
def test_incomplete_files_of_a_killed_process_are_ignored_and_removed(tmp_path, monkeypatch, at):
    training = Training(tmp_path)
    training.step()
    training.save()
    kept = Training(tmp_path)
    kept.load()

    def killed(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files, at, killed)
    training.step()
    with pytest.raises(KeyboardInterrupt):
        training.save()
    monkeypatch.undo()
    assert len(names(tmp_path)) == 2
    again = Training(tmp_path)
    again.load()
    assert_same(again, kept)
    assert names(tmp_path) == ["step_00000001"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def refuse_to_save(training: Training, folder: Path, caplog) -> None:
    """Check both cases of a full disk: training continues if it may, and fails with a message if it may not."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    training.step()
    training.checkpoints._saved -= 1000
    with caplog.at_level(logging.WARNING):
        training.save(now=False)
    assert "step_00000002: the checkpoint cannot be written" in caplog.text
    assert "Training continues; the previous checkpoint is kept." in caplog.text
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*\)\. Free disk space there"):
        training.save(now=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, "nothing half-written"


def test_a_full_disk_keeps_the_previous_checkpoint(small_disk, caplog):
    training = Training(small_disk / "state")
    training.step()
    training.save()
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    refuse_to_save(training, small_disk / "state", caplog)
    assert "No space left on device" in caplog.text
    (small_disk / "ballast").unlink()
    training.save()
    assert names(small_disk / "state") == ["step_00000001", "step_00000002"]


def test_file_size_limit_keeps_the_previous_checkpoint(tmp_path, caplog):
    training = Training(tmp_path)
    training.step()
    training.save()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, before[1]))
    try:
        refuse_to_save(training, tmp_path, caplog)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("at", ["_write_tensors", "put_in_place"])
def test_a_disk_that_fills_at_any_point_of_writing(tmp_path, caplog, monkeypatch, at):
    training = Training(tmp_path)
    training.step()
    training.save()

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_files, at, full)
    refuse_to_save(training, tmp_path, caplog)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, by its path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_thread_writes_the_same_bytes_while_training_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "INTERVAL_SECONDS", -1.0)
    may_write, write = threading.Event(), checkpoint_files._write_tensors
    plain, training = Training(tmp_path / "plain"), Training(tmp_path / "thread", background=True)
    plain.step(best=True)
    plain.save(now=False)
    expected = contents(tmp_path / "plain")

    def later(path: Path, pieces) -> str:
        assert may_write.wait(60)
        return write(path, pieces)

    monkeypatch.setattr(checkpoint_files, "_write_tensors", later)
    training.step(best=True)
    training.save(now=False)
    for _ in range(3):  # changes every tensor of the state, while the thread has not written the first
        training.step()
        training.save(now=False)
    assert contents(tmp_path / "thread") == {}
    may_write.set()
    training.checkpoints.settle()
    assert contents(tmp_path / "thread") == expected
    training.save(now=True)
    assert training.load().step == 4


def test_problems_of_a_thread_are_reported_and_unexpected_errors_raised(tmp_path, caplog, monkeypatch):
    training = Training(tmp_path, background=True)
    training.step()
    training.save()
    before, thread = contents(tmp_path), threading.current_thread()

    def fails(error: Exception):
        def write(*_arguments: object) -> None:
            assert threading.current_thread() is not thread
            raise error

        return write

    training.checkpoints._saved -= 1000
    monkeypatch.setattr(checkpoint_files, "_write_tensors", fails(OSError(errno.ENOSPC, "No space left on device")))
    training.step()
    training.save(now=False)
    with caplog.at_level(logging.WARNING):
        training.checkpoints.settle()
    assert "step_00000002: the checkpoint cannot be written ([Errno 28] No space left on device)" in caplog.text
    assert contents(tmp_path) == before, "nothing half-written"
    training.checkpoints._saved -= 1000
    monkeypatch.setattr(checkpoint_files, "_write_tensors", fails(MemoryError("no memory")))
    with pytest.raises(MemoryError, match="no memory"), training.checkpoints.settling():
        training.save(now=False)
    monkeypatch.undo()
    training.checkpoints._saved -= 1000
    with contextlib.suppress(KeyboardInterrupt), training.checkpoints.settling():
        training.save(now=False)
        raise KeyboardInterrupt
    assert names(tmp_path) == ["step_00000001"], "a training that fails leaves nothing behind"


@pytest.mark.slow
def test_a_kill_while_the_thread_writes_leaves_a_complete_checkpoint(tmp_path):
    """A process is killed again and again, mostly within the writing; the state in the end is the undisturbed one."""
    undisturbed = Training(tmp_path / "plain")
    for _ in range(40):
        undisturbed.step()
    script = [sys.executable, str(Path(__file__).with_name("background_training.py")), str(tmp_path / "killed"), "40"]
    reached, kills = 0, 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    while True:
        running = subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, text=True)
        while running.poll() is None and len(list((tmp_path / "killed").glob("step_*"))) < 2:
            time.sleep(0.01)
        if kills < 3:
            there = {path.name for path in (tmp_path / "killed").glob("step_*")}
            while running.poll() is None and {path.name for path in (tmp_path / "killed").glob("step_*")} == there:
                time.sleep(0.001)
            running.kill()
        running.communicate()
        if running.returncode == 0:
            break
        assert running.returncode == -signal.SIGKILL
        kills += 1
        survivor = Training(tmp_path / "killed")
        assert survivor.load().step >= reached, "the newest complete checkpoint is loaded"
        reached = survivor.state.step
    again = Training(tmp_path / "killed")
    assert again.load().step > reached
    while again.state.step < 40:
        again.step()
    assert kills == 3
    assert_same(again, undisturbed)


def test_slices_of_several_files_are_one_tensor(tmp_path):
    """Tensors written by three processes are read complete, and in slices that no process wrote."""
    values = torch.arange(35.0)
    cuts = [0, 11, 12, 35]
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    files = {}
    for rank, (start, stop) in enumerate(itertools.pairwise(cuts)):
        piece = checkpoint_files.Piece(torch.Size([5, 7]), start, values[start:stop])
        path = folder / f"rank_{rank:05d}.safetensors"
        files[path.name] = checkpoint_files._write_tensors(path, {"model/w": piece})
    write_json(folder / "state.json", {"files": files, "digest": digest_json({"files": files})})
    with checkpoint_files.open_checkpoint(folder) as stored:
        assert torch.equal(stored.complete("model/w"), values.view(5, 7))
        for start in range(36):
            for stop in range(start, 36):
                assert torch.equal(stored.read("model/w", start, stop - start), values[start:stop])
        with pytest.raises(CheckpointError, match=r"elements 35 to 36 of model/w are missing"):
            stored.read("model/w", 30, 6)

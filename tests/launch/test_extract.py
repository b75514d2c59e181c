"""Fan-out: shares of the slides as tasks, and one summary of all."""

import functools
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from slide_factory import tissue_picture, write_slide

from cfusion.data.store import FeatureStore
from cfusion.errors import ConfigError, DataError, MissingExtraError, RequeueError, SlideError
from cfusion.interruption import graceful_stop, stop_requested
from launch import extract
from launch.extract import FanOut, ShareResult, SlideShare, extract_by_device, fan_out, rehearse
from launch.tasks import slurm_array
from launch.tasks.task import TaskResources
from preprocess.extraction import preprocess_slides
from preprocess.settings import PreprocessConfig
from preprocess.slide_files import find_slides

ONE_CORE = TaskResources(cpus=1)


@pytest.fixture
def config(tmp_path: Path) -> PreprocessConfig:
    slides = tmp_path / "slides"
    slides.mkdir()
    for number in range(3):
        write_slide(slides / f"s{number}.svs", tissue_picture(400, 400, seed=number, share=0.95))
    (slides / "broken.svs").write_bytes(b"nothing")
    return PreprocessConfig(slides=slides, store=tmp_path / "store", threads=1)


def statuses(summary) -> dict[str, str]:
    return {o.slide_id: o.status for o in summary.outcomes}


ALL = {"broken": "failed", "s0": "done", "s1": "done", "s2": "done"}


def in_this_process(tasks, resources, folder, name, tick, do=lambda share: share()):
    for task in tasks:
        yield from do(task)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares of an array one after another in this process."""
    monkeypatch.setattr(extract, "run_slurm", in_this_process)


def test_shares_are_disjoint_and_complete(config: PreprocessConfig):
    first = preprocess_slides(config, share=(0, 2))
    assert statuses(first) == {"broken": "failed", "s1": "done"}
    assert first.table.name == "summary-0-of-2.csv"
    second = preprocess_slides(config, share=(1, 2))
    assert statuses(first) | statuses(second) == ALL


def test_the_log_of_a_task_names_the_slides_that_failed_and_counts_the_rest(config: PreprocessConfig, capsys):
    slurm_array.ArrayElement((SlideShare(config, 0, 2),), threads=1)()
    lines = [line.split(" ", 2)[2] for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("broken: failed: ") for line in lines)
    assert lines[-1] == "share 0 of 2: 1 failed, 1 done"


@pytest.mark.usefixtures("here")
def test_shares_end_in_one_summary(config: PreprocessConfig):
    summary = fan_out(config, FanOut("slurm", tasks=3))
    assert statuses(summary) == ALL
    assert [p.name for p in config.store.glob("summary*")] == ["summary.csv"]
    assert FeatureStore.open(config.store).slide_ids() == ["s0", "s1", "s2"]


@pytest.mark.slow
def test_a_job_array_of_submitit(config: PreprocessConfig, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(extract, "run_slurm", functools.partial(slurm_array.run_slurm, cluster="local"))
    plan = FanOut("slurm", tasks=2, resources=replace(ONE_CORE, hours=0.1))
    assert statuses(fan_out(config, plan)) == ALL
    assert statuses(fan_out(config, plan)) == ALL | dict.fromkeys(("s0", "s1", "s2"), "skipped")


@pytest.mark.slow
def test_tasks_of_a_ray_cluster(config: PreprocessConfig, tmp_path):
    pytest.importorskip("ray")
    plan = FanOut("ray", tasks=2, resources=ONE_CORE, address="local")
    summary = fan_out(config, plan)
    assert statuses(summary) == ALL
    assert [p.name for p in config.store.glob("summary*")] == ["summary.csv"]
    here = config.model_copy(update={"store": tmp_path / "here"})
    preprocess_slides(here)
    stores = [FeatureStore.open(place.store, "stain-texture") for place in (config, here)]
    for slide in ("s0", "s1", "s2"):
        one, other = (store.read(slide) for store in stores)
        assert all(np.array_equal(one.features[name], other.features[name]) for name in other.features)
    with pytest.raises(ConfigError, match="encoder 'none' is unknown"):
        fan_out(config.model_copy(update={"encoders": ("none",)}), plan)


def stop_when(condition: Callable[[], object]) -> threading.Thread:
    """Start a thread that asks this process to stop once the condition holds."""

    def send() -> None:
        while not condition():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


class Dying(SlideShare):
    """A share that records its start and kills its process."""

    def __call__(self) -> list[ShareResult]:
        with (self.config.store / "attempts").open("a") as stream:
            stream.write(f"{self.name}\n")
        os.kill(os.getpid(), signal.SIGKILL)
        return []


class Waiting(SlideShare):
    """A share that runs until it is asked to stop."""

    def __call__(self) -> list[ShareResult]:
        running = self.config.store / "running"
        running.write_text(self.name)
        while not stop_requested():
            time.sleep(0.01)
        running.write_text(f"{self.name} stopped")
        return [ShareResult(self.name, stopped=True)]


@pytest.fixture
def classes_of_this_file() -> Iterator[None]:
    """Send the classes of this file to Ray's workers, which cannot import it."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.long
@pytest.mark.usefixtures("classes_of_this_file")
def test_a_share_whose_ray_worker_always_dies_is_tried_as_often_as_asked(config: PreprocessConfig, monkeypatch):
    monkeypatch.setattr(extract, "SlideShare", Dying)
    with pytest.raises(DataError, match=r"1 of 1 shares were lost in each of 2 attempts \(0 of 1\): its Ray task was"):
        fan_out(config, FanOut("ray", retries=1, resources=ONE_CORE, address="local"))
    assert (config.store / "attempts").read_text() == "share 0 of 1\n" * 2


@pytest.mark.usefixtures("here")
def test_a_lost_share_is_restarted_and_then_reported(config: PreprocessConfig, monkeypatch, caplog):
    lost = {"share 1 of 2": 1}

    def flaky(share: SlideShare) -> list[ShareResult]:
        if lost.get(share.name, 0):
            lost[share.name] -= 1
            return share.lost("the node is gone")
        return share()

    monkeypatch.setattr(extract, "run_slurm", functools.partial(in_this_process, do=flaky))
    assert statuses(fan_out(config, FanOut("slurm", tasks=2))) == ALL
    assert "share 1 of 2 was lost: the node is gone" in caplog.text
    assert "attempt 2 of 3: share 1 of 2" in caplog.text
    lost["share 0 of 2"] = 99
    with pytest.raises(
        DataError, match=r"1 of 2 shares were lost in each of 3 attempts \(0 of 2\): the node is gone\. See the exec"
    ):
        fan_out(config, FanOut("slurm", tasks=2))
    assert lost["share 0 of 2"] == 99 - 3


def test_an_unexpected_error_in_a_share_is_tried_again(config: PreprocessConfig, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise OSError("the network is down\nand more")

    monkeypatch.setattr(extract, "preprocess_slides", broken)
    [result] = SlideShare(config, 0, 1)()
    assert result.retry
    assert result.cause == "OSError: the network is down"


@pytest.mark.usefixtures("here")
def test_a_task_may_start_in_another_folder(config: PreprocessConfig, monkeypatch):
    masks = config.slides.parent / "masks"
    masks.mkdir()
    cv2.imwrite(str(masks / "s0.png"), np.full((40, 40), 255, np.uint8))
    monkeypatch.chdir(config.slides.parent)
    relative = config.model_copy(update={"slides": Path("slides"), "store": Path("store"), "masks": Path("masks")})
    seen = []

    def elsewhere(share: SlideShare) -> list[ShareResult]:
        settings = share.config
        seen.append((settings.slides, settings.store, settings.masks, settings.weights))
        return share()

    monkeypatch.setattr(extract, "run_slurm", functools.partial(in_this_process, do=elsewhere))
    fan_out(relative, FanOut("slurm", tasks=2))
    assert seen == [(config.slides, config.store, masks, None)] * 2


@pytest.mark.usefixtures("here")
def test_errors_of_the_user_come_back_as_they_are(config: PreprocessConfig):
    with pytest.raises(ConfigError, match="encoder 'none' is unknown"):
        fan_out(config.model_copy(update={"encoders": ("none",)}), FanOut("slurm", tasks=2))
    with pytest.raises(ConfigError, match="tasks=0, retries=2: expected at least 1"):
        fan_out(config, FanOut("slurm", tasks=0))


def test_a_dry_run_shows_the_script_and_checks_the_input(config: PreprocessConfig, fake_slurm: Path):
    plan = FanOut("slurm", tasks=3)
    first, script = rehearse(config, plan)
    assert first == f"would extract\t{len(find_slides(config.slides))} slides in 3 shares"
    assert script.startswith("would queue\tan array of 3\n#!/bin/bash")
    assert "#SBATCH --array=0-2%3" in script
    wrong = config.model_copy(update={"slides": config.store / "nowhere"})
    with pytest.raises(SlideError):
        list(rehearse(wrong, plan))
    with pytest.raises(SlideError):
        fan_out(wrong, plan)
    assert not (fake_slurm / "calls").exists()


def test_a_missing_sbatch_is_reported(config: PreprocessConfig, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="sbatch was not found"):
        fan_out(config, FanOut("slurm", tasks=2))


@pytest.mark.usefixtures("here")
def test_asked_to_stop_a_share_ends_after_its_batch_and_the_rest_is_not_started(config: PreprocessConfig, monkeypatch):
    batches: list[int] = []

    def stop() -> bool:
        batches.append(1)
        if len(batches) == 2:
            signal.raise_signal(signal.SIGTERM)
        return stop_requested()

    monkeypatch.setattr(extract, "stop_requested", stop)
    with pytest.raises(RequeueError, match="Asked to stop: 0 of 1 shares are finished"):
        fan_out(config.model_copy(update={"batch_size": 1}), FanOut("slurm"))
    assert len(batches) == 2
    monkeypatch.undo()
    assert statuses(preprocess_slides(config)) == ALL


def test_a_stopped_share_does_not_count_as_lost(config: PreprocessConfig):
    with graceful_stop():
        signal.raise_signal(signal.SIGUSR2)
        assert SlideShare(config, 1, 2)() == [ShareResult("share 1 of 2", stopped=True)]
    stopped = SlideShare(config, 1, 2).lost("its Ray task was lost", stopped=True)
    assert [(result.stopped, result.retry) for result in stopped] == [(True, False)]


@pytest.mark.long
@pytest.mark.usefixtures("classes_of_this_file")
def test_asked_to_stop_running_ray_tasks_end_and_the_rest_is_not_started(config: PreprocessConfig, monkeypatch):
    monkeypatch.setattr(extract, "SlideShare", Waiting)
    running = config.store / "running"
    sender = stop_when(running.exists)
    plan = FanOut("ray", tasks=2, resources=TaskResources(cpus=1, max_parallel=1), address="local")
    with pytest.raises(RequeueError, match="0 of 2 shares are finished; finished slides of the rest are kept"):
        fan_out(config, plan)
    sender.join()
    assert running.read_text() == "share 0 of 2 stopped"


def test_a_share_with_other_settings_is_other_work(config: PreprocessConfig):
    first = SlideShare(config, 0, 2)
    assert first.names == SlideShare(config, 0, 2).names
    others = [
        SlideShare(config, 1, 2),
        SlideShare(config, 0, 2, overwrite=True),
        SlideShare(config.model_copy(update={"resample": "bicubic"}), 0, 2),
    ]
    assert len({first.names, *(other.names for other in others)}) == 4


def test_asked_to_stop_the_command_leaves_the_array_to_slurm_and_waits_for_it_again(
    config: PreprocessConfig, fake_slurm: Path
):
    state, looked = fake_slurm / "state", fake_slurm / "looked"
    state.write_text("PENDING")
    plan = FanOut("slurm", tasks=3, resources=ONE_CORE)
    for _ in range(2):
        looked.unlink(missing_ok=True)
        sender = stop_when(looked.exists)
        with pytest.raises(RequeueError, match=r"SLURM's job 77 continues\. The same command .* scancel 77 ends"):
            fan_out(config, plan)
        sender.join()
        assert (fake_slurm / "calls").read_text() == "\n"
    assert "#SBATCH --job-name=cfusion-preprocess" in (fake_slurm / "asked.sh").read_text()


@pytest.mark.parametrize(("executor", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_executors_that_are_not_installed_are_named(config: PreprocessConfig, monkeypatch, executor, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"{package}, which is not installed. Install .*cfusion\[{executor}\]"):
        fan_out(config, FanOut(executor, tasks=2))


@pytest.mark.slow
def test_a_process_for_each_device_extracts_the_same_features(config: PreprocessConfig):
    summary = extract_by_device(config.model_copy(update={"devices": ("cpu", "cpu"), "threads": 2}))
    assert statuses(summary) == ALL
    assert summary.table.name == "summary.csv"
    assert not list(config.store.glob("summary-*.csv"))
    plain = preprocess_slides(config.model_copy(update={"store": config.store.with_name("plain")}))
    assert statuses(plain) == ALL
    for slide in ("s0", "s1", "s2"):
        one, other = (FeatureStore(store / "stain-texture").read(slide) for store in (config.store, plain.table.parent))
        assert all(np.array_equal(one.features[name], other.features[name]) for name in one.features)


def test_a_process_for_each_gpu_needs_one(config: PreprocessConfig):
    with pytest.raises(ConfigError, match="no GPU is visible"):
        extract_by_device(config)


def test_a_process_that_is_lost_is_reported_and_a_stop_is_passed_on(config: PreprocessConfig, monkeypatch):
    class Ended:
        exitcode = -9

        def __init__(self) -> None:
            self.asked = 0

        def join(self) -> None: ...

        def terminate(self) -> None:
            self.asked += 1

    class Silent:
        """A pipe whose other end closes at the third look."""

        looks = 0

        def poll(self, _seconds: float) -> bool:
            self.looks += 1
            return self.looks == 3

        def recv(self) -> None:
            raise EOFError

    def lost(share: SlideShare) -> extract._DeviceProcess:
        process = object.__new__(extract._DeviceProcess)
        process._share, process._asked, process._results, process._process = share, False, Silent(), Ended()
        return process

    running = lost(SlideShare(config, 0, 1))
    assert running.wait().cause == "its process ended with -9"
    assert running._process.asked == 0
    monkeypatch.setattr(extract, "stop_requested", lambda: True)
    running = lost(SlideShare(config, 0, 1))
    assert running.wait().stopped
    assert running._process.asked == 1, "once"

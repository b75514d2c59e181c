"""Fan-out: shares of the slides as tasks, and one summary of all."""

from pathlib import Path

import numpy as np
import pytest
from slide_factory import tissue_picture, write_slide

from cfusion.data.store import FeatureStore
from cfusion.errors import ConfigError, DataError, MissingExtraError
from launch import extract as executors
from launch.extract import FanOut, fan_out, run_submitit
from preprocess.extraction import preprocess_slides
from preprocess.settings import PreprocessConfig


@pytest.fixture
def config(tmp_path: Path) -> PreprocessConfig:
    slides = tmp_path / "slides"
    slides.mkdir()
    for number in range(3):
        write_slide(slides / f"s{number}.svs", tissue_picture(400, 400, seed=number, share=0.95))
    (slides / "broken.svs").write_bytes(b"nothing")
    return PreprocessConfig(slides=slides, store=tmp_path / "store")


def statuses(summary) -> dict[str, str]:
    return {o.slide_id: o.status for o in summary.outcomes}


ALL = {"broken": "failed", "s0": "done", "s1": "done", "s2": "done"}


def test_shares_are_disjoint_and_complete(config: PreprocessConfig):
    first = preprocess_slides(config, share=(0, 2))
    assert statuses(first) == {"broken": "failed", "s1": "done"}
    assert first.table.name == "summary-0-of-2.csv"
    second = preprocess_slides(config, share=(1, 2))
    assert statuses(first) | statuses(second) == ALL


def test_local_tasks_end_in_one_summary(config: PreprocessConfig):
    summary = fan_out(config, FanOut(tasks=3))
    assert statuses(summary) == ALL
    assert [p.name for p in config.store.glob("summary*")] == ["summary.csv"]
    assert FeatureStore.open(config.store).slide_ids() == ["s0", "s1", "s2"]


def test_a_job_array_of_submitit(config: PreprocessConfig, monkeypatch):
    pytest.importorskip("submitit")

    def locally(config, plan, shares, overwrite):
        return run_submitit(config, plan, shares, overwrite, cluster="local")

    monkeypatch.setattr(executors, "_on_slurm", locally)
    summary = fan_out(config, FanOut("slurm", tasks=2, minutes=5))
    assert statuses(summary) == ALL
    assert statuses(fan_out(config, FanOut("slurm", tasks=2, minutes=5))) == ALL | dict.fromkeys(
        ("s0", "s1", "s2"), "skipped"
    )


@pytest.fixture
def ray_on_loopback(monkeypatch: pytest.MonkeyPatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20,
        _node_ip_address="127.0.0.1",
    )  # fmt: skip
    yield
    ray.shutdown()


def test_tasks_of_a_ray_cluster(config: PreprocessConfig, ray_on_loopback, tmp_path):
    summary = fan_out(config, FanOut("ray", tasks=2))
    assert statuses(summary) == ALL
    assert [p.name for p in config.store.glob("summary*")] == ["summary.csv"]
    here = config.model_copy(update={"store": tmp_path / "here"})
    fan_out(here, FanOut())
    stores = [FeatureStore.open(place.store, "stain-texture") for place in (config, here)]
    for slide in ("s0", "s1", "s2"):
        one, other = (store.read(slide) for store in stores)
        assert all(np.array_equal(one.features[name], other.features[name]) for name in other.features)
    with pytest.raises(ConfigError, match="encoder 'none' is not known"):
        fan_out(config.model_copy(update={"encoders": ("none",)}), FanOut("ray", tasks=2))


def test_a_lost_share_is_restarted_and_then_reported(config: PreprocessConfig, monkeypatch, caplog):
    lost = {(1, 2): 1}

    def flaky(config, plan, shares, overwrite):
        results = []
        for share in shares:
            if lost.get(share, 0):
                lost[share] -= 1
                results.append("the node is gone")
            else:
                results.append(preprocess_slides(config, share=share, overwrite=overwrite))
        return results

    monkeypatch.setattr(executors, "_here", flaky)
    assert statuses(fan_out(config, FanOut(tasks=2))) == ALL
    assert "share 1 of 2 was lost, attempt 1: the node is gone" in caplog.text
    lost[(0, 2)] = 99
    with pytest.raises(DataError, match=r"the shares 0/2 were lost 3 times"):
        fan_out(config, FanOut(tasks=2))


def test_a_task_may_start_in_another_folder(config: PreprocessConfig, monkeypatch):
    monkeypatch.chdir(config.slides.parent)
    here = config.model_copy(update={"slides": Path("slides"), "store": Path("store"), "masks": Path()})
    seen = []

    def elsewhere(config, plan, shares, overwrite):
        seen.append((config.slides, config.store, config.masks, config.weights))
        return [preprocess_slides(config, share=share) for share in shares]

    monkeypatch.setattr(executors, "_here", elsewhere)
    fan_out(here, FanOut(tasks=2))
    assert seen == [(config.slides, config.store, config.slides.parent, None)]


def test_errors_of_the_user_come_back_as_they_are(config: PreprocessConfig, monkeypatch):
    with pytest.raises(ConfigError, match="encoder 'none' is not known"):
        fan_out(config.model_copy(update={"encoders": ("none",)}), FanOut(tasks=2))
    with pytest.raises(ConfigError, match="expected at least 1"):
        fan_out(config, FanOut(tasks=0))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="there is no srun here"):
        fan_out(config, FanOut("slurm", tasks=2))


@pytest.mark.parametrize(("executor", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_executors_that_are_not_installed_are_named(config: PreprocessConfig, monkeypatch, executor, package):
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"{package}, which is not installed. Install .*cfusion\[{executor}\]"):
        fan_out(config, FanOut(executor, tasks=2))

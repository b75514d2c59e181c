"""Members trained side by side on several threads: same results as in sequence, and reproducible."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from factories import CohortFiles, make_cohort
from group_runs import largest_difference, same_bits, train_separately, train_together

from cfusion.config import Config
from cfusion.errors import DataError, RequeueError
from cfusion.models.dropout import random_keys, seeded
from cfusion.training.folds import FoldRun
from cfusion.training.group import group
from cfusion.training.group.lanes import Lanes
from cfusion.training.group.member import GroupMember

SMALL = {"name": "crossfusion", "embed_dim": 16, "num_heads": 2}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=24, two_slides=3)


def configuration(files: CohortFiles, output: Path, **train: object) -> Config:
    """Three folds of CrossFusion in f64 with all dropout options."""
    return files.config(
        output,
        parallel={"precision": "f64", "global_batch": 5},
        model={**SMALL, "options": {"attention_dropout": 0.2}},
        train={"folds": "together", "epochs": 2, "micro_batch": 1, "ema": 0.8, **train},
    )


def with_threads(count: int, config: Config, folder: Path) -> list[FoldRun]:
    torch.set_num_threads(count)
    try:
        return train_together([config], folder)
    finally:
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def separate(files, tmp_path_factory) -> list[FoldRun]:
    """The folds of the configuration, one after the other on one thread."""
    return train_separately([configuration(files, tmp_path_factory.mktemp("separate"))])


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory) -> list[FoldRun]:
    """The same folds side by side on two threads."""
    folder = tmp_path_factory.mktemp("two")
    return with_threads(2, configuration(files, folder), folder)


@pytest.mark.slow
def test_side_by_side_equals_separate_for_any_number_of_threads(files, tmp_path, separate, undisturbed):
    three = with_threads(3, configuration(files, tmp_path), tmp_path)
    assert all(map(same_bits, undisturbed, three))
    assert max(map(largest_difference, separate, undisturbed)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    "train",
    [
        pytest.param({"loss": "cox"}, id="cox"),
        pytest.param({"patience": 1, "epochs": 4}, id="patience"),
    ],
)
def test_side_by_side_equals_separate_for_other_trainings(files, tmp_path, train):
    config = configuration(files, tmp_path, **train)
    two, three = (with_threads(count, config, tmp_path / str(count)) for count in (2, 3))
    assert all(map(same_bits, two, three))
    assert max(map(largest_difference, train_separately([config]), two)) < 1e-9


@pytest.mark.slow
def test_long_bags_are_taken_one_after_the_other(files, tmp_path, monkeypatch, separate):
    config = configuration(files, tmp_path)
    threads: dict[bool, set[str]] = {True: set(), False: set()}
    visit = GroupMember.visit

    def noted(self, delivery):
        long = int(self._all_bags.lengths[delivery.bag]) > group.LONG
        threads[long].add(threading.current_thread().name)
        visit(self, delivery)

    lengths = sorted(bag.tiles["x20"] + bag.tiles["x10"] + bag.tiles["x5"] for bag in bags_of(config))
    monkeypatch.setattr(group, "LONG", lengths[len(lengths) // 2])
    monkeypatch.setattr(GroupMember, "visit", noted)
    together = with_threads(2, config, tmp_path)
    assert threads[True] == {"MainThread"}
    assert any(name.startswith("lane") for name in threads[False])
    assert max(map(largest_difference, separate, together)) < 1e-9


def bags_of(config: Config) -> list:
    import cfusion
    from cfusion.data.bags import make_bags
    from cfusion.data.shards import ShardDataset

    cohort = cfusion.read_cohort(config.cohort)
    slides = cohort.slides_of(list(cohort.cases.index))
    return make_bags(ShardDataset.open(config.data.shards.reveal()), slides, "case", config.data.magnifications)


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [2, 5])
def test_resuming_side_by_side_after_a_stop_is_exact(files, tmp_path, monkeypatch, undisturbed, stop_at):
    config = configuration(files, tmp_path)
    calls = iter(range(1, 10**6))
    monkeypatch.setattr(group, "stop_requested", lambda: next(calls) == stop_at)
    with pytest.raises(RequeueError):
        with_threads(2, config, tmp_path / "stopped")
    assert all(map(same_bits, undisturbed, with_threads(2, config, tmp_path / "stopped")))


def test_a_loss_that_is_not_finite_names_the_bags(files, tmp_path, monkeypatch):
    from cfusion.data.loader import BagLoader

    original = BagLoader.stream

    def poisoned(self, *arguments, **options):
        for batch in original(self, *arguments, **options):
            if batch.case_ids == ("PT-0004",):
                batch.features["x20"][:] = float("nan")
            yield batch

    monkeypatch.setattr(BagLoader, "stream", poisoned)
    with pytest.raises(DataError, match=r"loss of a step is not finite. Bags of the step: .*PT-0004"):
        with_threads(2, configuration(files, tmp_path), tmp_path)


def test_lane_that_raises_ends_and_the_rest_finish():
    done: dict[str, list[int]] = {"a": [], "b": [], "c": []}

    def lane(name: str) -> Iterator[None]:
        for number in range(5):
            if (name, number) == ("b", 2):
                raise DataError("no")
            done[name].append(number)
            yield

    lanes = Lanes(2)
    failed = lanes.run({name: lane(name) for name in done})
    lanes.close()
    assert done == {"a": [0, 1, 2, 3, 4], "b": [0, 1], "c": [0, 1, 2, 3, 4]}
    assert list(failed) == ["b"]
    assert isinstance(failed["b"], DataError)


def test_threads_have_separate_seeds():
    expected = []
    for seed in (1, 2):
        with seeded(seed, CPU):
            expected.append([random_keys((4,), CPU).tolist() for _ in range(50)])
    lanes, turns = Lanes(2), threading.Barrier(2)
    found: dict[int, list[list[int]]] = {}

    def draw(seed: int) -> Iterator[None]:
        with seeded(seed, CPU):
            found[seed] = []
            for _ in range(50):
                turns.wait(10)
                found[seed].append(random_keys((4,), CPU).tolist())
        yield

    assert not lanes.run({seed: draw(seed) for seed in (1, 2)})
    lanes.close()
    assert [found[1], found[2]] == expected

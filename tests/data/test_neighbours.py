"""Graphs found while bags are read are those of the tiles that are delivered, slide by slide."""

import dataclasses
from pathlib import Path

import pytest
import torch
from factories import make_cohort

from cfusion.config import DataConfig
from cfusion.data.bags import make_bags
from cfusion.data.batches import join, read_batch, select
from cfusion.data.loader import BagLoader
from cfusion.data.shards import ShardDataset
from cfusion.models.graph import spatial_neighbours
from cfusion.types import BagBatch

MAGNIFICATIONS = (20.0, 10.0, 5.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return ShardDataset.open(make_cohort(tmp_path_factory.mktemp("cohort"), patients=3).shards)


def loader_of(dataset: ShardDataset, **config: object) -> BagLoader:
    cases = {"PT-0000": ["PT-0000-1", "PT-0000-2"], "PT-0001": ["PT-0001-1"], "PT-0002": ["PT-0002-1"]}
    bags = make_bags(dataset, cases, "case", MAGNIFICATIONS)
    return BagLoader(dataset, bags, DataConfig(**config), magnifications=MAGNIFICATIONS, seed=1, graphs={"x20": 8})


def found_again(batch: BagBatch) -> torch.Tensor:
    return spatial_neighbours(dataclasses.replace(batch, neighbours=None), "x20", 8)


@pytest.mark.parametrize("config", [{}, {"max_tiles": 20}], ids=str)
def test_neighbours_are_those_of_the_delivered_tiles(dataset: ShardDataset, config: dict):
    loader = loader_of(dataset, **config)
    (batch,) = loader.stream([[0, 1, 2]], epoch=0, training=True)
    assert set(batch.neighbours) == {"x20"}
    assert torch.equal(batch.neighbours["x20"], found_again(batch))
    slides = batch.slides["x20"]
    bag, tile, place = (batch.neighbours["x20"] >= 0).nonzero(as_tuple=True)
    assert torch.equal(slides[bag, tile], slides[bag, batch.neighbours["x20"][bag, tile, place]])
    assert config or set(slides[0].tolist()) == {0, 1}
    assert not slides[1].any()
    single = list(loader.stream([[0], [1], [2]], epoch=0, training=True))
    together = join(single)
    assert torch.equal(together.neighbours["x20"], batch.neighbours["x20"])
    assert torch.equal(together.slides["x20"], slides)
    assert single[1].slides is None


def test_bags_held_on_a_device_keep_their_graphs_unless_tiles_are_drawn(dataset: ShardDataset):
    loader = loader_of(dataset)
    held = [
        dataclasses.replace(read_batch(dataset, [bag], loader.names, [None], loader._buffers, {"x20": 8}), held=True)
        for bag in loader.bags
    ]
    (plain,) = loader.stream([[0, 1, 2]], epoch=0, training=False)
    assert torch.equal(select(held, [None] * 3).neighbours["x20"], plain.neighbours["x20"])
    rows = {name: torch.arange(2).numpy() for name in loader.names}
    assert select(held[:1], [rows]).neighbours is None


def test_a_loader_that_is_not_asked_finds_none(dataset: ShardDataset, tmp_path: Path):
    loader = loader_of(dataset)
    loader._graphs = {}
    (batch,) = loader.stream([[1]], epoch=0, training=True)
    assert batch.neighbours is None

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_up_slides import MemoryStore, make_slide

from cfusion.config import DataConfig
from cfusion.data.bags import make_bags
from cfusion.data.loader import BagLoader
from cfusion.data.shards import ShardDataset
from cfusion.errors import DataError
from preprocess.packing import pack_store

MAGNIFICATIONS = (20.0, 10.0, 5.0)


@pytest.fixture(scope="module")
def slides():
    return {s.slide_id: s for s in [make_slide(f"s{i}", cells=3 + i % 5, seed=i) for i in range(12)]}


@pytest.fixture(scope="module")
def dataset(slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    pack_store(MemoryStore(slides.values()), out, target_bytes=40_000)
    return ShardDataset.open(out)


@pytest.fixture(scope="module")
def bags(dataset):
    return make_bags(dataset, {f"c{i}": [f"s{2 * i}", f"s{2 * i + 1}"] for i in range(6)}, "case", MAGNIFICATIONS)


def test_a_case_holds_the_tiles_of_its_slides_in_order(dataset, bags, slides):
    loader = BagLoader(dataset, bags, DataConfig(), magnifications=MAGNIFICATIONS, seed=0)
    for i, batch in enumerate(loader.stream([[i] for i in range(6)], epoch=0, training=False)):
        assert batch.case_ids == (f"c{i}",)
        assert batch.masks is None
        for name in ("x20", "x10", "x5"):
            expected = np.concatenate([slides[s].features[name] for s in bags[i].slide_ids]).astype(np.float32)
            assert batch.features[name].dtype == torch.float32
            np.testing.assert_array_equal(batch.features[name][0].numpy(), expected)


def test_shorter_bags_are_padded_with_zeros_and_masked(dataset, bags):
    loader = BagLoader(dataset, bags, DataConfig(), magnifications=MAGNIFICATIONS, seed=0)
    (batch,) = loader.stream([[0, 2, 4]], epoch=0, training=True)
    for name in ("x20", "x10", "x5"):
        counts = [bags[i].tiles[name] for i in (0, 2, 4)]
        assert batch.masks[name].sum(dim=1).tolist() == counts
        assert batch.features[name].shape[1] == max(counts)
        assert not batch.features[name][~batch.masks[name]].any()


def test_positions_keep_parents_above_children_and_slides_apart(dataset, bags):
    loader = BagLoader(dataset, bags, DataConfig(), magnifications=MAGNIFICATIONS, seed=0)
    for batch in loader.stream([[i] for i in range(6)], epoch=0, training=False):
        fine, middle, coarse = (batch.positions[name][0] for name in ("x20", "x10", "x5"))
        for table in (fine, middle, coarse):
            assert len(torch.unique(table, dim=0)) == len(table)
        assert {tuple(p) for p in (fine // 2).tolist()} == {tuple(p) for p in middle.tolist()}
        assert {tuple(p) for p in (middle // 2).tolist()} == {tuple(p) for p in coarse.tolist()}


def test_slides_without_the_magnification_or_outside_the_shards_are_named(dataset):
    with pytest.raises(DataError, match=r"no magnification x40; the shards hold x20, x10, x5.*data\.magnifications"):
        make_bags(dataset, {"c": ["s0"]}, "slide", (40.0,))
    with pytest.raises(DataError, match="1 slides are not in the shards: gone"):
        make_bags(dataset, {"c": ["s0", "gone"]}, "case", (20.0,))
    with pytest.raises(DataError, match="Patients without a slide: c"):
        make_bags(dataset, {"c": []}, "case", (20.0,))


def test_slides_as_bags_keep_their_case(dataset):
    bags = make_bags(dataset, {"c": ["s1", "s0"]}, "slide", (20.0,))
    assert [(bag.key, bag.case_id, bag.slide_ids) for bag in bags] == [("s1", "c", ("s1",)), ("s0", "c", ("s0",))]

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_slides import MemoryStore, make_slide

from cfusion.config import DataConfig
from cfusion.data.bags import make_bags
from cfusion.data.batches import read_batch
from cfusion.data.buffers import Buffers
from cfusion.data.cache import choose_cache, free_ram_bytes
from cfusion.data.loader import BagLoader
from cfusion.data.shard_files import OpenFile
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


@pytest.fixture(scope="module")
def single(dataset, slides):
    return make_bags(dataset, {slide_id: [slide_id] for slide_id in slides}, "case", MAGNIFICATIONS)


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
    with pytest.raises(DataError, match=r"no magnification x40; the shards have x20, x10, x5.*data\.magnifications"):
        make_bags(dataset, {"c": ["s0"]}, "slide", (40.0,))
    with pytest.raises(DataError, match="1 slides are not in the shards: gone"):
        make_bags(dataset, {"c": ["s0", "gone"]}, "case", (20.0,))
    with pytest.raises(DataError, match="Patients without a slide: c"):
        make_bags(dataset, {"c": []}, "case", (20.0,))


def test_slides_as_bags_keep_their_case(dataset):
    bags = make_bags(dataset, {"c": ["s1", "s0"]}, "slide", (20.0,))
    assert [(bag.key, bag.case_id, bag.slide_ids) for bag in bags] == [("s1", "c", ("s1",)), ("s0", "c", ("s0",))]


def stream(dataset, bags, batches, *, epoch=0, training=True, seed=0, dtype=torch.float32, **config):
    loader = BagLoader(dataset, bags, DataConfig(**config), magnifications=MAGNIFICATIONS, seed=seed, dtype=dtype)
    return list(loader.stream(batches, epoch=epoch, training=training))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.case_ids == b.case_ids
        assert (a.masks is None) == (b.masks is None)
        for name in a.features:
            assert torch.equal(a.features[name], b.features[name])
            assert a.masks is None or torch.equal(a.masks[name], b.masks[name])
            assert (a.positions is None) == (b.positions is None)
            assert a.positions is None or torch.equal(a.positions[name], b.positions[name])


BATCHES = [[0, 3], [5], [1, 2, 4], [3], [0]]


@pytest.mark.parametrize("config", [{}, {"max_tiles": 40}, {"feature_dropout": 0.25}, {"max_tiles": 9}])
def test_neither_threads_nor_memory_nor_caches_change_a_batch(dataset, bags, config, monkeypatch):
    expected = stream(dataset, bags, BATCHES, read_threads=1, **config)
    assert_equal(expected, stream(dataset, bags, BATCHES, read_threads=4, **config))
    assert_equal(expected, stream(dataset, bags, BATCHES, read_threads=3, buffer_bytes=1 << 20, **config))
    held = ShardDataset.open(dataset.directory)
    for _ in range(2):
        assert_equal(expected, stream(held, bags, BATCHES, cache="ram", **config))
    monkeypatch.setattr("cfusion.data.loader.free_device_bytes", lambda _: 1 << 40)
    assert_equal(expected, stream(dataset, bags, BATCHES, cache="gpu", **config))


def test_sampled_tiles_keep_their_parents_and_their_number(dataset, bags):
    unsampled = stream(dataset, bags, [[i] for i in range(6)])
    drawn = stream(dataset, bags, [[i] for i in range(6)], max_tiles=40)
    for full, part in zip(unsampled, drawn, strict=True):
        assert part.features["x20"].shape[1] == 40
        for name in ("x20", "x10", "x5"):
            # Each kept row is a row of the full bag, with its position, and in the bag's order.
            rows = [
                (full.features[name][0] == row).all(dim=1).nonzero()[:, 0].tolist() for row in part.features[name][0]
            ]
            assert all(len(found) == 1 for found in rows)
            order = [found[0] for found in rows]
            assert order == sorted(order)
            assert torch.equal(full.positions[name][0, order], part.positions[name][0])
        above = {tuple(p) for p in (part.positions["x20"][0] // 2).tolist()}
        assert above == {tuple(p) for p in part.positions["x10"][0].tolist()}
        above = {tuple(p) for p in (part.positions["x10"][0] // 2).tolist()}
        assert above == {tuple(p) for p in part.positions["x5"][0].tolist()}


def test_tiles_are_resampled_each_epoch_and_not_sampled_in_evaluation(dataset, bags):
    first, again = (stream(dataset, bags, [[0]], max_tiles=20, epoch=1)[0].features["x20"] for _ in range(2))
    other = stream(dataset, bags, [[0]], max_tiles=20, epoch=2)[0].features["x20"]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (
        stream(dataset, bags, [[0]], max_tiles=20, training=False)[0].features["x20"].shape[1] == bags[0].tiles["x20"]
    )


@pytest.mark.slow
def test_every_tile_is_drawn_about_equally_often(dataset, bags):
    total, most = bags[0].tiles["x20"], 24
    counts = torch.zeros(total)
    unsampled = stream(dataset, bags, [[0]])[0].positions["x20"][0]
    places = {tuple(place): row for row, place in enumerate(unsampled.tolist())}
    epochs = 400
    for epoch in range(epochs):
        (batch,) = stream(dataset, bags, [[0]], max_tiles=most, epoch=epoch)
        for place in batch.positions["x20"][0].tolist():
            counts[places[tuple(place)]] += 1
    share = most / total
    # Families are drawn together, so a tile's count is binomial; five standard deviations.
    assert (counts / epochs - share).abs().max() < 5 * (share * (1 - share) / epochs) ** 0.5


def test_tiles_without_parents_are_drawn_in_the_same_proportion(tmp_path):
    pack_store(MemoryStore([make_slide("s", cells=10, coords=False)]), tmp_path)
    dataset = ShardDataset.open(tmp_path)
    bags = make_bags(dataset, {"c": ["s"]}, "case", MAGNIFICATIONS)
    (batch,) = stream(dataset, bags, [[0]], max_tiles=40)
    assert {name: table.shape[1] for name, table in batch.features.items()} == {"x20": 40, "x10": 10, "x5": 2}
    assert batch.positions is None


def test_tiles_of_a_single_magnification_are_sampled(dataset):
    bags = make_bags(dataset, {"c": ["s0", "s1"]}, "case", (5.0,))
    loader = BagLoader(dataset, bags, DataConfig(max_tiles=3), magnifications=(5.0,), seed=0)
    (batch,) = loader.stream([[0]], epoch=0, training=True)
    (unsampled,) = loader.stream([[0]], epoch=0, training=False)
    rows = [(unsampled.features["x5"][0] == row).all(dim=1).nonzero().item() for row in batch.features["x5"][0]]
    assert rows == sorted(set(rows))
    assert len(rows) == 3


@pytest.mark.slow
def test_feature_dropout_zeroes_the_same_channels_throughout_a_bag_and_keeps_the_mean(dataset, bags):
    unsampled = stream(dataset, bags, [[0, 1]])[0]
    share, epochs = 0.25, 100
    kept = torch.zeros(epochs, 2, 8)
    for epoch in range(epochs):
        (batch,) = stream(dataset, bags, [[0, 1]], feature_dropout=share, epoch=epoch)
        for bag in range(2):
            for name in ("x20", "x10", "x5"):
                rows = batch.masks[name][bag]
                zero = (batch.features[name][bag][rows] == 0).all(dim=0)
                kept[epoch, bag] = (~zero).float()
                factor = torch.where(zero, 0.0, 1 / (1 - share))
                torch.testing.assert_close(batch.features[name][bag], unsampled.features[name][bag] * factor)
            assert torch.equal((batch.features["x20"][bag] == 0).all(dim=0), zero)
    assert abs(kept.mean().item() - (1 - share)) < 0.03
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert torch.equal(
        stream(dataset, bags, [[0]], feature_dropout=share, training=False)[0].features["x20"],
        stream(dataset, bags, [[0]])[0].features["x20"],
    )


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.bfloat16])
def test_features_come_in_the_asked_type(dataset, bags, slides, dtype):
    (batch,) = stream(dataset, bags, [[0]], dtype=dtype)
    expected = np.concatenate([slides[s].features["x10"] for s in bags[0].slide_ids])
    assert batch.features["x10"].dtype == (dtype or torch.float16)
    assert torch.equal(batch.features["x10"][0], torch.from_numpy(expected).to(dtype or torch.float16))


@pytest.mark.parametrize("cache", ["page", "gpu"])
def test_int8_bags_are_scaled_slide_by_slide(slides, tmp_path, cache, monkeypatch):
    monkeypatch.setattr("cfusion.data.loader.free_device_bytes", lambda _: 1 << 40)
    pack_store(MemoryStore(slides.values()), tmp_path, dtype="int8")
    dataset = ShardDataset.open(tmp_path)
    bags = make_bags(dataset, {"a": ["s0", "s1"], "b": ["s2"]}, "case", MAGNIFICATIONS)
    (batch,) = stream(dataset, bags, [[0, 1]], cache=cache)
    for bag, slide_ids in enumerate((["s0", "s1"], ["s2"])):
        expected = np.concatenate([slides[s].features["x20"] for s in slide_ids]).astype(np.float32)
        got = batch.features["x20"][bag].numpy()
        scale = max(np.abs(slides[s].features["x20"]).max() for s in slide_ids) / 127
        np.testing.assert_allclose(got[: len(expected)], expected, atol=float(scale) * 0.51)
        assert not got[len(expected) :].any()
    (drawn,) = stream(dataset, bags, [[0, 1]], cache=cache, max_tiles=20)
    assert drawn.features["x20"].shape[1] == 20


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_int8_bags_come_in_the_asked_type_rounded_once(tmp_path, dtype):
    # More rows than are widened at a time.
    pack_store(MemoryStore([make_slide("a", cells=40), make_slide("b", cells=3)]), tmp_path, dtype="int8")
    dataset = ShardDataset.open(tmp_path)
    bags = make_bags(dataset, {"c": ["a", "b"]}, "case", MAGNIFICATIONS)
    (batch,) = stream(dataset, bags, [[0]], dtype=dtype)
    read = [dataset.read(slide_id, ["x20", "scale_x20"]) for slide_id in ("a", "b")]
    expected = np.concatenate([slide["x20"].astype(np.float32) * slide["scale_x20"] for slide in read])
    assert torch.equal(batch.features["x20"][0], torch.from_numpy(expected).to(dtype or torch.float16))


def test_read_ahead_keeps_to_its_bytes(dataset, bags, monkeypatch):
    held, most = [0], [0]
    size = BagLoader(dataset, bags, DataConfig(), magnifications=MAGNIFICATIONS, seed=0)._bytes([0])
    config = DataConfig.model_construct(**DataConfig().model_dump() | {"buffer_bytes": int(2.5 * size)})
    loader = BagLoader(dataset, bags, config, magnifications=MAGNIFICATIONS, seed=0)
    submit = loader._threads.submit

    def counted(read, batch):
        held[0] += 1
        most[0] = max(most[0], held[0])
        return submit(read, batch)

    monkeypatch.setattr(loader._threads, "submit", counted)
    for _ in loader.stream([[0]] * 20, epoch=0, training=True):
        held[0] -= 1
    assert held[0] == 0
    # Two ahead of the one that is the caller's.
    assert most[0] == 3


def test_sampled_bags_count_by_the_tiles_that_are_drawn(dataset, bags):
    size = BagLoader(dataset, bags, DataConfig(), magnifications=MAGNIFICATIONS, seed=0)._bytes([0])
    config = DataConfig.model_construct(**DataConfig(max_tiles=4).model_dump() | {"buffer_bytes": size})
    loader = BagLoader(dataset, bags, config, magnifications=MAGNIFICATIONS, seed=0)
    for training, ahead in ((False, 1), (True, 4 * config.read_threads)):
        asked = []
        batches = loader.stream((asked.append(0) or [0] for _ in range(20)), epoch=0, training=training)
        next(batches)
        batches.close()
        assert len(asked) == 1 + ahead + 1


def test_memory_of_bags_keeps_to_the_bound(tmp_path):
    pack_store(MemoryStore([make_slide(f"s{i}", cells=30, dim=256, seed=i) for i in range(3)]), tmp_path)
    dataset = ShardDataset.open(tmp_path)
    bags = make_bags(dataset, {f"c{i}": [f"s{i}"] for i in range(3)}, "case", MAGNIFICATIONS)
    bound = 4 << 20
    config = DataConfig(buffer_bytes=bound, read_threads=4)
    loader = BagLoader(dataset, bags, config, magnifications=MAGNIFICATIONS, seed=0)
    one = loader._bytes([0])
    assert 2 * one < bound < 8 * one
    for batch in loader.stream([[0], [1], [2]] * 20, epoch=0, training=True):
        # Size classes round up by at most an eighth; the delivered batch is the caller's.
        assert loader._buffers.in_use + loader._buffers.kept <= (bound + one) * 9 / 8
        del batch


def test_bags_larger_than_the_bound_are_read_one_ahead_while_the_caller_computes(dataset, bags):
    config = DataConfig.model_construct(**DataConfig().model_dump() | {"buffer_bytes": 1})
    loader = BagLoader(dataset, bags, config, magnifications=MAGNIFICATIONS, seed=0)
    asked = []
    batches = loader.stream((asked.append(i) or [i] for i in range(4)), epoch=0, training=True)
    for delivered, _ in enumerate(batches, 1):
        # The next is being read; the one behind it was looked at, and waits for room.
        assert len(asked) == min(delivered + 2, 4)


def test_kept_batches_are_not_overwritten_by_later_ones(tmp_path):
    slides = [make_slide(f"s{i}", cells=40, dim=300, seed=i) for i in range(4)]
    pack_store(MemoryStore(slides), tmp_path)
    dataset = ShardDataset.open(tmp_path)
    bags = make_bags(dataset, {f"c{i}": [f"s{i}"] for i in range(4)}, "case", MAGNIFICATIONS)
    kept = stream(dataset, bags, [[0], [1], [2], [3]] * 3, dtype=None)
    for number, batch in enumerate(kept):
        np.testing.assert_array_equal(batch.features["x20"][0].numpy(), slides[number % 4].features["x20"])


@pytest.mark.parametrize("cache", ["page", "ram", "gpu"])
def test_what_a_caller_writes_into_a_batch_reaches_neither_the_shards_nor_the_next_epoch(
    single, dataset, cache, monkeypatch
):
    monkeypatch.setattr("cfusion.data.loader.free_device_bytes", lambda _: 1 << 40)
    before = {path: path.read_bytes() for path in Path(dataset.directory).iterdir()}
    (expected,) = stream(dataset, single, [[0]], dtype=None)
    expected = {"x20": expected.features["x20"].clone(), "at": expected.positions["x20"].clone()}
    config = DataConfig(cache=cache)
    own = ShardDataset.open(dataset.directory)
    loader = BagLoader(own, single, config, magnifications=MAGNIFICATIONS, seed=0, dtype=None)
    for _ in range(2):
        (batch,) = loader.stream([[0]], epoch=0, training=True)
        assert torch.equal(batch.features["x20"], expected["x20"])
        assert torch.equal(batch.positions["x20"], expected["at"])
        batch.features["x20"].zero_()
        batch.positions["x20"].zero_()
    assert before == {path: path.read_bytes() for path in Path(dataset.directory).iterdir()}


@pytest.mark.parametrize("config", [{"dtype": None}, {}, {"feature_dropout": 0.25}])
def test_where_a_system_cannot_map_files_bags_are_read_and_the_same(dataset, single, config, monkeypatch):
    batches = [[i] for i in range(len(single))]
    expected = stream(dataset, single, batches, **config)
    monkeypatch.setattr(OpenFile, "mapped", lambda *_: None)
    assert_equal(expected, stream(dataset, single, batches, **config))


@pytest.mark.parametrize("config", [{}, {"max_tiles": 40, "feature_dropout": 0.2}])
def test_batches_for_another_device_are_finished_there(dataset, bags, config):
    # The meta device has shapes and no data: it stands in for a GPU.
    loader = BagLoader(dataset, bags, DataConfig(**config), magnifications=MAGNIFICATIONS, seed=0, device="meta")
    there = list(loader.stream(BATCHES, epoch=0, training=True))
    for batch, here in zip(there, stream(dataset, bags, BATCHES, **config), strict=True):
        for moved, stayed in (
            (batch.features, here.features),
            (batch.masks, here.masks),
            (batch.positions, here.positions),
        ):
            assert (moved is None) == (stayed is None)
            for name, tensor in (moved or {}).items():
                assert tensor.device.type == "meta"
                assert (tensor.shape, tensor.dtype) == (stayed[name].shape, stayed[name].dtype)


def test_positions_are_left_out_where_no_model_reads_them_and_neighbours_are_found_nonetheless(dataset, bags):
    loaders = [
        BagLoader(
            dataset, bags, DataConfig(), magnifications=MAGNIFICATIONS, seed=0, graphs={"x20": 3}, positions=wanted
        )
        for wanted in (True, False)
    ]
    for with_them, without in zip(*(one.stream([[0], [1, 2]], epoch=0, training=True) for one in loaders), strict=True):
        assert with_them.positions is not None
        assert without.positions is None
        assert torch.equal(with_them.neighbours["x20"], without.neighbours["x20"])
        for name, features in with_them.features.items():
            assert torch.equal(features, without.features[name])


def test_all_that_a_batch_for_a_gpu_holds_is_pinned(dataset, bags, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    buffers = Buffers(1 << 20, pinned=False)
    monkeypatch.setattr(buffers, "pinned", True)
    monkeypatch.setattr(buffers, "empty", lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype))
    raw = read_batch(dataset, [bags[0]], ["x20", "x10", "x5"], [None], buffers, {"x20": 2})
    assert raw.neighbours is not None
    assert {id(tensor) for tensor in raw.tensors()} <= {id(tensor) for tensor in pinned}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: python -m pytest -m gpu")
@pytest.mark.parametrize(
    "config", [{}, {"max_tiles": 40}, {"feature_dropout": 0.25}, {"cache": "gpu", "max_tiles": 40}]
)
def test_a_gpu_gets_the_same_batches(dataset, bags, config):
    loader = BagLoader(dataset, bags, DataConfig(**config), magnifications=MAGNIFICATIONS, seed=0, device="cuda")
    there = [batch.to("cpu") for batch in loader.stream(BATCHES * 20, epoch=0, training=True)]
    torch.cuda.synchronize()
    here = stream(dataset, bags, BATCHES * 20, **{k: v for k, v in config.items() if k != "cache"})
    for batch, expected in zip(there, here, strict=True):
        for name in batch.features:
            torch.testing.assert_close(batch.features[name], expected.features[name])


def test_memory_is_used_again_once_a_batch_is_gone():
    buffers = Buffers(1 << 24, pinned=False)
    first = buffers.empty((1 << 20,), torch.float32)
    address = first.data_ptr()
    view = first[:10]
    del first
    assert buffers.empty((1 << 20,), torch.float32).data_ptr() != address
    del view
    assert buffers.empty((1 << 21,), torch.float16).data_ptr() == address


def test_a_reader_that_stops_early_leaves_nothing_running(dataset, bags):
    loader = BagLoader(dataset, bags, DataConfig(), magnifications=MAGNIFICATIONS, seed=0)
    batches = loader.stream([[0]] * 50, epoch=0, training=True)
    next(batches)
    batches.close()
    assert len(list(loader.stream([[1]], epoch=0, training=True))) == 1


@pytest.mark.parametrize(
    ("wanted", "needed", "ram", "gpu", "place"),
    [
        ("page", 1, 100, 100, "page"),
        ("ram", 80, 100, 0, "ram"),
        ("ram", 81, 100, 0, "page"),
        ("gpu", 50, 0, 100, "gpu"),
        ("gpu", 51, 100, 100, "ram"),
        ("gpu", 90, 100, 100, "page"),
        ("gpu", 10, 100, 0, "ram"),
    ],
)
def test_a_cache_is_chosen_by_what_fits(wanted, needed, ram, gpu, place):
    chosen, why = choose_cache(wanted, needed, ram, gpu)
    assert chosen == place
    assert why.startswith(f"cache {place}: ")


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "2"}, 2),
        ({"CFUSION_SLOTS": "3"}, 3),
        ({"CFUSION_SLOTS": "3", "LOCAL_WORLD_SIZE": "2"}, 6),
        ({"CFUSION_SLOTS": ""}, 1),
    ],
)
def test_the_free_memory_is_shared_with_the_other_processes_and_the_other_runs_of_a_sweep(
    monkeypatch, variables, processes
):
    for name in ("LOCAL_WORLD_SIZE", "CFUSION_SLOTS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("cfusion.data.cache.free_memory_bytes", lambda: 60)
    assert free_ram_bytes() == 60 // processes


def test_the_chosen_cache_is_logged_with_its_bytes(dataset, bags, caplog, monkeypatch):
    monkeypatch.setattr("cfusion.data.loader.free_ram_bytes", lambda: 10)
    with caplog.at_level("INFO", logger="cfusion.data.loader"):
        stream(dataset, bags, [[0]], cache="ram")
    assert "cache page: " in caplog.text
    assert "GB of bags do not fit" in caplog.text

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfusion.data.partition import bag_cost, distribute, earlier_draws, epoch_order, evaluation_slices, global_batches
from cfusion.errors import ConfigError

COSTS = st.lists(st.floats(1, 1e6), min_size=0, max_size=120)


def keys(n):
    return [f"case-{number}" for number in range(n)]


@settings(deadline=None, max_examples=300)
@given(COSTS, st.integers(1, 33), st.integers(1, 5))
def test_distribute_gives_every_bag_once_in_equally_many_passes(costs, world, micro):
    distributed = distribute(costs, world, micro)
    assert len(distributed) == world
    assert len({len(batches) for batches in distributed}) == 1
    counted = [
        index
        for batches in distributed
        for batch in batches
        for index, weight in zip(batch.indices, batch.weights, strict=True)
        if weight
    ]
    assert sorted(counted) == list(range(len(costs)))
    for batch in (batch for batches in distributed for batch in batches):
        assert 1 <= len(batch.indices) <= micro
        assert set(batch.weights) in ({0}, {1})
    assert len(distributed[0]) == -(-len(costs) // (world * micro))


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(
    n=st.integers(0, 200), batch=st.integers(1, 50), seen=st.integers(0, 5), worlds=st.tuples(*[st.integers(1, 16)] * 2)
)
def test_resuming_at_another_world_size_repeats_the_global_batches(n, batch, seen, worlds):
    order = epoch_order(keys(n), seed=3, epoch=2)
    assert sorted(order) == list(range(n))
    full = global_batches(order, batch)
    resumed = global_batches(order[seen * batch :], batch)
    assert [b.tolist() for b in full[seen:]] == [b.tolist() for b in resumed]
    costs = np.random.default_rng(n).lognormal(size=n)
    for step in resumed:
        read = [
            sorted(
                int(step[i])
                for batches in distribute(costs[step], world)
                for micro in batches
                for i, weight in zip(micro.indices, micro.weights, strict=True)
                if weight
            )
            for world in worlds
        ]
        assert read[0] == read[1] == sorted(step.tolist())


@settings(deadline=None, max_examples=100)
@given(n=st.integers(1, 60), data=st.data())
def test_the_order_of_a_subset_is_its_order_in_the_full_set(n, data):
    part = data.draw(st.lists(st.sampled_from(keys(n)), unique=True))
    full = [keys(n)[i] for i in epoch_order(keys(n), seed=3, epoch=4)]
    assert [part[i] for i in epoch_order(part, seed=3, epoch=4)] == [key for key in full if key in part]


def test_orders_differ_by_epoch_and_seed_and_are_fixed():
    assert epoch_order(keys(10), seed=7, epoch=0).tolist() == epoch_order(keys(10), seed=7, epoch=0).tolist()
    assert epoch_order(keys(50), seed=7, epoch=0).tolist() != epoch_order(keys(50), seed=7, epoch=1).tolist()
    assert epoch_order(keys(50), seed=7, epoch=0).tolist() != epoch_order(keys(50), seed=8, epoch=0).tolist()


@given(st.lists(st.integers(0, 9), max_size=60))
def test_earlier_draws_count_each_bag_from_its_first(order):
    seen = earlier_draws(np.array(order, dtype=np.int64))
    assert seen.tolist() == [order[:place].count(bag) for place, bag in enumerate(order)]


def test_weighted_order_draws_in_proportion_and_never_a_weight_of_zero():
    weights = [0, 1, 3, 0]
    drawn = np.concatenate([epoch_order(keys(4), seed=1, epoch=e, weights=weights) for e in range(3000)])
    share = np.bincount(drawn, minlength=4) / len(drawn)
    assert share[0] == share[3] == 0
    # Four standard errors of 12,000 draws.
    assert abs(share[2] - 0.75) < 4 * np.sqrt(0.75 * 0.25 / len(drawn))


@pytest.mark.parametrize("weights", [[1, 2], [0, 0, 0], [1, -1, 1], [1, float("nan"), 1]])
def test_weights_that_cannot_be_drawn_from_are_refused(weights):
    with pytest.raises(ConfigError, match="3 finite numbers"):
        epoch_order(keys(3), seed=0, epoch=0, weights=weights)


@settings(deadline=None, max_examples=200)
@given(COSTS, st.integers(1, 33))
def test_evaluation_slices_hold_every_bag_once(costs, world):
    slices = evaluation_slices(costs, world)
    assert len(slices) == world
    assert sorted(np.concatenate(slices).tolist()) == list(range(len(costs)))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 9), st.integers(20, 200))
def test_micro_batches_keep_to_the_token_budget(lengths, world, budget):
    distributed = distribute([float(n) for n in lengths], world, lengths=lengths, token_budget=budget)
    assert len({len(batches) for batches in distributed}) == 1
    counted = [i for share in distributed for m in share for i, w in zip(m.indices, m.weights, strict=True) if w]
    assert sorted(counted) == list(range(len(lengths)))
    for micro in (micro for batches in distributed for micro in batches):
        assert len(micro.indices) == 1 or len(micro.indices) * max(lengths[i] for i in micro.indices) <= budget


def cost_of(tiles):
    return bag_cost({"x20": int(tiles), "x10": int(tiles / 4), "x5": int(tiles / 16)})


@pytest.mark.parametrize(("world", "bags"), [(8, 8), (64, 8), (64, 32), (512, 8)])
def test_dealing_by_cost_loses_at_most_three_percent_where_random_loses_far_more(world, bags):
    tiles = np.random.default_rng(world).lognormal(np.log(9000), 0.5, size=world * bags)
    costs = np.array([cost_of(min(n, 24_000)) for n in tiles])
    loads = [sum(costs[i] for micro in batches for i in micro.indices) for batches in distribute(costs, world)]
    at_random = costs.reshape(world, bags).sum(axis=1)
    assert max(loads) / np.mean(loads) < 1.03
    assert at_random.max() / at_random.mean() > 1.2


def test_cost_grows_with_the_square_of_source_tokens_and_with_every_tile():
    assert cost_of(80_000) > 4 * cost_of(20_000)
    assert bag_cost({"x20": 100}) * 2 == bag_cost({"x20": 200})
    assert bag_cost({"x20": 100, "x10": 25}) < bag_cost({"x20": 101, "x10": 25}) < bag_cost({"x20": 100, "x10": 26})


def test_cost_counts_the_tiles_that_are_drawn():
    tiles = {"x20": 4000, "x10": 1000, "x5": 250}
    assert bag_cost(tiles, max_tiles=400) == bag_cost({"x20": 400, "x10": 100, "x5": 25})
    assert bag_cost(tiles, max_tiles=5000) == bag_cost(tiles)


def test_an_empty_batch_has_nothing_to_distribute():
    assert distribute([], 3) == [[], [], []]


def test_fewer_bags_than_ranks_are_padded_with_weight_zero():
    distributed = distribute([5.0, 1.0], 4)
    assert sorted(batches[0].weights for batches in distributed) == [(0,), (0,), (1,), (1,)]
    assert {batches[0].indices for batches in distributed if batches[0].weights == (0,)} == {(1,)}

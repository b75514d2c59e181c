"""Graphs of tiles: exact neighbours, their order, and sums over edges."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_bags import bag, pad

from cfusion.errors import DataError
from cfusion.models import graph
from cfusion.models.graph import (
    Edges,
    latent_neighbours,
    nearest_embeddings,
    softmax_of_messages,
    spatial_neighbours,
    sum_of_messages,
)
from cfusion.neighbours import nearest_tiles, spatial_edges


def by_all_pairs(coords: np.ndarray, k: int) -> list[list[int]]:
    """Neighbours by sorting every other tile by distance, then row."""
    rows = range(len(coords))
    distance = ((coords[:, None] - coords[None]) ** 2).sum(axis=2)
    return [sorted((j for j in rows if j != i), key=lambda j: (distance[i, j], j))[:k] for i in rows]


@settings(deadline=None, max_examples=60, database=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60), st.integers(1, 9))
def test_neighbours_are_exact_and_ties_are_in_the_order_of_the_rows(cells: list[tuple[int, int]], k: int):
    coords = np.array(cells)
    near = nearest_tiles(coords, k)
    assert near.shape == (len(coords), k)
    assert [[j for j in row if j >= 0] for row in near.tolist()] == by_all_pairs(coords, k)
    edges = spatial_edges(coords, k)
    assert edges.T.tolist() == [[i, j] for i, row in enumerate(by_all_pairs(coords, k)) for j in row]


def test_many_tiles_at_one_place_take_bounded_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cfusion.neighbours._CANDIDATES", 100)
    near = nearest_tiles(np.zeros((70, 2), np.int64), 3)
    assert near.tolist() == [[j for j in range(4) if j != i][:3] for i in range(70)]


def test_neighbours_lie_in_the_same_slide():
    coords, slides = np.array([[0, 0], [1, 0], [2, 0], [3, 0], [4, 0]]), np.array([0, 0, 1, 1, 1])
    assert nearest_tiles(coords, 2, slides).tolist() == [[1, -1], [0, -1], [3, 4], [2, 4], [3, 2]]
    assert spatial_edges(np.zeros((1, 2)), 8).shape == (2, 0)


def test_a_graph_of_100_000_tiles_takes_seconds():
    coords = np.random.default_rng(0).permutation(400 * 400)[:100_000]
    begin = time.process_time()
    near = nearest_tiles(np.stack([coords % 400, coords // 400], axis=1), 8)
    assert (near >= 0).all()
    assert time.process_time() - begin < 20


def test_a_batch_has_the_graphs_of_its_bags():
    bags = [bag(1, 3), bag(2, 9)]
    batch = pad(bags, 2)
    together = spatial_neighbours(batch, "x20", 8)
    for number, one in enumerate(bags):
        tiles = one.features["x20"].shape[1]
        single = nearest_tiles(one.positions["x20"][0].numpy(), 8)
        assert together[number, :tiles].tolist() == single.tolist()
        assert (together[number, tiles:] == -1).all()
    loaded = dataclasses.replace(batch, positions=None, neighbours={"x20": together})
    assert torch.equal(spatial_neighbours(loaded, "x20", 3), together[:, :, :3])
    with pytest.raises(DataError, match="needs the position of every x20 tile, and these bags have none"):
        spatial_neighbours(dataclasses.replace(batch, positions=None), "x20", 8)


def test_edges_between_embeddings_are_exact_in_blocks_and_stay_in_the_slide(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph, "DISTANCE_ELEMENTS", 60)
    tiles = torch.randn(23, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.cdist(tiles.double(), tiles.double()).fill_diagonal_(torch.inf).argsort(dim=1)
    assert torch.equal(nearest_embeddings(tiles, 4), expected[:, :4])
    assert torch.equal(nearest_embeddings(tiles, 40), expected[:, :22])
    batch = pad([bag(1, 3), bag(2, 9)])
    slides = torch.arange(18).ge(7).long().expand(2, -1)
    found = latent_neighbours(dataclasses.replace(batch, slides={"x20": slides}), "x20", 4)
    assert (found[0, 6:] == -1).all()
    assert found[1].ge(0).all()
    assert (found[1, :7] < 7).all()
    assert (found[1, 7:] >= 7).all()


@pytest.mark.parametrize("to_neighbours", [False, True])
def test_sums_over_edges_and_their_gradients(to_neighbours: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph, "EDGE_ELEMENTS", 12)
    generator = torch.Generator().manual_seed(1)
    neighbours = torch.tensor([[[1, 2], [0, 2], [-1, -1]], [[1, -1], [2, 0], [1, 0]]])
    edges = Edges.of(neighbours, to_neighbours)
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2), (3, 4), (4, 5), (4, 3), (5, 4), (5, 3)]
    assert list(zip(*(e.tolist() for e in (edges.source, edges.target)), strict=True)) == [
        (a, b) if to_neighbours else (b, a) for a, b in pairs
    ]
    values = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([-1.7], dtype=torch.float64, requires_grad=True)
    senders = [[a if to_neighbours else b for a, b in pairs if (b if to_neighbours else a) == row] for row in range(6)]
    sums = torch.stack([values[s].sum(dim=0) for s in senders])
    means = torch.stack([((values[s] * scale).softmax(dim=0) * values[s]).sum(dim=0) for s in senders])
    torch.testing.assert_close(sum_of_messages(values, edges), sums)
    torch.testing.assert_close(softmax_of_messages(values, scale, edges), means)
    assert torch.autograd.gradcheck(lambda v: sum_of_messages(v, edges), (values,))
    assert torch.autograd.gradcheck(lambda v, s: softmax_of_messages(v, s, edges), (values, scale))

"""Tokens on grids: the published square, and the tissue's own geometry."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_bags import bag, build, pad

from cfusion.errors import DataError
from cfusion.models import build_model
from cfusion.models.depthwise import depthwise
from cfusion.models.token_grid import file_grid, spatial_grid, square_side
from cfusion.survival.losses import LOSSES
from cfusion.types import BagBatch, Targets


@settings(deadline=None, database=None)
@given(st.integers(1, 10_000_000))
def test_side_is_of_the_smallest_square(tiles: int):
    side = square_side(tiles)
    assert (side - 1) ** 2 < tiles <= side**2


def test_square_is_filled_with_the_first_tiles_in_their_order():
    tiles = torch.arange(7.0).reshape(1, 7, 1)
    grid = file_grid(1, 7, None)
    assert grid.to_grid(grid.tokens(tiles))[0, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 0, 1]]


@settings(deadline=None, max_examples=50, database=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_a_padded_bag_has_its_own_square_in_the_corner(counts: list[int]):
    longest = max(counts)
    mask = torch.arange(longest) < torch.tensor(counts)[:, None]
    tiles = torch.randn(len(counts), longest, 2)
    grid = file_grid(len(counts), longest, mask)
    tokens = grid.tokens(tiles)
    laid = grid.to_grid(tokens)
    for b, count in enumerate(counts):
        single = file_grid(1, count, None)
        own = single.to_grid(single.tokens(tiles[b : b + 1, :count]))
        side = math.isqrt(count - 1) + 1
        assert torch.equal(laid[b, :side, :side], own[0])
        assert not laid[b, side:].any()
        assert not laid[b, :, side:].any()
        assert torch.equal(grid.to_tokens(laid)[b][grid.mask[b]], tokens[b][grid.mask[b]])


@settings(deadline=None, max_examples=30, database=None)
@given(
    st.sets(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=20), st.integers(-9, 9),
    st.integers(1, 6),
)  # fmt: skip
def test_leaving_out_empty_rows_and_columns_changes_no_convolution(cells: set[tuple[int, int]], shift: int, reach: int):
    positions = torch.tensor(sorted(cells))[None]
    tokens, kernel = torch.randn(1, len(cells), 3), torch.randn(3, 1, 2 * reach + 1, 2 * reach + 1)
    full = torch.zeros(1, 61, 61, 3)
    full[0, positions[0, :, 1], positions[0, :, 0]] = tokens[0]
    expected = depthwise(full, kernel, None)[0, positions[0, :, 1], positions[0, :, 0]]
    grid = spatial_grid(positions + shift, None, reach=reach)
    convolved = grid.to_tokens(depthwise(grid.to_grid(tokens), kernel, None))
    torch.testing.assert_close(convolved[0], expected, atol=1e-5, rtol=1e-5)
    assert grid.width <= (reach + 1) * len(cells)


@pytest.mark.parametrize("name", ["crossfusion", "crossfusion_concat", "crossfusion_single"])
def test_order_of_tiles_counts_in_file_order_and_not_where_they_lie_in_the_tissue(name: str):
    one = bag(3, 23)
    source = "x20" if name == "crossfusion_single" else "x10"
    order = torch.randperm(one.features[source].shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = dataclasses.replace(
        one,
        features={**one.features, source: one.features[source][:, order]},
        positions={**one.positions, source: one.positions[source][:, order]},
    )
    moved = dataclasses.replace(one, positions={**one.positions, source: one.positions[source][:, order]})
    with torch.no_grad():
        spatial, by_file = build(name, grid="spatial"), build(name)
        torch.testing.assert_close(spatial(one).risk, spatial(shuffled).risk, atol=1e-5, rtol=1e-5)
        assert (spatial(one).risk - spatial(moved).risk).abs() > 1e-3
        assert (by_file(one).risk - by_file(shuffled).risk).abs() > 1e-3
        assert torch.equal(by_file(one).risk, by_file(moved).risk)


def test_spatial_grid_needs_positions_that_do_not_collide():
    model, batch = build("crossfusion", grid="spatial"), pad([bag(1, 5), bag(2, 6)])
    with pytest.raises(DataError, match="grid: spatial needs the position of every x10 tile"):
        model(dataclasses.replace(batch, positions=None))
    short = {**batch.positions, "x10": batch.positions["x10"][:, 1:]}
    with pytest.raises(DataError, match=r"every x10 tile, and these bags have positions of shape \[2, 5, 2\]"):
        model(dataclasses.replace(batch, positions=short))
    collided = {**batch.positions, "x10": batch.positions["x10"].clone()}
    collided["x10"][1, 3] = collided["x10"][1, 0]
    with pytest.raises(DataError, match="two tiles of bag case-2 at the same position"):
        model(dataclasses.replace(batch, positions=collided))


def clustered_or_scattered(generator: torch.Generator, bags: int) -> tuple[BagBatch, Targets]:
    """Bags of 24 tiles on a 9×9 field, in random order, 6 of them marked: side by side in those who die early."""
    early = torch.rand(bags, generator=generator) < 0.5
    tiles = 0.3 * torch.randn(bags, 24, 8, generator=generator)
    positions = torch.empty(bags, 24, 2, dtype=torch.long)
    for b in range(bags):
        cells = torch.randperm(81, generator=generator)[:24]
        positions[b] = torch.stack([cells % 9, cells // 9], dim=1)
        jitter = torch.rand(24, generator=generator)
        distance = (positions[b] - positions[b, 0]).abs().sum(dim=1)
        tiles[b, (distance * early[b] + jitter).argsort()[:6], 0] += 2
        order = torch.randperm(24, generator=generator)
        tiles[b], positions[b] = tiles[b, order], positions[b, order]
    targets = Targets(torch.where(early, 0, 3), early, torch.where(early, 1.0, 9.0))
    return BagBatch({"x20": tiles}, None, {"x20": positions}), targets


def area_after_training(grid: str) -> float:
    torch.manual_seed(0)
    model = build_model("crossfusion_single", backbone_dim=8, embed_dim=32, num_heads=2, grid=grid, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(400):
        batch, targets = clustered_or_scattered(generator, 32)
        optimizer.zero_grad()
        LOSSES["nll"](model(batch), targets).mean().backward()
        optimizer.step()
    batch, targets = clustered_or_scattered(torch.Generator().manual_seed(2), 500)
    with torch.no_grad():
        risk = model.eval()(batch).risk
    return (risk[targets.event][:, None] > risk[~targets.event]).double().mean().item()


@pytest.mark.slow
def test_spatial_grid_learns_a_planted_geometry_that_file_order_cannot_show():
    assert area_after_training("spatial") > 0.9
    assert area_after_training("file") < 0.65

"""Attention and attribution per tile."""

import math

import pytest
import torch
from made_up_bags import WIDTH, bag, build, pad

from cfusion.models import (
    MODELS,
    attention_maps,
    chunked_attention,
    input_times_gradient,
    tile_attention,
    visit_attention,
)
from cfusion.models.attention import Attention, AttentionPooling, CrossAttention
from cfusion.models.attribution import split_bags
from cfusion.models.chunked_attention import CHUNK_ELEMENTS
from cfusion.models.protosurv import QueryAttention

WITH_ATTENTION = [name for name in MODELS if name not in ("mean_mil", "panther")]


def output_of(module: Attention, inputs: tuple, weights: torch.Tensor) -> torch.Tensor:
    """What a block gives where it weighs its values by `weights`."""
    if isinstance(module, AttentionPooling):
        return weights[:, 0] @ inputs[1]
    if isinstance(module, QueryAttention):
        value = inputs[2].unflatten(2, (weights.shape[1], -1)).transpose(1, 2)
        return (weights @ value).transpose(1, 2).flatten(2)
    tokens = inputs[0]
    if isinstance(module, CrossAttention):
        value = module.key_value(inputs[1] + module.scale_embedding).chunk(2, dim=2)[1]
    else:
        value = module.query_key_value(tokens)[2]
    return module.out((weights @ value.unflatten(2, (module.heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", [n for n in WITH_ATTENTION if n != "transmil"])
def test_weights_shown_are_the_ones_the_output_is_made_of(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunked_attention, "SMALLEST_CHUNK", 5)
    monkeypatch.setattr(chunked_attention, "CHUNK_ELEMENTS", 1)
    model, batch = build(name, dtype=torch.float64, published=True), pad([bag(3, 9), bag(4, 6)])
    blocks = {m: key.removesuffix(".attention") for key, m in model.named_modules() if isinstance(m, Attention)}
    caught, shown = {}, {}

    def remember(module: Attention, inputs: tuple, output: torch.Tensor) -> None:
        caught[blocks[module]] = (module, inputs, output)

    hooks = [module.register_forward_hook(remember) for module in blocks]
    model(batch)
    for hook in hooks:
        hook.remove()
    visit_attention(model, batch, lambda block, rows, weights: shown.setdefault(block, []).append((rows, weights)))
    assert shown.keys() == caught.keys()
    for block, (module, inputs, output) in caught.items():
        weights = torch.cat([w for _, w in shown[block]], dim=2)
        assert [rows.start for rows, _ in shown[block]] == [0, *[rows.stop for rows, _ in shown[block]][:-1]]
        assert len(shown[block]) == math.ceil(weights.shape[2] / 5)
        torch.testing.assert_close(weights.sum(dim=3), torch.ones_like(weights[..., 0]))
        # The output is of a pass in which nothing was shown.
        torch.testing.assert_close(output_of(module, inputs, weights), output)


@pytest.mark.parametrize("name", MODELS)
def test_looking_changes_nothing(name: str):
    model = build(name, published=True).train()
    before = {key: module.training for key, module in model.named_modules()}
    one = bag(3, 9)
    maps = attention_maps(model, one)
    assert {key: module.training for key, module in model.named_modules()} == before
    shares = input_times_gradient(model, one)
    assert all(p.grad is None for p in model.parameters())
    assert {key: module.training for key, module in model.named_modules()} == before
    assert set(shares) == set(model.magnification_names)
    assert bool(maps[0]) == (name in WITH_ATTENTION)
    again = attention_maps(model, one)[0]
    assert all(torch.equal(maps[0][block].received, again[block].received) for block in again)
    model.eval()
    assert torch.equal(model(one).risk, model(one).risk)


@pytest.mark.parametrize("grid", ["file", "spatial"])
def test_maps_of_crossfusion_are_over_the_tiles_of_each_bag(grid: str):
    model = build("crossfusion", grid=grid)
    bags = [bag(1, 7), bag(2, 12)]
    for one, maps in zip(bags, attention_maps(model, pad(bags, 2)), strict=True):
        assert set(maps) == {"cross.x20", "cross.x5"} | {
            f"{part}.{half}.0"
            for part in ("transformers.x20", "transformers.x10", "transformers.x5", "final")
            for half in ("pre", "post")
        }
        for block, found in maps.items():
            assert found.magnification == (block.removeprefix("cross.") if block.startswith("cross") else "x10")
            assert found.received.shape == (2, one.features[found.magnification].shape[1])
            assert (found.received >= 0).all()
            if block.startswith("final"):
                assert found.summary.shape == found.received.shape
                assert (found.received.sum(dim=1) < 1).all()
            else:
                assert found.summary is None
                torch.testing.assert_close(found.received.sum(dim=1), torch.ones(2))


def test_a_tile_that_fills_the_square_has_the_weights_of_both_places():
    model, one = build("crossfusion"), bag(4, 7)
    raw = {}
    visit_attention(model, one, lambda block, rows, weights: raw.__setitem__(block, weights))
    weights = raw["transformers.x10.pre.0"][0]
    assert weights.shape == (2, 9, 9)
    expected = weights[:, :, :7].mean(dim=1)
    expected[:, :2] += weights[:, :, 7:].mean(dim=1)
    torch.testing.assert_close(attention_maps(model, one)[0]["transformers.x10.pre.0"].received, expected)


def test_pooling_weights_of_the_baselines():
    one = bag(3, 9)
    tiles = one.features["x20"].shape[1]
    model = build("amil")
    (pool,) = attention_maps(model, one)[0].values()
    hidden = model.embed(one.features["x20"])
    torch.testing.assert_close(model.head(pool.summary @ hidden[0]), model(one).logits)
    (rows,) = attention_maps(build("dsmil"), one)[0].values()
    assert rows.summary.shape == (4, tiles)
    assert set(attention_maps(build("transmil"), one)[0]) == {"attentions.0", "attentions.1"}


def test_transmil_shows_the_weights_its_landmarks_amount_to():
    model, one = build("transmil", dtype=torch.float64), bag(3, 9)
    caught = []
    attention = model.attentions[0]
    handle = attention.register_forward_hook(lambda _m, inputs, output: caught.append((*inputs, output)))
    shown = []
    visit_attention(model, one, lambda block, _rows, w: shown.append(w) if block == "attentions.0" else None)
    handle.remove()
    tokens, layout, output = caught[0]
    value = attention.query_key_value(layout.spread(tokens)).chunk(3, dim=2)[2].unflatten(2, (8, -1)).transpose(1, 2)
    convolved = layout.collect(attention.value_conv(value).transpose(1, 2).flatten(2))
    found = (torch.cat(shown, dim=2) @ value).transpose(1, 2).flatten(2) + convolved
    torch.testing.assert_close(attention.out(found), output)
    summary = attention_maps(model, one)[0]["attentions.0"].summary
    assert summary.shape == (8, one.features["x20"].shape[1])


def test_large_bags_are_shown_in_pieces():
    model = build("crossfusion_single", embed_dim=8)
    sizes = []
    with torch.no_grad():
        visit_attention(
            model,
            split_bags(pad([bag(1, 1500)]))[0],
            lambda _block, _rows, weights: sizes.append(weights.numel()),
        )
    assert max(sizes) <= CHUNK_ELEMENTS
    assert len(sizes) > 8 * 4


def test_shares_are_the_gradient_of_the_risk_and_zero_where_padded():
    model = build("crossfusion", dtype=torch.float64)
    batch = pad([bag(1, 5), bag(2, 9)], 2).to("cpu", torch.float64)
    shares = input_times_gradient(model, batch)
    for name, share in shares.items():
        assert share.shape == batch.masks[name].shape
        assert not share[~batch.masks[name]].any()
    for one, row in zip(split_bags(batch), range(2), strict=True):
        single = input_times_gradient(model, one)
        for name, share in single.items():
            torch.testing.assert_close(shares[name][row][batch.masks[name][row]], share[0])
        step = 1e-6
        grown = {n: t * (1 + step) if n == "x20" else t for n, t in one.features.items()}
        rise = (model(*(grown[n] for n in ("x5", "x10", "x20"))).risk - model(one).risk) / step
        torch.testing.assert_close(single["x20"].sum(), rise[0], atol=1e-5, rtol=1e-4)


def test_split_bags_drops_the_padding():
    bags = [bag(1, 5), bag(2, 9)]
    for one, expected in zip(split_bags(pad(bags, 3)), bags, strict=True):
        assert one.case_ids == expected.case_ids
        assert one.features["x20"].shape[2] == WIDTH
        assert all(torch.equal(one.features[n], expected.features[n]) for n in expected.features)
        assert all(torch.equal(one.positions[n], expected.positions[n]) for n in expected.positions)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_shares_of_tiles_sum_to_one_at_every_magnification_read(name: str):
    model, one = build(name), bag(3, 9)
    shares = tile_attention(model, one)
    assert set(shares) == set(model.magnification_names)
    for magnification, share in shares.items():
        assert share.shape == one.features[magnification].shape[1:2]
        assert share.sum().item() == pytest.approx(1, abs=1e-5)


def test_shares_are_those_of_the_class_token_passed_on_by_cross_attention():
    model, one = build("crossfusion"), bag(3, 9)
    maps = attention_maps(model, one)[0]
    read = sum(maps[f"final.{half}.0"].summary.mean(dim=0) for half in ("pre", "post"))
    shares = tile_attention(model, one)
    torch.testing.assert_close(shares["x10"], read / read.sum())
    weights = {}
    visit_attention(model, one, lambda block, rows, w: weights.setdefault(block, []).append(w[0]), ["cross.x20"])
    assert set(weights) == {"cross.x20"}
    passed = read @ torch.cat(weights["cross.x20"], dim=1).mean(dim=0)
    torch.testing.assert_close(shares["x20"], passed / passed.sum())

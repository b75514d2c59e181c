"""Families of tiles, and the models that read them: parts may be missing, overlapping tiles are refused."""

import dataclasses

import pytest
import torch
from made_up_bags import WIDTH, bag, build, pad

from cfusion.errors import ConfigError, DataError
from cfusion.models import attention_maps, build_model, tile_attention
from cfusion.models.families import children_of, regions_of, side_ratio
from cfusion.types import BagBatch


def test_children_lie_in_their_parents_wherever_the_padding_is():
    bags = [bag(1, 3), bag(2, 9)]
    table = children_of(pad(bags, 2), "x10", "x20")
    for number, one in enumerate(bags):
        parents, tiles = (one.positions[name][0].tolist() for name in ("x10", "x20"))
        for row, (x, y) in enumerate(parents):
            cells = [[2 * x, 2 * y], [2 * x + 1, 2 * y], [2 * x, 2 * y + 1], [2 * x + 1, 2 * y + 1]]
            assert table[number, row].tolist() == [tiles.index(c) if c in tiles else -1 for c in cells]
        assert (table[number, len(parents) :] == -1).all()


def test_regions_hold_the_tiles_of_a_square_of_one_slide():
    positions = torch.tensor([[[0, 0], [5, 1], [3, 3], [4, 0], [1, 0]]])
    batch = BagBatch({"x20": torch.zeros(1, 5, 2)}, None, {"x20": positions})
    rows = regions_of(batch, "x20", 4)
    assert [sorted(r for r in region if r >= 0) for region in rows[0].tolist()] == [[0, 2, 4], [1, 3]]
    assert rows[0, 0, [0, 15, 1]].tolist() == [0, 2, 4]
    slides = {"x20": torch.tensor([[0, 0, 0, 0, 1]])}
    assert regions_of(dataclasses.replace(batch, slides=slides), "x20", 4).shape == (1, 3, 16)


@pytest.mark.parametrize("name", ["hipt", "zoommil"])
def test_tiles_at_the_same_position_are_refused(name: str):
    batch = pad([bag(1, 5), bag(2, 9)])
    twice = batch.positions["x20"].clone()
    twice[1, 3] = twice[1, 0]
    with pytest.raises(DataError, match="Two x20 tiles of bag case-2 are at the same position"):
        build(name)(dataclasses.replace(batch, positions={**batch.positions, "x20": twice}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hipt", {"region": "median"}, "region='median': expected transformer or mean"),
        ("hipt", {"side": 0}, "side=0: expected an integer of at least 1"),
        ("zoommil", {"selected": 0}, "selected=0: expected an integer of at least 1"),
        ("zoommil", {"sigma": 0}, "sigma=0: expected a number above 0"),
        ("zoommil", {"magnifications": (20,)}, "needs two or more magnifications, and the data offer x20"),
        ("zoommil", {"magnifications": (20, 8)}, "x20 and x8: expected magnifications of which one is an integer"),
    ],
)
def test_options_are_checked(name: str, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        build_model(name, **{"backbone_dim": WIDTH, **options})
    assert side_ratio("x1.25", "x20") == 16


@pytest.mark.parametrize("options", [{"region": "mean"}, {"side": 1}, {"as_published": True}, {"side": 3}], ids=str)
def test_variants_of_hipt_do_not_depend_on_batch_companions(options: dict):
    model, bags = build("hipt", dtype=torch.float64, **options), [bag(1, 3), bag(2, 9)]
    with torch.no_grad():
        separate = torch.cat([model(one).logits for one in bags])
        torch.testing.assert_close(model(pad(bags, 2)).logits, separate, atol=1e-11, rtol=1e-11)


@pytest.mark.slow
def test_regions_summarised_in_parts_have_the_same_gradient(monkeypatch: pytest.MonkeyPatch):
    model, one = build("hipt", dtype=torch.float64), bag(1, 30)
    model(one).risk.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr("cfusion.models.hipt.TOKENS_AT_ONCE", 64)
    model(one).risk.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-10, rtol=1e-8)


def test_a_region_shares_its_weight_among_its_tiles():
    one, model = bag(3, 12), build("hipt")
    maps = attention_maps(model, one)[0]
    assert set(maps) == {"layers.0", "layers.1", "pool"}
    for found in maps.values():
        torch.testing.assert_close(found.received.sum(dim=1), torch.ones(len(found.received)))
    share = tile_attention(model, one)["x20"]
    for region in regions_of(one, "x20", 4)[0]:
        tiles = region[region >= 0]
        torch.testing.assert_close(share[tiles], share[tiles[:1]].expand(len(tiles)))


def test_zoommil_reads_only_the_children_of_selected_tiles():
    one, model = bag(3, 40), build("zoommil", selected=3)
    share = tile_attention(model, one)
    assert (share["x5"] > 0).all()
    rows = {name: model.tile_view(f"pool.{name}", one).rows for name in ("x10", "x20")}
    for name, read in rows.items():
        assert share[name].nonzero().flatten().tolist() == sorted(read[read >= 0].tolist())
        assert len(read) == 12
    changed = one.features["x20"].clone()
    changed[0, [i for i in range(changed.shape[1]) if i not in rows["x20"]]] += 1
    with torch.no_grad():
        assert torch.equal(
            model(one).risk, model(dataclasses.replace(one, features={**one.features, "x20": changed})).risk
        )


def test_a_bag_whose_selected_tiles_have_no_children_is_read_as_far_as_it_goes():
    one, model = bag(3, 9), build("zoommil", selected=1)
    away = dataclasses.replace(one, positions={**one.positions, "x20": one.positions["x20"] + 1000})
    assert torch.isfinite(model(away).risk).all()
    assert not tile_attention(model, away)["x20"].any()


def test_the_gradient_of_a_selection_counts_displaced_tiles_unless_as_published():
    batch = pad([bag(1, 30), bag(2, 11)])

    def gradient(**options: bool) -> torch.Tensor:
        model = build("zoommil", selected=3, dtype=torch.float64, **options).train()
        torch.manual_seed(0)
        model(batch).risk.sum().backward()
        return model.selectors["x5"].gate.weight.grad

    assert gradient().abs().sum() > 0
    assert not torch.allclose(gradient(), gradient(as_published=True))

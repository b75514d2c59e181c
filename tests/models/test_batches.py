"""Bags of different length share a batch and do not notice each other; bags of any size work; bad ones are named."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_bags import MAGNIFICATIONS, WIDTH, bag, build, pad

from cfusion.errors import DataError
from cfusion.models import MODELS
from cfusion.types import BagBatch

CONFIGURATIONS = [(name, {}) for name in MODELS] + [
    (name, {"grid": "spatial"}) for name in MODELS if name.startswith("crossfusion")
]
CONFIGURATIONS += [
    ("crossfusion", {"windows": [3]}),
    ("crossfusion", {"windows": [11, 5], "grid": "spatial"}),
    ("crossfusion", {"position": "none"}),
    ("crossfusion_concat", {"position": "none"}),
]


@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS, ids=str)
def test_logits_do_not_depend_on_batch_companions(name: str, options: dict):
    model = build(name, dtype=torch.float64, **options)

    @settings(deadline=None, max_examples=10, database=None)
    @given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 3))
    def check(sizes: list[int], extra: int) -> None:
        bags = [bag(seed, size) for seed, size in enumerate(sizes)]
        with torch.no_grad():
            together = model(pad(bags, extra)).logits
            separate = torch.cat([model(b).logits for b in bags])
        torch.testing.assert_close(together, separate, atol=1e-11, rtol=1e-11)

    check()


@pytest.mark.parametrize("sizes", [(1, 2, 3), (10, 16), (150, 1, 40)], ids=str)
@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS, ids=str)
def test_risk_in_f32_does_not_depend_on_batch_companions(name: str, options: dict, sizes: tuple[int, ...]):
    model = build(name, **options)
    bags = [bag(seed, size) for seed, size in enumerate(sizes)]
    with torch.no_grad():
        separate = torch.cat([model(b).risk for b in bags])
        torch.testing.assert_close(model(pad(bags, 2)).risk, separate, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS, ids=str)
def test_padding_may_stand_anywhere_and_hold_anything(name: str, options: dict):
    model = build(name, **options)
    one = bag(5, 7)
    scattered = {"features": {}, "masks": {}, "positions": {}}
    for key, tiles in one.features.items():
        count = tiles.shape[1]
        places = torch.randperm(count + 4, generator=torch.Generator().manual_seed(1))[:count].sort().values
        scattered["features"][key] = torch.full((1, count + 4, WIDTH), 1e3).index_copy(1, places, tiles)
        scattered["masks"][key] = torch.zeros(1, count + 4, dtype=torch.bool).index_fill(1, places, True)
        places_of = torch.zeros(1, count + 4, 2, dtype=torch.long)
        scattered["positions"][key] = places_of.index_copy(1, places, one.positions[key])
    with torch.no_grad():
        risk = model(BagBatch(**scattered)).risk
        torch.testing.assert_close(risk, model(one).risk, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_padded_batch_are_those_of_its_bags(name: str):
    model = build(name, dtype=torch.float64)
    bags = [bag(seed, size) for seed, size in enumerate((9, 1, 4))]
    model(pad(bags)).risk.sum().backward()
    together = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for one in bags:
        model(one).risk.sum().backward()
    for key, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(together[key], p.grad, atol=1e-9, rtol=1e-7, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("tiles", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_bags_of_very_few_tiles(name: str, tiles: int):
    model = build(name)
    features = {key: torch.randn(1, tiles, WIDTH) for key in MAGNIFICATIONS}
    row = torch.stack([torch.arange(tiles), torch.zeros(tiles, dtype=torch.long)], dim=1)[None]
    output = model(BagBatch(features, None, dict.fromkeys(features, row)))
    assert output.logits.shape == (1, 4)
    assert torch.isfinite(output.risk).all()


def test_output_is_a_survival_distribution():
    output = build("crossfusion")(pad([bag(1, 5), bag(2, 8)]))
    assert ((output.hazards > 0) & (output.hazards < 1)).all()
    assert (output.survival.diff(dim=1) <= 0).all()
    torch.testing.assert_close(output.risk, -output.survival.sum(dim=1))
    torch.testing.assert_close(output.survival, torch.cumprod(1 - output.hazards, dim=1))


def test_a_bag_without_tiles_is_named():
    batch = pad([bag(1, 5), bag(2, 8)])
    masks = {**batch.masks, "x10": batch.masks["x10"].clone()}
    masks["x10"][1] = False
    with pytest.raises(DataError, match=r"No tile at x10 in bag case-2; every bag needs at least one"):
        build("crossfusion")(dataclasses.replace(batch, masks=masks))
    assert torch.isfinite(build("amil")(dataclasses.replace(batch, masks=masks)).risk).all()
    with pytest.raises(DataError, match=r"No tile at x20 in bag number 0"):
        build("amil")(torch.zeros(1, 2, WIDTH), torch.zeros(1, 2, WIDTH), torch.zeros(1, 0, WIDTH))


def test_bags_that_do_not_fit_the_model_are_refused():
    one = bag(1, 5)
    coarse = dataclasses.replace(one, features={"x5": one.features["x5"]}, positions=None)
    with pytest.raises(DataError, match="The model reads x20, but the bags carry x5"):
        build("crossfusion")(coarse)
    with pytest.raises(DataError, match="Embeddings at x20 are 13 wide; the model was built for 12"):
        build("amil")(torch.zeros(1, 3, 13))
    with pytest.raises(DataError, match="was given 2 bags; it reads x20, x10, x5"):
        build("crossfusion")(torch.zeros(1, 3, WIDTH), torch.zeros(1, 3, WIDTH))


@pytest.mark.parametrize("name", MODELS)
def test_bags_and_masks_that_do_not_belong_together_are_refused(name: str):
    model, batch = build(name), pad([bag(1, 5), bag(2, 8)])
    tiles, mask = batch.features["x20"], batch.masks["x20"]
    for x20, message in (
        (tiles[0], r"Embeddings at x20 have shape \[16, 12\]; expected one or more bags as \[bag, tile, dim\]"),
        (tiles[:0], r"Embeddings at x20 have shape \[0, 16, 12\]"),
    ):
        with pytest.raises(DataError, match=message):
            model(dataclasses.replace(batch, features={**batch.features, "x20": x20}))
    for x20, message in (
        (mask[:, 1:], r"The mask at x20 is bool \[2, 15\]; expected bool \[2, 16\]"),
        (mask.float(), r"The mask at x20 is float32 \[2, 16\]"),
        (None, "The mask at x20 is missing"),
    ):
        masks = {key: m for key, m in {**batch.masks, "x20": x20}.items() if m is not None}
        with pytest.raises(DataError, match=message):
            model(dataclasses.replace(batch, masks=masks))


def test_every_magnification_has_the_same_bags():
    with pytest.raises(DataError, match="There are 2 bags at x10 and 1 at x5"):
        build("crossfusion")(torch.zeros(1, 3, WIDTH), torch.zeros(2, 3, WIDTH), torch.zeros(1, 3, WIDTH))


def test_baselines_read_the_finest_magnification_of_all():
    model, one = build("amil"), bag(1, 5)
    assert model.magnification_names == ("x20",)
    risk = model(one).risk
    assert torch.equal(risk, model(one.features["x20"]).risk)
    assert torch.equal(risk, model(one.features["x5"], one.features["x10"], one.features["x20"]).risk)


def test_half_precision_features_are_taken_as_they_come():
    model, one = build("crossfusion"), bag(1, 5)
    half = {key: tiles.half() for key, tiles in one.features.items()}
    full = {key: tiles.float() for key, tiles in half.items()}
    assert torch.equal(
        model(dataclasses.replace(one, features=half)).risk, model(dataclasses.replace(one, features=full)).risk
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS, ids=str)
def test_mixed_precision_is_near_the_exact_result(name: str, options: dict, dtype: torch.dtype):
    model, batch = build(name, published=True, **options), pad([bag(1, 9), bag(2, 4)])
    exact = model(batch).logits
    with torch.autocast("cpu", dtype):
        mixed = model(batch)
        torch.testing.assert_close(mixed.logits, exact, atol=0.3, rtol=0.1)
        loss = model.train()(batch).risk.sum()
    assert mixed.risk.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

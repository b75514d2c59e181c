"""Bags of different length share a batch and do not notice each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfusion.models import MODELS, build_model
from cfusion.types import BagBatch

MAGNIFICATIONS = {"x20": 4, "x10": 2, "x5": 1}


def bag(seed: int, tiles: int, dim: int = 12) -> BagBatch:
    generator = torch.Generator().manual_seed(seed)
    features, positions = {}, {}
    for name, factor in MAGNIFICATIONS.items():
        count = max(1, tiles * factor // 2)
        features[name] = torch.randn(1, count, dim, generator=generator)
        cells = torch.randperm(4 * count, generator=generator)[:count]
        positions[name] = torch.stack([cells % (2 * count), cells // (2 * count)], dim=1)[None]
    return BagBatch(features, None, positions, (f"case-{seed}",))


def pad(bags: list[BagBatch], extra: int = 0) -> BagBatch:
    features, masks, positions = {}, {}, {}
    for name in MAGNIFICATIONS:
        longest = max(b.features[name].shape[1] for b in bags) + extra
        features[name] = torch.zeros(len(bags), longest, bags[0].features[name].shape[2])
        masks[name] = torch.zeros(len(bags), longest, dtype=torch.bool)
        positions[name] = torch.zeros(len(bags), longest, 2, dtype=torch.long)
        for row, one in enumerate(bags):
            count = one.features[name].shape[1]
            features[name][row, :count] = one.features[name][0]
            masks[name][row, :count] = True
            positions[name][row, :count] = one.positions[name][0]
    return BagBatch(features, masks, positions, tuple(b.case_ids[0] for b in bags))


def build(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(3)
    model = build_model(name, backbone_dim=12, embed_dim=16, num_heads=2, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


CONFIGURATIONS = [(name, {}) for name in MODELS] + [
    (name, {"grid": "spatial"}) for name in MODELS if name.startswith("crossfusion")
]


@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS, ids=str)
def test_risk_does_not_depend_on_batch_companions(name: str, options: dict):
    model = build(name, **options)

    @settings(deadline=None, max_examples=10, database=None)
    @given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 3))
    def check(sizes: list[int], extra: int) -> None:
        bags = [bag(seed, size) for seed, size in enumerate(sizes)]
        with torch.no_grad():
            together = model(pad(bags, extra)).logits
            alone = torch.cat([model(b).logits for b in bags])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)

    check()

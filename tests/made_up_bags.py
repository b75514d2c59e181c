"""Small bags and models for the tests of the models."""

import torch

from cfusion.models import build_model
from cfusion.models.bag import BagModel
from cfusion.types import BagBatch

MAGNIFICATIONS = {"x20": 4, "x10": 2, "x5": 1}
WIDTH = 12


def bag(seed: int, tiles: int) -> BagBatch:
    """One bag with about `tiles` tiles at 10x, on scattered cells, each of 20x and 10x within one of the coarser."""
    generator = torch.Generator().manual_seed(seed)
    features, positions = {}, {}
    for name, factor in MAGNIFICATIONS.items():
        features[name] = torch.randn(1, max(1, tiles * factor // 2), WIDTH, generator=generator)
    count = features["x5"].shape[1]
    cells = torch.randperm(4 * count, generator=generator)
    parents = torch.stack([cells % (2 * count), cells // (2 * count)], dim=1)[:count]
    steps = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    for name in reversed(MAGNIFICATIONS):
        if name != "x5":
            families = (2 * parents[:, None] + steps).flatten(0, 1)
            kept = torch.randperm(len(families), generator=generator)[: features[name].shape[1]]
            parents = families[kept]
        positions[name] = parents[None]
    return BagBatch(features, None, positions, (f"case-{seed}",))


def pad(bags: list[BagBatch], extra: int = 0) -> BagBatch:
    """The bags as one batch, `extra` tiles longer than the longest."""
    features, masks, positions = {}, {}, {}
    for name in MAGNIFICATIONS:
        longest = max(b.features[name].shape[1] for b in bags) + extra
        features[name] = torch.zeros(len(bags), longest, WIDTH)
        masks[name] = torch.zeros(len(bags), longest, dtype=torch.bool)
        positions[name] = torch.zeros(len(bags), longest, 2, dtype=torch.long)
        for row, one in enumerate(bags):
            count = one.features[name].shape[1]
            features[name][row, :count] = one.features[name][0]
            masks[name][row, :count] = True
            positions[name][row, :count] = one.positions[name][0]
    return BagBatch(features, masks, positions, tuple(b.case_ids[0] for b in bags))


def build(name: str, dtype: torch.dtype = torch.float32, **options) -> BagModel:
    """A small model in evaluation, whose every parameter counts."""
    torch.manual_seed(3)
    model = build_model(name, **{"backbone_dim": WIDTH, "embed_dim": 16, "num_heads": 2, **options}).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
        else:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.1)
    return model

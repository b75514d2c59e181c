"""Attribution: the attention of every block, and each tile's share of the risk."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cfusion.models.attention import Attention
from cfusion.models.bag import BagModel
from cfusion.types import BagBatch

BlockVisit = Callable[[str, slice, Tensor], None]
"""Called with a block's name, a range of its queries and their weights [bag, head, query, key]."""


@dataclass(frozen=True)
class AttentionMap:
    """Attention of one block over the tiles of one bag.

    Attributes:
        magnification: Magnification of the tiles.
        received: [head, tile], mean weight that a tile received from all queries of the block (in CrossFusion's last
            one, only the class token). It sums to 1, less what a class token or TransMIL's zeros received; TransMIL's
            approximated weights may be negative.
        summary: [row, tile], weights with which a summary of the bag read the tiles: those of the class token, a row
            for each head, or those of a pooling; None if all queries are tiles.
    """

    magnification: str
    received: Float[Tensor, "head tile"]
    summary: Float[Tensor, "row tile"] | None


@torch.no_grad()
def visit_attention(model: nn.Module, batch: BagBatch, visit: BlockVisit, only: Collection[str] | None = None) -> None:
    """Pass the attention weights of every block to `visit`, a few queries at a time.

    They are exactly the weights that the output is computed from in evaluation. No N×N tensor is made: for a large
    bag, a call has at least 128 queries and about a million weights.

    Args:
        model: Any model built of `cfusion.models.attention.Attention` modules.
        batch: Bags; queries and keys are the block's own tokens, padding included.
        visit: Called in the order of the forward pass.
        only: Names of the blocks to visit; None: all.
    """
    blocks = {name: module for name, module in _blocks(model).items() if only is None or name in only}

    def visitor(name: str) -> Callable[[slice, Tensor], None]:
        return lambda rows, weights: visit(name, rows, weights)

    try:
        for name, module in blocks.items():
            module.visit = visitor(name)
        with evaluating(model):
            model(batch)
    finally:
        for module in blocks.values():
            module.visit = None


def _blocks(model: nn.Module) -> dict[str, Attention]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    return {name.removesuffix(".attention"): module for name, module in found.items()}


def attention_maps(model: BagModel, batch: BagBatch) -> list[dict[str, AttentionMap]]:
    """Compute attention over the tiles of each bag, by block.

    Blocks of CrossFusion are named `cross.x20` (source tiles attend to 20x tiles), `transformers.x20.pre.0` (the same
    stream's self-attention, over source tiles) and `final.post.0`. A tile that also fills the end of the square grid
    has the weights of both places.

    Args:
        model: From `build_model`; a model without attention has no maps.
        batch: Bags; each is processed without its padding.
    """
    return [_maps_of_one(model, bag) for bag in split_bags(batch)]


def _maps_of_one(model: BagModel, bag: BagBatch) -> dict[str, AttentionMap]:
    maps: dict[str, AttentionMap] = {}
    queries: dict[str, int] = {}

    def visit(block: str, rows: slice, weights: Tensor) -> None:
        view = model.tile_view(block, bag)
        tiles = view.fold(weights[0])
        queries[block] = queries.get(block, 0) + tiles.shape[1]
        received = tiles.sum(dim=1)
        if block in maps:
            before = maps[block]
            maps[block] = dataclasses.replace(before, received=before.received + received)
            return
        summary = tiles[:, : view.summaries].flatten(0, 1) if view.summaries else None
        maps[block] = AttentionMap(view.magnification, received, summary)

    visit_attention(model, bag, visit)
    return {block: dataclasses.replace(m, received=m.received / queries[block]) for block, m in maps.items()}


def tile_attention(model: BagModel, bag: BagBatch) -> dict[str, Float[Tensor, " tile"]]:
    """Compute each tile's share of what the model read of one bag; the shares of a magnification sum to 1.

    Where a summary of the bag reads tiles (a class token, the rows of a pooling), a tile's share is the weight that
    the summary gave it, averaged over rows, heads and blocks. Where those tiles have in turn read others
    (CrossFusion's 10x tiles those of 5x and 20x), each passes its share on along its cross-attention, averaged over
    heads. Self-attention between the tiles, which may carry information from one tile to another, is left out.

    Args:
        model: From `build_model`; a model without attention has no shares.
        bag: One bag without padding.
    """
    views = {block: model.tile_view(block, bag) for block in _blocks(model)}
    shares: dict[str, Tensor] = {}

    def add(block: str, share: Tensor) -> None:
        name = views[block].magnification
        shares[name] = shares[name] + share if name in shares else share

    def read(block: str, rows: slice, weights: Tensor) -> None:
        if rows.start == 0:
            add(block, views[block].fold(weights[0])[:, : views[block].summaries].mean(dim=(0, 1)))

    visit_attention(model, bag, read, [block for block, view in views.items() if view.summaries])
    crosses = [block for block, view in views.items() if view.across]
    if shares and crosses:
        (readers,) = shares.values()
        visit_attention(model, bag, lambda block, rows, w: add(block, readers[rows] @ w[0].mean(dim=0)), crosses)
    tiny = torch.finfo(torch.float32).tiny
    return {name: share / share.sum().clamp_min(tiny) for name, share in shares.items()}


def input_times_gradient(model: nn.Module, batch: BagBatch) -> dict[str, Float[Tensor, "bag tile"]]:
    """Compute each tile's share of the risk: embedding times gradient of the risk (Shrikumar et al., ICML 2017).

    A positive share raises the risk. The sum over tiles is the change of risk, to first order, from an all-zero bag.

    Args:
        model: Any model of bags; its parameters' gradients are not changed.
        batch: Bags.

    Returns:
        For each magnification that the model read, [bag, tile]; 0 where padded.
    """
    dtype = next(model.parameters()).dtype
    features = {name: t.detach().to(dtype, copy=True).requires_grad_() for name, t in batch.features.items()}
    with evaluating(model), torch.enable_grad():
        risk = model(dataclasses.replace(batch, features=features)).risk
        gradients = torch.autograd.grad(risk.sum(), list(features.values()), allow_unused=True)
    return {
        name: (tiles.detach() * gradient).sum(dim=2)
        for (name, tiles), gradient in zip(features.items(), gradients, strict=True)
        if gradient is not None
    }


def split_bags(batch: BagBatch) -> list[BagBatch]:
    """Yield the bags of a batch one by one, without padding."""

    def of(tensors: dict[str, Tensor] | None, bag: int) -> dict[str, Tensor] | None:
        if tensors is None:
            return None
        masks = batch.masks
        return {k: (t[bag] if masks is None else t[bag][masks[k][bag]])[None] for k, t in tensors.items()}

    return [
        BagBatch(
            of(batch.features, bag) or {},
            None,
            of(batch.positions, bag),
            batch.case_ids[bag : bag + 1],
            of(batch.slides, bag),
        )
        for bag in range(len(batch))
    ]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off within the block; afterwards each module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

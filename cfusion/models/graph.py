"""Graphs of tiles for models: edges of a batch, and sums over them whose memory is that of the tiles.

A table of neighbours [bag, tile, k] becomes a list of edges between the rows of [bag × tile]. Sums over edges go
through them in chunks and compute in the backward pass again what they need, so no [edge, dim] tensor is kept: with
100,000 tiles of 8 neighbours each would be 0.4 GB per layer at width 128.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from cfusion.errors import DataError
from cfusion.models.bag import check_choice, check_count
from cfusion.models.baselines import FinestBagModel
from cfusion.neighbours import nearest_tiles
from cfusion.types import BagBatch, SurvivalOutput, at_least_f32

EDGE_ELEMENTS = 1 << 23
"""Maximum elements of a temporary [edge, dim] tensor."""

DISTANCE_ELEMENTS = 1 << 24
"""Maximum elements of a temporary [tile, tile] block of distances."""


@dataclass(frozen=True)
class Edges:
    """Messages between the rows of a flattened batch.

    Attributes:
        source: [edge], the row that sends.
        target: [edge], the row that receives.
    """

    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]

    @classmethod
    def of(cls, neighbours: Int[Tensor, "bag tile k"], to_neighbours: bool) -> Edges:
        """List the edges of a batch.

        Args:
            neighbours: Rows of each tile's neighbours in its bag, −1 where there is none.
            to_neighbours: Whether a tile sends to its neighbours, instead of receiving from them.
        """
        bags, tiles, k = neighbours.shape
        first = torch.arange(bags, device=neighbours.device)[:, None, None] * tiles
        real = (neighbours >= 0).flatten()
        tile = (first + torch.arange(tiles, device=neighbours.device)[:, None]).expand(-1, -1, k)
        tile, neighbour = tile.flatten()[real], (first + neighbours).flatten()[real]
        return cls(tile, neighbour) if to_neighbours else cls(neighbour, tile)

    def chunks(self, dim: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield sources and targets, a part at a time."""
        size = max(1, EDGE_ELEMENTS // dim)
        yield from zip(self.source.split(size), self.target.split(size), strict=True)


def spatial_neighbours(batch: BagBatch, name: str, k: int) -> Int[Tensor, "bag tile k"]:
    """Return the k nearest tiles of each tile in its slide: the loader's, or else found from the positions.

    Args:
        batch: Bags.
        name: Magnification.
        k: Number of neighbours.

    Returns:
        Rows in the bag, nearest first, −1 where there is none.

    Raises:
        DataError: The bags have no positions.
    """
    bags, tiles, _ = batch.features[name].shape
    given = None if batch.neighbours is None else batch.neighbours.get(name)
    if given is not None and given.shape[:2] == (bags, tiles) and given.shape[2] >= k:
        return given[:, :, :k]
    positions = require_positions(batch, name)
    device = positions.device
    found = torch.full((bags, tiles, k), -1)
    places = positions.cpu().numpy()
    for bag, rows in enumerate(_real_rows(batch, name)):
        slides = None if batch.slides is None else batch.slides[name][bag, rows].cpu().numpy()
        rows = rows.cpu()
        near = torch.from_numpy(nearest_tiles(places[bag, rows.numpy()], k, slides))
        found[bag, rows] = torch.where(near >= 0, rows[near], -1)
    return found.to(device)


def require_positions(batch: BagBatch, name: str) -> Int[Tensor, "bag tile 2"]:
    """Return the positions of the tiles of a magnification.

    Raises:
        DataError: The bags have none, or not one for each tile.
    """
    bags, tiles, _ = batch.features[name].shape
    positions = None if batch.positions is None else batch.positions.get(name)
    if positions is None or positions.shape != (bags, tiles, 2):
        found = "none" if positions is None else f"positions of shape {list(positions.shape)}"
        raise DataError(
            f"The model needs the position of every {name} tile, and these bags have {found}.",
            "Use shards with coordinates: pack them from slides, or from features that were stored with coordinates.",
        )
    return positions


def latent_neighbours(batch: BagBatch, name: str, k: int) -> Int[Tensor, "bag tile k"]:
    """Find the k tiles of the same slide whose embeddings are nearest to each tile's, by Euclidean distance.

    Args:
        batch: Bags.
        name: Magnification.
        k: Number of neighbours.

    Returns:
        Rows in the bag, nearest first, −1 where there is none.
    """
    features = batch.features[name]
    found = torch.full((*features.shape[:2], k), -1, device=features.device)
    for bag, rows in enumerate(_real_rows(batch, name)):
        slides = torch.zeros_like(rows) if batch.slides is None else batch.slides[name][bag, rows]
        for slide in slides.unique():
            own = rows[slides == slide]
            near = nearest_embeddings(features[bag, own], k)
            found[bag, own, : near.shape[1]] = own[near]
    return found


@torch.no_grad()
def nearest_embeddings(embeddings: Float[Tensor, "tile dim"], k: int) -> Int[Tensor, "tile near"]:
    """Find the k nearest other rows of each row, exactly, a block of rows at a time.

    Args:
        embeddings: One row per tile.
        k: Number of neighbours; fewer are returned of k rows or fewer.
    """
    embeddings = at_least_f32(embeddings)
    count = len(embeddings)
    k = min(k, count - 1)
    # Distances are differences of squares: around the mean these are small, and so are their rounding errors.
    embeddings = embeddings - embeddings.mean(dim=0)
    squares = embeddings.square().sum(dim=1)
    blocks = []
    with torch.autocast(embeddings.device.type, enabled=False):
        for rows in torch.arange(count, device=embeddings.device).split(max(1, DISTANCE_ELEMENTS // count)):
            distance = torch.addmm(squares, embeddings[rows], embeddings.T, alpha=-2)
            distance[torch.arange(len(rows), device=rows.device), rows] = torch.inf
            blocks.append(distance.topk(k, largest=False).indices)
    return torch.cat(blocks)


def _real_rows(batch: BagBatch, name: str) -> Iterator[Tensor]:
    """Yield the rows of each bag that are tiles."""
    bags, tiles, _ = batch.features[name].shape
    for bag in range(bags):
        if batch.masks is None:
            yield torch.arange(tiles, device=batch.features[name].device)
        else:
            yield batch.masks[name][bag].nonzero().flatten()


def sum_of_messages(values: Float[Tensor, "row dim"], edges: Edges) -> Float[Tensor, "row dim"]:
    """Sum over the edges into each row the values of their sources, in f32 or better; zero for a row without any."""
    return _Sum.apply(at_least_f32(values), edges)


def softmax_of_messages(
    values: Float[Tensor, "row dim"], scale: Float[Tensor, "1"], edges: Edges
) -> Float[Tensor, "row dim"]:
    """Average over the edges into each row the values of their sources, weighted per channel.

    The weights are a softmax, over the edges into the row, of the values times `scale` (DeeperGCN, Li et al., 2020,
    section 3.2). A row without any edge gets zero.

    Args:
        values: One row per tile of the batch.
        scale: The softmax's inverse temperature.
        edges: Who sends to whom.
    """
    return _Softmax.apply(at_least_f32(values), scale, edges)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, edges: Edges) -> Tensor:
        ctx.edges = edges
        out = torch.zeros_like(values)
        for source, target in edges.chunks(values.shape[1]):
            out.index_add_(0, target, values[source])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out = torch.zeros_like(gradient)
        for source, target in ctx.edges.chunks(gradient.shape[1]):
            out.index_add_(0, source, gradient[target])
        return out, None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, edges: Edges) -> Tensor:
        scores = values * scale
        largest = torch.full_like(scores, -torch.inf)
        for source, target in edges.chunks(values.shape[1]):
            largest.scatter_reduce_(0, target[:, None].expand(-1, values.shape[1]), scores[source], "amax")
        total, out = torch.zeros_like(scores), torch.zeros_like(scores)
        for source, target in edges.chunks(values.shape[1]):
            weight = (scores[source] - largest[target]).exp_()
            total.index_add_(0, target, weight)
            out.index_add_(0, target, weight.mul_(values[source]))
        out /= total.clamp_min_(torch.finfo(total.dtype).tiny)
        ctx.edges = edges
        ctx.save_for_backward(values, scale, largest, total, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        values, scale, largest, total, out = ctx.saved_tensors
        scores = values * scale
        of_values, of_scale = torch.zeros_like(values), torch.zeros_like(scale)
        for source, target in ctx.edges.chunks(values.shape[1]):
            weight = (scores[source] - largest[target]).exp_() / total[target]
            pushed = weight * gradient[target]
            apart = values[source] - out[target]
            of_scale += (pushed * apart * values[source]).sum()
            of_values.index_add_(0, source, pushed * (1 + scale * apart))
        return of_values, of_scale, None


class GraphModel(FinestBagModel):
    """A model whose tiles of the finest magnification send messages along the edges of a graph.

    Args:
        backbone_dim: Width of the embeddings.
        magnifications: Magnifications that the data offer.
        edges: `spatial`: to the nearest tiles in the tissue; `latent`: to those with the nearest embeddings.
        neighbours: Number of neighbours of a tile, all in its slide.
        as_published: Whether tiles send to their neighbours instead of receiving from them, and latent edges of a
            bag's later slides join tiles of its first, as in Patch-GCN's program.

    Raises:
        ConfigError: The kind of edges is unknown, or `neighbours` is not a number from 1.
    """

    def __init__(
        self, backbone_dim: int, magnifications: Sequence[float], edges: str, neighbours: int, as_published: bool
    ) -> None:
        super().__init__(backbone_dim, magnifications)
        check_choice("edges", edges, ("spatial", "latent"))
        check_count("neighbours", neighbours)
        self.edges, self.neighbours, self.as_published = edges, neighbours, as_published

    def survival(self, features: dict[str, Tensor], batch: BagBatch) -> SurvivalOutput:
        """See `BagModel.forward`."""
        (name,) = self.magnification_names
        mask = None if batch.masks is None else batch.masks[name]
        return self.survival_of_graph(features[name], mask, self._edges_of(batch, name))

    def survival_of_graph(
        self, tiles: Float[Tensor, "bag tile dim"], mask: Bool[Tensor, "bag tile"] | None, edges: Edges
    ) -> SurvivalOutput:
        """Compute the output; edges are between the rows of [bag × tile], and none is in the padding."""
        raise NotImplementedError

    def _edges_of(self, batch: BagBatch, name: str) -> Edges:
        if self.edges == "spatial":
            return Edges.of(spatial_neighbours(batch, name, self.neighbours), self.as_published)
        edges = Edges.of(latent_neighbours(batch, name, self.neighbours), self.as_published)
        if self.as_published and batch.slides is not None:
            return _in_first_slide(edges, batch.slides[name])
        return edges


def _in_first_slide(edges: Edges, slides: Int[Tensor, "bag tile"]) -> Edges:
    """Count the rows of edges from the bag's first tile that were meant from the first tile of a slide."""
    bags, tiles = slides.shape
    bag, row = (torch.arange(n, device=slides.device) for n in (bags, tiles))
    key = (slides + bag[:, None] * (slides.max() + 1)).flatten()
    first = torch.full_like(key, tiles).scatter_reduce_(0, key, row.repeat(bags), "amin")[key]
    return Edges(edges.source - first[edges.source], edges.target - first[edges.target])

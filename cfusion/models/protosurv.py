"""ProtoSurv: prototypes of tissue types that read the slide, and the tiles in their neighbourhoods.

Source: Wu et al., "Leveraging Tumor Heterogeneity: Heterogeneous Graph Representation Learning for Cancer Survival
Prediction in Whole Slide Images", NeurIPS 2024 (github.com/wjx-error/ProtoSurv, commit c66e0ce8).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cfusion.errors import ConfigError
from cfusion.models.attention import Attention, attend
from cfusion.models.bag import Prepared, TileView, check_count, check_share
from cfusion.models.clusters import shared_centres
from cfusion.models.dropout import Dropout
from cfusion.models.graph import Edges, GraphModel
from cfusion.models.linear import Linear
from cfusion.models.patchgcn import SoftmaxConvolution
from cfusion.types import BagBatch, SurvivalOutput

HEADS = 3
CONVOLUTION_DROPOUT, PROTOTYPE_DROPOUT = 0.1, 0.2
"""Fixed in the published program."""


class QueryAttention(Attention):
    """Attention of given queries over given keys, both normalised in each head."""

    def forward(
        self,
        query: Float[Tensor, "bag query dim"],
        key: Float[Tensor, "bag tile dim"],
        value: Float[Tensor, "bag tile dim"],
        mask: Bool[Tensor, "bag tile"] | None,
    ) -> Float[Tensor, "bag query dim"]:
        """Attend from each query to the real tiles."""
        parts = [part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (query, key, value)]
        query, key = (F.layer_norm(part, part.shape[-1:]) for part in parts[:2])
        return attend(query, key, parts[2], mask, visit=self.visit).transpose(1, 2).flatten(2)


class PrototypeLayer(nn.Module):
    """Prototypes read tiles, then pass through a two-layer network; both are added to them.

    Args:
        tile_dim: Width of the tiles.
        dim: Width of the prototypes.
        inner: Width of the network.
    """

    def __init__(self, tile_dim: int, dim: int, inner: int) -> None:
        super().__init__()
        self.query, self.key, self.value = Linear(dim, dim), Linear(tile_dim, dim), Linear(tile_dim, dim)
        self.attention = QueryAttention()
        self.out = nn.Sequential(Linear(dim, dim), Dropout(PROTOTYPE_DROPOUT))
        self.attention_norm = nn.LayerNorm(dim)
        self.network = nn.Sequential(
            Linear(dim, inner), nn.LayerNorm(inner), nn.GELU(), Linear(inner, dim), Dropout(PROTOTYPE_DROPOUT)
        )  # fmt: skip
        self.network_norm = nn.LayerNorm(dim)

    def forward(
        self,
        prototypes: Float[Tensor, "bag prototype dim"],
        tiles: Float[Tensor, "bag tile tile_dim"],
        mask: Bool[Tensor, "bag tile"] | None,
    ) -> Float[Tensor, "bag prototype dim"]:
        """Read the real tiles."""
        found = self.attention(self.query(prototypes), self.key(tiles), self.value(tiles), mask)
        prototypes = prototypes + self.attention_norm(self.out(found))
        return prototypes + self.network_norm(self.network(prototypes))


class ProtoSurv(GraphModel, Prepared):
    """Prototypes of each type of tile read its tiles, then all tiles after a graph convolution.

    In the paper the types come from a segmentation of the tissue. Without one they are clusters here: `prepare` fits
    their centres to the embeddings of the training tiles, and a tile has the type of the nearest.

    The prototypes of a type start at the mean of its tiles, or of all tiles if the slide has none of it, plus learned
    offsets. The loss has two penalties: prototypes shall be near to the tiles of their type and far from the others
    (compatibility), and differ from each other (orthogonality).

    Args:
        backbone_dim: Width of the embeddings.
        n_bins: Time bins of the hazard; the published program has one log risk and the Cox loss.
        embed_dim: Width of the prototypes' inner layers, 512 in the program.
        magnifications: Those the data offer.
        types: Number of types.
        prototypes: Number of prototypes of a type.
        layers: Layers of the graph, the first of which is linear.
        iterations: How often prototypes read the tiles of their type.
        fusion_layers: How often all prototypes read the graph's tiles.
        width: Width of the prototypes; None: 3/2 of `embed_dim`.
        graph_width: Width of the graph's layers; None: a quarter of `embed_dim`.
        neighbours: Neighbours of a tile, by its place.
        dropout: Before and after the graph convolutions.
        compatibility: Weight of this penalty.
        orthogonality: Weight of this penalty.
        as_published: Do as the published program: tiles send to their neighbours in place of receiving; prototypes
            read all tiles, not those of their type; orthogonality of the embeddings' channels, not of the prototypes.
    """

    type_centres: Tensor

    def __init__(
        self,
        *,
        backbone_dim: int,
        n_bins: int,
        embed_dim: int,
        magnifications: Sequence[float],
        types: int = 5,
        prototypes: int = 8,
        layers: int = 4,
        iterations: int = 2,
        fusion_layers: int = 4,
        width: int | None = None,
        graph_width: int | None = None,
        neighbours: int = 4,
        dropout: float = 0.25,
        compatibility: float = 0.01,
        orthogonality: float = 0.1,
        as_published: bool = False,
    ) -> None:
        super().__init__(backbone_dim, magnifications, "spatial", neighbours, as_published)
        counts = {"types": types, "prototypes": prototypes, "iterations": iterations, "fusion_layers": fusion_layers}
        for option, value in counts.items():
            check_count(option, value)
        check_count("layers", layers, least=2)
        check_share("dropout", dropout)
        dim, graph = width or 3 * embed_dim // 2, graph_width or max(1, embed_dim // 4)
        if dim % HEADS:
            raise ConfigError(
                f"model.options.width={dim}: protosurv has {HEADS} heads, which must divide it.",
                "Set model.options.width, or an even model.embed_dim.",
            )
        self.types, self.prototypes, self.iterations = types, prototypes, iterations
        self.compatibility, self.orthogonality = compatibility, orthogonality
        self.register_buffer("type_centres", 0.1 * torch.randn(types, backbone_dim))
        self.start = nn.Sequential(
            Linear(backbone_dim, dim), nn.LayerNorm(dim), nn.GELU(), Dropout(PROTOTYPE_DROPOUT)
        )  # fmt: skip
        self.log_spread = nn.Parameter(nn.init.xavier_uniform_(torch.empty(types, 1, dim)))
        self.offsets = nn.Parameter(torch.randn(types, prototypes, dim))
        self.reading = nn.ModuleList(PrototypeLayer(backbone_dim, dim, embed_dim) for _ in range(types * iterations))
        self.before = nn.Sequential(Linear(backbone_dim, graph), nn.LayerNorm(graph), nn.GELU(), Dropout(dropout))
        self.convolutions = nn.ModuleList(SoftmaxConvolution(graph, bias=False) for _ in range(layers - 1))
        # The program also makes a norm for the first convolution, and never uses it.
        self.norms = nn.ModuleList(nn.LayerNorm(graph) for _ in range(layers - 2))
        self.convolution_dropout = Dropout(CONVOLUTION_DROPOUT)
        self.after = nn.Sequential(
            Linear(layers * graph, dim), nn.LayerNorm(dim), nn.GELU(), Dropout(dropout), Linear(dim, dim)
        )  # fmt: skip
        self.fusion = nn.ModuleList(PrototypeLayer(dim, dim, embed_dim) for _ in range(fusion_layers))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.head = nn.Linear(dim, n_bins, bias=False)
        self.as_tiles = nn.Sequential(
            Linear(dim, backbone_dim, bias=False), nn.LayerNorm(backbone_dim), nn.GELU(),
            Linear(backbone_dim, backbone_dim, bias=False),
        )  # fmt: skip

    def prepare(self, bags: Iterable[BagBatch], count: int, *, edges_months: Sequence[float], seed: int) -> None:
        """Fit the centres of the types to the training tiles.

        Raises:
            DataError: The training bags have fewer different tiles than there are types.
        """
        (name,) = self.magnification_names
        self.type_centres.copy_(shared_centres(bags, count, name, self.types, option="types", seed=seed))

    def tile_view(self, block: str, bag: BagBatch) -> TileView:
        """See `BagModel`."""
        (name,) = self.magnification_names
        part, number, *_ = block.split(".")
        if part == "fusion" or self.as_published:
            return TileView(name, self.prototypes if part == "reading" else self.types * self.prototypes)
        tiles = bag.features[name]
        every = torch.ones(tiles.shape[:2], dtype=torch.bool, device=tiles.device)
        members = _members(every, F.one_hot(self.types_of(tiles), self.types).bool())
        (rows,), _ = _rows_of(members[..., int(number) // self.iterations])
        return TileView(name, self.prototypes, tiles=tiles.shape[1], rows=rows)

    def types_of(self, tiles: Float[Tensor, "bag tile dim"]) -> Int[Tensor, "bag tile"]:
        """Return the type of each tile."""
        centres = self.type_centres
        tiles = tiles.detach().to(self.type_centres.dtype)
        return (tiles @ centres.T - centres.square().sum(dim=1) / 2).argmax(dim=2)

    def survival_of_graph(self, tiles: Tensor, mask: Tensor | None, edges: Edges) -> SurvivalOutput:
        """See `GraphModel`."""
        if mask is None:
            mask = torch.ones(tiles.shape[:2], dtype=torch.bool, device=tiles.device)
        tiles = tiles.masked_fill(~mask[..., None], 0)
        types = F.one_hot(self.types_of(tiles), self.types).bool() & mask[..., None]
        read = self._read(tiles, mask, types)
        graph = self._convolved(tiles, edges)
        fused = read
        for layer in self.fusion:
            fused = layer(fused, graph, mask)
        output = SurvivalOutput.from_logits(self.head(self.norm(fused.mean(dim=1))))
        if not torch.is_grad_enabled():
            return output
        return dataclasses.replace(output, penalty=self._penalty(tiles, types, mask, self.as_tiles(read)))

    def _read(
        self, tiles: Float[Tensor, "bag tile dim"], mask: Bool[Tensor, "bag tile"], types: Bool[Tensor, "bag tile type"]
    ) -> Float[Tensor, "bag prototype width"]:  # fmt: skip
        """Start the prototypes of each type and let them read its tiles."""
        members = _members(mask, types)
        share = members.to(tiles.dtype) / members.sum(dim=1, keepdim=True)
        start = self.start(share.mT @ tiles)[:, :, None] + self.log_spread.exp() * self.offsets
        found = []
        for number, prototypes in enumerate(start.unbind(1)):
            rows, seen = _rows_of(mask if self.as_published else members[..., number])
            own = tiles.gather(1, rows[..., None].expand(-1, -1, tiles.shape[2]))
            for layer in self.reading[number * self.iterations : (number + 1) * self.iterations]:
                prototypes = layer(prototypes, own, seen)
            found.append(prototypes)
        return torch.cat(found, dim=1)

    def _convolved(self, tiles: Float[Tensor, "bag tile dim"], edges: Edges) -> Float[Tensor, "bag tile width"]:
        """Concatenate the layers of the graph."""
        hidden = self.before(tiles).flatten(0, 1)
        layers = [hidden, self.convolutions[0](hidden, edges)]
        for convolution, norm in zip(list(self.convolutions)[1:], self.norms, strict=True):
            layers.append(self.convolution_dropout(layers[-1] + F.gelu(norm(convolution(layers[-1], edges)))))
        return self.after(torch.cat(layers, dim=1)).unflatten(0, tiles.shape[:2])

    def _penalty(
        self,
        tiles: Float[Tensor, "bag tile dim"],
        types: Bool[Tensor, "bag tile type"],
        mask: Bool[Tensor, "bag tile"],
        prototypes: Float[Tensor, "bag prototype dim"],
    ) -> Float[Tensor, " bag"]:
        near = _compatibility(tiles, types, mask, prototypes)
        apart = _orthogonality(prototypes.mT if self.as_published else prototypes)
        return self.compatibility * near + self.orthogonality * apart


def _members(
    mask: Bool[Tensor, "bag tile"], types: Bool[Tensor, "bag tile type"]
) -> Bool[Tensor, "bag tile type"]:  # fmt: skip
    """Return which tiles the prototypes of a type read: those of the type, or all if the slide has none of it."""
    return torch.where(types.any(dim=1, keepdim=True), types, mask[..., None])


def _rows_of(
    members: Bool[Tensor, "bag tile"],
) -> tuple[Int[Tensor, "bag member"], Bool[Tensor, "bag member"]]:
    """Return the rows of the members of each bag, padded, and which of them are real."""
    counts = members.sum(dim=1)
    rows = members.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    return rows, torch.arange(rows.shape[1], device=rows.device) < counts[:, None]


def _compatibility(
    tiles: Float[Tensor, "bag tile dim"],
    types: Bool[Tensor, "bag tile type"],
    mask: Bool[Tensor, "bag tile"],
    prototypes: Float[Tensor, "bag prototype dim"],
) -> Float[Tensor, " bag"]:
    """Sum distances to the prototypes of the own type, plus the log-sum-exp of minus those to the others."""
    distance = torch.cdist(tiles, prototypes).unflatten(2, (types.shape[2], -1)).mean(dim=3)
    own = torch.where(types, distance, 0).sum(dim=(1, 2))
    others = torch.where(types | ~mask[..., None], -torch.inf, -distance).flatten(1)
    # With a single type there are no others.
    largest = others.amax(dim=1).detach().clamp_min(torch.finfo(others.dtype).min)
    total = (others - largest[:, None]).exp().sum(dim=1)
    apart = torch.where(total > 0, total.clamp_min(torch.finfo(total.dtype).tiny).log() + largest, 0)
    return (own + apart) / (mask.sum(dim=1) * types.shape[2])


def _orthogonality(rows: Float[Tensor, "bag row dim"]) -> Float[Tensor, " bag"]:
    """Compute how far the scaled products between rows are from the scaled identity."""
    products = rows @ rows.mT
    identity = torch.eye(products.shape[1], dtype=rows.dtype, device=rows.device)
    scaled = products / torch.linalg.matrix_norm(products)[:, None, None]
    return torch.linalg.matrix_norm(scaled - identity / torch.linalg.matrix_norm(identity))

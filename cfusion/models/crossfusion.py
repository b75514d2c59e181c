"""CrossFusion: tokens of the source magnification attend to coarser and finer ones; the streams fuse on one grid.

Source: Soraki et al., "CrossFusion", arXiv 2503.02064, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cfusion.errors import ConfigError, DataError
from cfusion.models.bag import BagModel, TileView, check_choice, check_magnifications, check_share
from cfusion.models.layers import WINDOWS, ConcatMixer, ConvMixer, CrossBlock, PadTransformer, init_linear
from cfusion.models.linear import Linear
from cfusion.models.segments import Pairs, Segments
from cfusion.models.token_grid import PackedGrid, TokenGrid, file_grid, spatial_grid
from cfusion.types import BagBatch, SurvivalOutput, magnification_name


class CrossFusion(BagModel):
    """Multi-scale survival model (CrossFusion, section 3).

    Args:
        backbone_dim: Width of the embeddings; if it equals `embed_dim`, there is no projection.
        n_bins: Time bins of the hazard.
        embed_dim: Width of the tokens.
        num_heads: Attention heads.
        num_layers: Blocks on each side of every position encoding.
        reads: Magnifications the model reads.
        source: The one whose tokens set the grid; the others are context.
        offered: Magnifications of the data, of which it may ignore some.
        mixer: How the streams are fused: the paper's convolution or its ablation.
        grid: `file`: tiles on a square in the order of their file, as published; `spatial`: at their place in the
            tissue.
        windows: Sizes of the convolutions of position encoding and fusion: odd numbers from 3. The fusion adds 1.
        position: `ppeg`: a position encoding in every transformer, as published; `none`: without.
        dropout: Of feed-forwards and convolution channels.
        attention_dropout: Of the self-attention weights; .2 in the published program.
    """

    packs: ClassVar[bool] = True

    def __init__(
        self,
        *,
        backbone_dim: int,
        n_bins: int,
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        reads: Sequence[float],
        source: float,
        offered: Sequence[float],
        mixer: Literal["conv", "concat"] = "conv",
        grid: str = "file",
        windows: object = None,
        position: str = "ppeg",
        dropout: float = 0.3,
        attention_dropout: float = 0.0,
    ) -> None:
        check_magnifications(reads, source)
        super().__init__(reads, offered, backbone_dim)
        if embed_dim % num_heads or embed_dim % 2:
            raise ConfigError(f"embed_dim={embed_dim} must be even and divisible by num_heads={num_heads}.")
        self.windows = _windows(windows)
        _check_places(grid, position, windows, convolves=mixer == "conv")
        check_share("dropout", dropout)
        check_share("attention_dropout", attention_dropout)
        self.grid = grid
        self.source = magnification_name(source)
        self.contexts = tuple(name for name in self.magnification_names if name != self.source)

        def transformer() -> PadTransformer:
            encoding = self.windows if position == "ppeg" else ()
            return PadTransformer(embed_dim, num_heads, num_layers, dropout, attention_dropout, encoding)

        self.projections = nn.ModuleDict(
            {module_name(name): _projection(backbone_dim, embed_dim) for name in self.magnification_names}
        )
        self.cross = nn.ModuleDict(
            {module_name(name): CrossBlock(embed_dim, num_heads, dropout) for name in self.contexts}
        )
        self.transformers = nn.ModuleDict({module_name(name): transformer() for name in self.magnification_names})
        streams = len(self.magnification_names)
        convolves = mixer == "conv"
        self.mixer = (
            ConvMixer(embed_dim, streams, dropout, self.windows) if convolves else ConcatMixer(embed_dim, streams)
        )
        self.class_token = nn.Parameter(torch.empty(embed_dim))
        self.final = transformer()
        self.head = nn.Linear(embed_dim, n_bins)
        self.apply(init_linear)
        nn.init.normal_(self.class_token, std=1e-6)

    def survival(self, features: dict[str, Tensor], batch: BagBatch) -> SurvivalOutput:
        """See `BagModel.forward`."""
        grid = self._grid(batch) if batch.lengths is None else self._packed_grid(batch, batch.lengths)
        projected = {name: self.projections[module_name(name)](tiles) for name, tiles in features.items()}
        source = projected.pop(self.source)
        streams = [self.transformers[module_name(self.source)](grid.tokens(source), grid)]
        for name, context in projected.items():
            found = self.cross[module_name(name)](source, context, self._context(batch, name))
            streams.append(self.transformers[module_name(name)](grid.tokens(found), grid))
        tokens = self.mixer(streams, grid)
        tokens = grid.with_first(self.class_token.to(tokens.dtype), tokens)
        # Only the class token is read, so the last block computes no other.
        summary = self.final(tokens, grid, queries=1)
        return SurvivalOutput.from_logits(self.head(summary.flatten(0, 1)))

    def tile_view(self, block: str, bag: BagBatch) -> TileView:
        """See `BagModel`."""
        part, _, rest = block.partition(".")
        if part == "cross":
            return TileView(next(name for name in self.contexts if module_name(name) == rest))
        tiles = bag.features[self.source].shape[1]
        return TileView(self.source, int(part == "final"), self._grid(bag), tiles)

    def _context(self, batch: BagBatch, name: str) -> Tensor | Pairs | None:
        """Return which tiles of a context a source tile attends to."""
        if batch.lengths is not None:
            return Pairs(Segments(batch.lengths[self.source]), Segments(batch.lengths[name]))
        return None if batch.masks is None else batch.masks[name]

    def _packed_grid(self, batch: BagBatch, lengths: Mapping[str, tuple[int, ...]]) -> PackedGrid:
        """Return the grid of each bag of a row, as of the bag by itself."""
        tiles = Segments(lengths[self.source])
        parts = tiles.split(batch.features[self.source])
        places = None if batch.positions is None else tiles.split(batch.positions[self.source])
        bags = (
            BagBatch(
                {self.source: part},
                positions=None if places is None else {self.source: places[bag]},
                case_ids=batch.case_ids[bag : bag + 1],
            )
            for bag, part in enumerate(parts)
        )
        return PackedGrid(tiles, tuple(map(self._grid, bags)))

    def _grid(self, batch: BagBatch) -> TokenGrid:
        bags, tiles = batch.features[self.source].shape[:2]
        mask = None if batch.masks is None else batch.masks[self.source]
        if self.grid == "file":
            return file_grid(bags, tiles, mask)
        positions = None if batch.positions is None else batch.positions.get(self.source)
        if positions is None or positions.shape != (bags, tiles, 2):
            found = "none" if positions is None else f"positions of shape {list(positions.shape)}"
            raise DataError(
                f"grid: spatial needs the position of every {self.source} tile, and these bags have {found}.",
                "Use shards with coordinates, or model.options.grid=file.",
            )
        return spatial_grid(positions, mask, batch.name, reach=self.windows[0] // 2)


def module_name(magnification: str) -> str:
    """Convert a magnification's name to part of a parameter's name, where a dot would separate modules."""
    return magnification.replace(".", "_")


def _windows(given: object) -> tuple[int, ...]:
    """Return the sizes of the convolutions, largest first."""
    if given is None:
        return WINDOWS
    sizes = tuple(given) if isinstance(given, list | tuple) else ()
    if not sizes or not all(type(n) is int and n >= 3 and n % 2 for n in sizes) or len(set(sizes)) < len(sizes):
        raise ConfigError(
            f"model.options.windows={given!r}: expected a list of different odd numbers from 3, such as [7, 5, 3].",
            "To leave out the position encoding: model.options.position=none.",
        )
    return tuple(sorted(sizes, reverse=True))


def _check_places(grid: str, position: str, windows: object, *, convolves: bool) -> None:
    """Check the options about the places of tokens, which mean nothing to a model that reads no places."""
    check_choice("grid", grid, ("file", "spatial"))
    check_choice("position", position, ("ppeg", "none"))
    unused = {"windows": windows is not None, "grid": grid == "spatial"}
    if position == "none" and not convolves and any(unused.values()):
        name = next(name for name, given in unused.items() if given)
        raise ConfigError(
            f"model.options.{name} has no effect: without a position encoding (model.options.position=none) "
            "crossfusion_concat reads no places of tiles.",
            f"Leave out {name}, or use model.name=crossfusion.",
        )


def _projection(backbone_dim: int, embed_dim: int) -> nn.Module:
    if backbone_dim == embed_dim:
        return nn.Identity()
    return nn.Sequential(Linear(backbone_dim, embed_dim), nn.LayerNorm(embed_dim))

"""Map a bag's tiles to tokens on a grid, and batch grids of different sizes.

Attention works on tokens, convolutions on a grid. A bag's own grid is in the top-left corner of the batch's, with
zeros around it, so that a convolution gives the same result as for the bag by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from cfusion.errors import DataError
from cfusion.models.segments import Real, Segments

Convolve = Callable[[Float[Tensor, "bag height width dim"]], Float[Tensor, "bag height width out"]]


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of a batch of bags and the grid cell of each.

    Attributes:
        bags: Number of bags.
        height: Rows of the batch's grid.
        width: Columns of the batch's grid.
        tile: [bag, token], the tile each token shows; None where tokens are the tiles, followed by the first of them
            until the grid is full.
        mask: [bag, token], true where a token belongs to its bag; None where every token does.
        cell: [bag, token], flat index into bag × height × width, one past the end where masked; None where token t
            stands in cell t.
    """

    bags: int
    height: int
    width: int
    tile: Int[Tensor, "bag token"] | None = None
    mask: Bool[Tensor, "bag token"] | None = None
    cell: Int[Tensor, "bag token"] | None = None

    @property
    def size(self) -> int:
        """Tokens of a bag."""
        return self.height * self.width if self.cell is None else self.cell.shape[1]

    def tokens(self, tiles: Float[Tensor, "bag tile dim"]) -> Float[Tensor, "bag token dim"]:
        """Gather the tokens that show the given tiles."""
        if self.tile is not None:
            return tiles.gather(1, self.tile[..., None].expand(-1, -1, tiles.shape[2]))
        missing = self.height * self.width - tiles.shape[1]
        if self.cell is not None or not missing:
            return tiles
        return torch.cat([tiles, tiles[:, :missing]], dim=1)

    def with_first(self, first: Float[Tensor, " dim"], tokens: Float[Tensor, "bag token dim"]) -> Tensor:
        """Put a token, such as a class token, before those of each bag."""
        return torch.cat([first.expand(self.bags, 1, -1), tokens], dim=1)

    def real(self, tokens: Float[Tensor, "bag token dim"]) -> Real:
        """Return which of the tokens, those of the grid or these after a class token, are a bag's own."""
        return self.mask if self.mask is None or tokens.shape[1] == self.size else F.pad(self.mask, (1, 0), value=True)

    def over(self, tokens: Float[Tensor, "bag token dim"], convolve: Convolve) -> Float[Tensor, "bag token out"]:
        """Convolve the tokens on their grid; a class token before them is passed through."""
        first = tokens.shape[1] - self.size
        found = self.to_tokens(convolve(self.to_grid(tokens[:, first:])))
        return torch.cat([tokens[:, :first], found], dim=1) if first else found

    def spread(self, values: Float[Tensor, "bag dim"]) -> Float[Tensor, "bag token dim"]:
        """Return the values of each bag for each of its tokens, in a shape that broadcasts."""
        return values[:, None]

    def to_grid(self, tokens: Float[Tensor, "bag token dim"]) -> Float[Tensor, "bag height width dim"]:
        """Lay tokens on the grid; cells without one are zero."""
        shape = (self.bags, self.height, self.width, tokens.shape[2])
        if self.cell is None:
            return tokens.reshape(shape)
        flat = tokens.new_zeros(self.bags * self.height * self.width + 1, tokens.shape[2])
        return flat.index_copy(0, self.cell.flatten(), tokens.flatten(0, 1))[:-1].view(shape)

    def to_tokens(self, grid: Float[Tensor, "bag height width dim"]) -> Float[Tensor, "bag token dim"]:
        """Read the tokens off the grid; masked ones read some cell of it."""
        flat = grid.reshape(-1, grid.shape[3])
        if self.cell is None:
            return flat.view(self.bags, -1, grid.shape[3])
        rows = self.cell.clamp_max(len(flat) - 1)
        return flat.index_select(0, rows.flatten()).view(*rows.shape, grid.shape[3])


@dataclass(frozen=True)
class PackedGrid:
    """The grids of bags whose tiles are joined in one row, each by itself; see `TokenGrid` for its methods.

    Attributes:
        tiles: Tiles of each bag in the row.
        grids: Grid of each bag.
    """

    tiles: Segments
    grids: tuple[TokenGrid, ...]

    @property
    def bags(self) -> int:
        """Number of bags."""
        return len(self.grids)

    def _segments(self, tokens: Tensor) -> Segments:
        """Return the bags of a row of tokens of the grids, or of these with a class token before each bag's."""
        sizes = [grid.size for grid in self.grids]
        first = (tokens.shape[1] - sum(sizes)) // len(sizes)
        return Segments(tuple(first + size for size in sizes))

    def tokens(self, tiles: Float[Tensor, "1 tile dim"]) -> Float[Tensor, "1 token dim"]:
        """Gather the tokens that show the given tiles."""
        parts = zip(self.grids, self.tiles.split(tiles), strict=True)
        return torch.cat([grid.tokens(part) for grid, part in parts], dim=1)

    def with_first(self, first: Float[Tensor, " dim"], tokens: Float[Tensor, "1 token dim"]) -> Tensor:
        """Put a token before those of each bag."""
        parts = self._segments(tokens).split(tokens)
        return torch.cat([piece for part in parts for piece in (first[None, None], part)], dim=1)

    def real(self, tokens: Float[Tensor, "1 token dim"]) -> Segments:
        """Return the bags of the row."""
        return self._segments(tokens)

    def over(self, tokens: Float[Tensor, "1 token dim"], convolve: Convolve) -> Float[Tensor, "1 token out"]:
        """Convolve the tokens of each bag on its grid."""
        parts = zip(self.grids, self._segments(tokens).split(tokens), strict=True)
        return torch.cat([grid.over(part, convolve) for grid, part in parts], dim=1)

    def spread(self, values: Float[Tensor, "bag dim"]) -> Float[Tensor, "1 token dim"]:
        """Return the values of each bag for each of its tokens."""
        parts = zip(self.grids, values, strict=True)
        return torch.cat([value.expand(grid.size, -1) for grid, value in parts])[None]


def square_side(tiles: int) -> int:
    """Return the side of the smallest square that holds this many tiles."""
    return math.isqrt(tiles - 1) + 1


def file_grid(bags: int, tiles: int, mask: Bool[Tensor, "bag tile"] | None) -> TokenGrid:
    """Place tiles on a square in the order of their file, filled up with the first tiles (CrossFusion, section 3.3).

    Args:
        bags: Number of bags.
        tiles: Tiles of the longest bag.
        mask: [bag, tile], true where a tile is real; None if every tile is.
    """
    side = square_side(tiles)
    if mask is None:
        return TokenGrid(bags, side, side)
    count = mask.sum(dim=1, keepdim=True)
    own_side = (count.double() - 1).sqrt().floor().long() + 1
    token = torch.arange(side * side, device=mask.device).expand(bags, -1)
    real = token < own_side**2
    rank = torch.where(token < count, token, token - count).clamp(0, tiles - 1)
    tile = torch.argsort(~mask, dim=1, stable=True).gather(1, rank)
    bag = torch.arange(bags, device=mask.device)[:, None]
    cell = (bag * side + token // own_side) * side + token % own_side
    return TokenGrid(bags, side, side, tile, real, torch.where(real, cell, bags * side * side))


REACH = 3
"""Cells that the widest convolution of the paper, 7×7, sees on each side."""


def spatial_grid(
    positions: Int[Tensor, "bag tile 2"],
    mask: Bool[Tensor, "bag tile"] | None,
    name: Callable[[int], str] = str,
    reach: int = REACH,
) -> TokenGrid:
    """Place tiles at their position in the tissue.

    Empty rows and columns beyond the reach of the widest convolution are left out, which changes no result.

    Args:
        positions: [bag, tile, 2], column and row of each tile.
        mask: [bag, tile], true where a tile is real; None if every tile is.
        name: Returns the name of a bag number for errors.
        reach: Cells that the widest convolution sees on each side.

    Raises:
        DataError: Two tiles of a bag are in one cell.
    """
    bags, tiles = positions.shape[:2]
    place = positions.new_zeros(bags, tiles, 2)
    for bag in range(bags):
        real = slice(None) if mask is None else mask[bag]
        for axis in range(2):
            place[bag, real, axis] = _without_gaps(positions[bag, real, axis], reach)
    width, height = (int(place[..., axis].max()) + 1 for axis in range(2))
    index = torch.arange(bags, device=place.device)[:, None]
    cell = ((index * height + place[..., 1]) * width + place[..., 0]).long()
    if mask is not None:
        cell = torch.where(mask, cell, bags * height * width)
    found, times = torch.unique(cell.flatten() if mask is None else cell[mask], return_counts=True)
    if len(twice := found[times > 1]):
        raise DataError(
            f"grid: spatial found two tiles of bag {name(int(twice[0]) // (height * width))} at the same "
            "position; overlapping tiles cannot be placed on a grid.",
            "Use model.options.grid=file.",
        )
    return TokenGrid(bags, height, width, None, mask, cell)


def _without_gaps(coordinates: Int[Tensor, " tile"], reach: int) -> Int[Tensor, " tile"]:
    used, inverse = torch.unique(coordinates, return_inverse=True)
    steps = used.diff().clamp_max(reach + 1)
    return F.pad(steps.cumsum(0), (1, 0))[inverse]

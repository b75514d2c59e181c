"""Common base of all models: accepted bags and returned output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cfusion.errors import ConfigError, DataError
from cfusion.models.token_grid import TokenGrid
from cfusion.types import BagBatch, SurvivalOutput, magnification_names


@dataclass(frozen=True)
class TileView:
    """Which tiles the keys of an attention block are.

    Attributes:
        magnification: Magnification of the tiles.
        summaries: Number of leading queries that are not tiles: class tokens, or rows of a pooling.
        grid: Keys are the tokens of this grid of one bag, after any class tokens; None: keys are tiles.
        tiles: Number of tiles on the grid, or that `rows` refers to.
        rows: The tile of each key, −1 for a key that is none, where several keys are one tile or not all tiles are
            keys; None: keys are the tiles.
    """

    magnification: str
    summaries: int = 0
    grid: TokenGrid | None = None
    tiles: int = 0
    rows: Int[Tensor, " key"] | None = None

    @property
    def across(self) -> bool:
        """Whether the queries are tiles of another magnification than the keys."""
        return not self.summaries and self.grid is None

    def fold(self, weights: Float[Tensor, "head query key"]) -> Float[Tensor, "head query tile"]:
        """Sum weights by tile: class tokens are left out, places or keys with the same tile are added up."""
        if self.rows is not None:
            index = torch.where(self.rows < 0, self.tiles, self.rows)
            return weights.new_zeros(*weights.shape[:2], self.tiles + 1).index_add_(2, index, weights)[..., :-1]
        if self.grid is None:
            return weights
        tokens = weights[..., weights.shape[2] - self.grid.size :]
        folded = tokens[..., : self.tiles].clone()
        folded[..., : self.grid.size - self.tiles] += tokens[..., self.tiles :]
        return folded


class BagModel(nn.Module):
    """A model from bags of tile embeddings to a survival distribution.

    Args:
        reads: Magnifications the model reads, finest first.
        offered: Magnifications of the data, of which it may ignore some.
        backbone_dim: Width of the embeddings.

    Attributes:
        packs: Whether it also takes bags that are joined without padding (`BagBatch.lengths`).
    """

    packs: ClassVar[bool] = False

    def __init__(self, reads: Sequence[float], offered: Sequence[float], backbone_dim: int) -> None:
        super().__init__()
        self.magnification_names = magnification_names(reads)
        self.backbone_dim = backbone_dim
        self._offered = magnification_names(offered)

    def forward(self, bags: BagBatch | Tensor, *finer: Tensor) -> SurvivalOutput:
        """Compute hazards, survival and risk of each bag.

        Args:
            bags: A batch, or the coarsest [bag, tile, dim] of several given one by one, as in `model(x5, x10, x20)`.
            finer: The other bags, coarse to fine: all that the data offer, or those that the model reads.

        Raises:
            DataError: A magnification is missing or has no tile, an embedding has another width, or bags, masks and
                tiles differ in number.
        """
        batch = bags if isinstance(bags, BagBatch) else self._batch_of((bags, *finer))
        return self.survival(self.inputs(batch), batch)

    def inputs(self, batch: BagBatch) -> dict[str, Tensor]:
        """Return the features that the model reads, checked and in its own dtype; see `forward`."""
        self._check(batch)
        dtype = next(self.parameters()).dtype
        return {name: batch.features[name].to(dtype) for name in self.magnification_names}

    def survival(self, features: dict[str, Tensor], batch: BagBatch) -> SurvivalOutput:
        """Compute the output for checked bags, `features` in the model's own dtype."""
        raise NotImplementedError

    def tile_view(self, block: str, bag: BagBatch) -> TileView:
        """Describe how to read a block's attention weights, by its module's name, over one unpadded bag."""
        raise NotImplementedError

    def _batch_of(self, bags: tuple[Tensor, ...]) -> BagBatch:
        for names in (self._offered, self.magnification_names):
            if len(names) == len(bags):
                return BagBatch(dict(zip(reversed(names), bags, strict=True)))
        raise DataError(f"The model was given {len(bags)} bags; it reads {', '.join(self.magnification_names)}.")

    def _check(self, batch: BagBatch) -> None:
        if batch.lengths is not None:
            check_packs(self)
        for name in self.magnification_names:
            if name not in batch.features:
                raise DataError(
                    f"The model reads {name}, but the bags carry {', '.join(batch.features)}.",
                    "Set data.magnifications to what the shards hold.",
                )
            shape = tuple(batch.features[name].shape)
            if len(shape) != 3 or not shape[0]:
                raise DataError(
                    f"Embeddings at {name} have shape {list(shape)}; expected one or more bags as [bag, tile, dim].",
                    "Give a single bag [tile, dim] as bag[None].",
                )
            if shape[2] != self.backbone_dim:
                raise DataError(
                    f"Embeddings at {name} are {shape[2]} wide; the model was built for {self.backbone_dim}.",
                    "Give the model the features of the encoder it was built for.",
                )
            if batch.lengths is None and shape[0] != len(batch):
                raise DataError(
                    f"There are {shape[0]} bags at {name} and {len(batch)} at {next(iter(batch.features))}.",
                    "Give every bag at every magnification, in the same order.",
                )
            self._check_tiles(name, batch)

    def _check_tiles(self, name: str, batch: BagBatch) -> None:
        bags, tiles = batch.features[name].shape[:2]
        if batch.lengths is not None:
            counts = batch.lengths[name]
            if (bags, tiles) != (1, sum(counts)):
                raise DataError(
                    f"Embeddings at {name} are {bags} × {tiles}, but their bags have {sum(counts)} tiles; expected 1 "
                    f"× {sum(counts)}.",
                    "Join the bags by cfusion.data.batches.pack.",
                )
            self._check_filled(name, batch, [bag for bag, count in enumerate(counts) if not count])
            return
        empty = [] if tiles else list(range(bags))
        if tiles and batch.masks is not None:
            mask = batch.masks.get(name)
            if mask is None or mask.shape != (bags, tiles) or mask.dtype != torch.bool:
                found = "missing" if mask is None else f"{mask.dtype} {list(mask.shape)}".removeprefix("torch.")
                raise DataError(
                    f"The mask at {name} is {found}; expected bool {[bags, tiles]}, one entry for each embedding.",
                    "Give a mask for every magnification, true where a tile is real; or none at all, where all are.",
                )
            empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
        self._check_filled(name, batch, empty)

    def _check_filled(self, name: str, batch: BagBatch, empty: Sequence[int]) -> None:
        if empty:
            who = ", ".join(map(batch.name, empty))
            raise DataError(
                f"No tile at {name} in bag {who}; every bag needs at least one at each magnification.",
                "Leave these cases out (the audit names them) or preprocess their slides again.",
            )


def check_packs(model: nn.Module) -> None:
    """Check that a model takes bags that are joined without padding.

    Raises:
        ConfigError: It does not.
    """
    if not getattr(model, "packs", False):
        raise ConfigError(
            f"train.packed=true: {type(model).__name__} takes no bags that are joined without padding.",
            "Set train.packed=false; the bags of a pass are then padded. CrossFusion and its variants, amil, abmil, "
            "dsmil and mean_mil can pack.",
        )


class Prepared:
    """A model that takes buffers from the training bags, once, before the first step of a fold.

    Attributes:
        in_months: Names of buffers that hold edges of the time bins. A model that has some trains on one cohort only,
            since several cohorts do not share time bins.
    """

    in_months: ClassVar[tuple[str, ...]] = ()

    def prepare(self, bags: Iterable[BagBatch], count: int, *, edges_months: Sequence[float], seed: int) -> None:
        """Set the buffers.

        Args:
            bags: The training bags, one by one, with all tiles.
            count: Number of training bags.
            edges_months: Edges of the time bins.
            seed: Seed of this fold.

        Raises:
            DataError: The bags do not suffice.
        """
        raise NotImplementedError


def check_share(option: str, share: object) -> None:
    """Check that a dropout share is in [0, 1).

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(share, int | float) or not 0 <= share < 1:
        raise ConfigError(f"model.options.{option}={share!r}: expected a number in [0, 1).")


def check_count(option: str, count: object, least: int = 1) -> None:
    """Check that an option is a whole number of at least `least`.

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise ConfigError(f"model.options.{option}={count!r}: expected an integer of at least {least}.")


def check_positive(option: str, number: object) -> None:
    """Check that an option is a number above 0.

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(number, int | float) or isinstance(number, bool) or not number > 0:
        raise ConfigError(f"model.options.{option}={number!r}: expected a number above 0.")


def check_choice(option: str, chosen: object, choices: Sequence[str]) -> None:
    """Check that an option is one of its choices.

    Raises:
        ConfigError: It is not.
    """
    if chosen not in choices:
        raise ConfigError(f"model.options.{option}={chosen!r}: expected {' or '.join(choices)}.")


def check_magnifications(magnifications: Sequence[float], source: float | None = None) -> None:
    """Check that a model can be built for these magnifications.

    Raises:
        ConfigError: The list is empty, one is negative or repeated, or `source` is not among them.
    """
    shown = ", ".join(f"{m:g}" for m in magnifications)
    if not magnifications or min(magnifications) < 0 or len(set(magnifications)) < len(magnifications):
        raise ConfigError(
            f"magnifications=[{shown}]: expected one or more different, positive numbers, or 0 for embeddings of "
            "entire slides."
        )
    if source is not None and source not in magnifications:
        raise ConfigError(f"model.source={source:g} is not among the magnifications [{shown}].")

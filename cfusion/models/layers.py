"""Building blocks of CrossFusion.

A sum of convolutions of several sizes is one convolution with the sum of their kernels. It runs on tokens as they lie
in memory, [bag, height, width, dim], which is a channels-last image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cfusion.models.attention import CrossAttention, SelfAttention
from cfusion.models.depthwise import depthwise
from cfusion.models.dropout import Dropout
from cfusion.models.linear import Linear
from cfusion.models.segments import Pairs, Real, first_of_each
from cfusion.models.token_grid import PackedGrid, TokenGrid

WINDOWS = (7, 5, 3)
"""Sizes of the convolutions in the paper: of the position encoding, and with 1 of the fusion (section 3.3, 3.4)."""


def init_linear(module: nn.Module) -> None:
    """Initialise linear layers with truncated normal weights of std .02 and zero biases, layer norms with 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class FeedForward(nn.Sequential):
    """Linear D→2D, GELU, dropout, linear 2D→D, dropout (CrossFusion, section 3.2)."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__(Linear(dim, 2 * dim), nn.GELU(), Dropout(dropout), Linear(2 * dim, dim), Dropout(dropout))


class CrossBlock(nn.Module):
    """Source tokens attend to another magnification: attention, residual, norm, feed-forward (section 3.2).

    Args:
        dim: Width of the tokens.
        heads: Attention heads.
        dropout: Of the feed-forward; the attention has none here.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = CrossAttention(dim, heads)
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, dropout)

    def forward(
        self,
        source: Float[Tensor, "bag tile dim"],
        context: Float[Tensor, "bag other dim"],
        real: Bool[Tensor, "bag other"] | Pairs | None,
    ) -> Float[Tensor, "bag tile dim"]:
        """Return source tokens updated from the context; `real`: which context tiles are a bag's own."""
        found = self.norm(source + self.attention(source, context, real))
        return found + self.feed_forward(found)


class SelfBlock(nn.Module):
    """Self-attention and feed-forward, whose residuals start from the normalised stream (CrossFusion, section 3.3)."""

    def __init__(self, dim: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads, attention_dropout)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, dropout)

    def forward(
        self, tokens: Float[Tensor, "bag token dim"], real: Real, queries: int | None = None
    ) -> Float[Tensor, "bag query dim"]:
        """Return the output for every token, or for the first `queries` of each bag."""
        normed = self.attention_norm(tokens)
        asking = first_of_each(normed, real, queries)
        attended = self.feed_forward_norm(asking + self.attention(normed, real, queries))
        return attended + self.feed_forward(attended)


class MultiScaleKernel(nn.Module):
    """Kernels of several sizes used as their sum; initially Kaiming normal (fan-out), with zero biases.

    Args:
        outputs: Output channels.
        inputs: Input channels of each output channel.
        sizes: Odd kernel sizes, largest first.
    """

    def __init__(self, outputs: int, inputs: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes
        # Parameters of this module, not of a list in it: ZeRO-3 gathers only those of modules that it sees called.
        for size in sizes:
            weight = torch.empty(outputs, inputs, size, size)
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
            self.register_parameter(f"weight_{size}", nn.Parameter(weight))
            self.register_parameter(f"bias_{size}", nn.Parameter(torch.zeros(outputs)))

    def draw_as_pytorch(self) -> None:
        """Initialise kernels and biases again, uniformly within 1/√fan-in, as `nn.Conv2d` does."""
        for size in self.sizes:
            weight, bias = self.get_parameter(f"weight_{size}"), self.get_parameter(f"bias_{size}")
            bound = weight[0].numel() ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the summed kernel [outputs, inputs, k, k] and bias [outputs]."""
        largest = self.sizes[0]
        kernel: Tensor = self.get_parameter(f"weight_{largest}")
        bias: Tensor = self.get_parameter(f"bias_{largest}")
        for size in self.sizes[1:]:
            kernel = kernel + F.pad(self.get_parameter(f"weight_{size}"), ((largest - size) // 2,) * 4)
            # Stack and sum would not do: their gradients share memory, and accumulation over bags would count them
            # three times.
            bias = bias + self.get_parameter(f"bias_{size}")
        return kernel, bias


class PositionEncoding(nn.Module):
    """x + 7×7(x) + 5×5(x) + 3×3(x), depthwise: the pyramid position encoding generator (TransMIL, section 3.3).

    Args:
        dim: Width of the tokens.
        windows: Sizes of the convolutions, odd, largest first.
    """

    def __init__(self, dim: int, windows: Sequence[int] = WINDOWS) -> None:
        super().__init__()
        self.kernels = MultiScaleKernel(dim, 1, tuple(windows))

    def forward(
        self, tokens: Float[Tensor, "bag token dim"], grid: TokenGrid | PackedGrid
    ) -> Float[Tensor, "bag token dim"]:
        """Add each token's surroundings; a class token before the grid's tokens is passed through."""
        kernel, bias = self.kernels()
        identity = torch.zeros_like(kernel[0, 0])
        identity[len(identity) // 2, len(identity) // 2] = 1
        kernel = kernel + identity
        return grid.over(tokens, lambda image: depthwise(image, kernel, bias))


class PadTransformer(nn.Module):
    """Blocks, position encoding, blocks, norm over tokens on a grid (CrossFusion, section 3.3).

    Args:
        dim: Width of the tokens.
        heads: Attention heads.
        layers: Blocks on each side of the position encoding.
        dropout: Of the feed-forwards.
        attention_dropout: Of the attention weights.
        windows: Sizes of the position encoding's convolutions, odd, largest first; none: no position encoding.
    """

    def __init__(
        self, dim: int, heads: int, layers: int, dropout: float, attention_dropout: float, windows: Sequence[int]
    ) -> None:
        super().__init__()
        self.pre = nn.ModuleList(SelfBlock(dim, heads, dropout, attention_dropout) for _ in range(layers))
        self.position = PositionEncoding(dim, windows) if windows else None
        self.post = nn.ModuleList(SelfBlock(dim, heads, dropout, attention_dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, tokens: Float[Tensor, "bag token dim"], grid: TokenGrid | PackedGrid, queries: int | None = None
    ) -> Float[Tensor, "bag query dim"]:
        """Transform all tokens (the grid's, or a class token and the grid's), or only the first few.

        Args:
            tokens: The tokens.
            grid: Their places.
            queries: Number of leading tokens of a bag to return; the last block then skips the rest.
        """
        real = grid.real(tokens)
        for block in self.pre:
            tokens = block(tokens, real)
        if self.position is not None:
            tokens = self.position(tokens, grid)
        *others, last = self.post
        for block in others:
            tokens = block(tokens, real)
        return self.norm(last(tokens, real, queries))


class ConvMixer(nn.Module):
    """Source and context grids mixed by one weight each, then convolved (CrossFusion, section 3.4).

    Args:
        dim: Width of the tokens; even.
        streams: Grids to mix; a single one is used unchanged.
        dropout: Share of channels dropped after the convolution.
        windows: Sizes of the convolutions in addition to 1, odd, largest first.
    """

    def __init__(self, dim: int, streams: int, dropout: float, windows: Sequence[int]) -> None:
        super().__init__()
        if streams > 1:
            # Equivalent to a Conv3d of kernel 1, which draws its weights with fan_out 1.
            self.mix_weight = nn.Parameter(torch.randn(streams) * 2**0.5)
            self.mix_bias = nn.Parameter(torch.zeros(1))
        self.kernels = MultiScaleKernel(dim // 2, 2, (*windows, 1))
        self.dropout = Dropout(dropout)
        self.linear = Linear(dim // 2, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, streams: list[Float[Tensor, "bag token dim"]], grid: TokenGrid | PackedGrid
    ) -> Float[Tensor, "bag token dim"]:
        """Mix the tokens; `streams` are source, then contexts, finest first."""
        mixed = streams[0]
        if len(streams) > 1:
            mixed = mixed * self.mix_weight[0] + self.mix_bias
            for weight, stream in zip(self.mix_weight[1:], streams[1:], strict=True):
                mixed = torch.addcmul(mixed, stream, weight)
        kernel, bias = self.kernels()
        # Two input channels per output channel: a depthwise convolution, then sums of neighbouring channels.
        channels = kernel.reshape(-1, 1, *kernel.shape[2:])

        def convolve(image: Tensor) -> Tensor:
            return F.relu(depthwise(image, channels, None).unflatten(3, (-1, 2)).sum(dim=4) + bias)

        tokens = grid.over(mixed, convolve)
        if self.training:
            # One draw per bag and channel: a dropped channel is dropped in all of its tokens.
            tokens = tokens * grid.spread(self.dropout(tokens.new_ones(grid.bags, tokens.shape[2])))
        return self.norm(self.linear(tokens))


class ConcatMixer(nn.Module):
    """Source and context tokens concatenated, a linear map and a norm (CrossFusion, ablation `Concat`)."""

    def __init__(self, dim: int, streams: int) -> None:
        super().__init__()
        self.linear = Linear(streams * dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, streams: list[Float[Tensor, "bag token dim"]], grid: TokenGrid | PackedGrid
    ) -> Float[Tensor, "bag token dim"]:
        """Mix the tokens; `streams` are source, then contexts, finest first."""
        return self.norm(self.linear(torch.cat(streams, dim=2)))

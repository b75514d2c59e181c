"""CrossFusion word for word: the other side of the comparisons, and an oracle for shapes no golden file has.

A transcription of the published description with nothing done for speed: one bag a call, three convolutions where
three are written, query, key and value apart, and attention that materialises its weights where dropout is on.
Parameters have their published names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Queries from `x`, keys and values from `context`, both [1, N, D]."""
        q, k, v = (
            projection(t).reshape(1, -1, self.heads, t.shape[2] // self.heads).transpose(1, 2)
            for projection, t in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).reshape(1, -1, x.shape[2]))


class CrossAttention(Attention):
    """Attention with one learned vector added to both sides."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.scale_embeddings = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """As `Attention`."""
        return super().forward(x + self.scale_embeddings, context + self.scale_embeddings)


class FeedForward(nn.Module):
    """Linear, GELU, dropout, linear, dropout."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.3), nn.Linear(2 * dim, dim), nn.Dropout(0.3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[1, N, D] to the same."""
        return self.net(x)


class Layers(nn.Module):
    """Blocks whose residuals start from the normalised stream."""

    def __init__(self, dim: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(dim), Attention(dim, heads, dropout), nn.LayerNorm(dim), FeedForward(dim)])
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[1, N, D] to the same."""
        for block in self.layers:
            assert isinstance(block, nn.ModuleList)
            norm1, attention, norm2, feed_forward = block
            u = norm1(x)
            w = norm2(u + attention(u, u))
            x = w + feed_forward(w)
        return x


class PPEG(nn.Module):
    """Three depthwise convolutions and the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.proj1 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """[1, side², D] to the same."""
        side = math.isqrt(x.shape[1])
        grid = x.transpose(1, 2).reshape(1, -1, side, side)
        grid = self.proj(grid) + grid + self.proj1(grid) + self.proj2(grid)
        return grid.flatten(2).transpose(1, 2)


class Transformer(nn.Module):
    """Square pad, blocks, position encoding, blocks; a class token in front passes by pad and encoding."""

    def __init__(self, dim: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.pre_layers = Layers(dim, heads, layers, dropout)
        self.ppeg = PPEG(dim)
        self.post_layers = Layers(dim, heads, layers, dropout)

    def forward(self, x: Tensor, class_tokens: int = 0) -> Tensor:
        """[1, N, D] to [1, side², D], class tokens aside."""
        x = self.pre_layers(x if class_tokens else pad_square(x))
        x = torch.cat([x[:, :class_tokens], self.ppeg(x[:, class_tokens:])], dim=1)
        return self.post_layers(x)


def pad_square(x: Tensor) -> Tensor:
    """Append the first tokens until their number is a square."""
    side = math.ceil(math.sqrt(x.shape[1]))
    return torch.cat([x, x[:, : side * side - x.shape[1]]], dim=1)


class MultiScaleConv(nn.Module):
    """Four grouped convolutions, summed."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.proj = nn.Conv2d(dim, half, 7, padding=3, groups=half)
        self.proj1 = nn.Conv2d(dim, half, 5, padding=2, groups=half)
        self.proj2 = nn.Conv2d(dim, half, 3, padding=1, groups=half)
        self.x_proj = nn.Conv2d(dim, half, 1, groups=half)

    def forward(self, grid: Tensor) -> Tensor:
        """[1, D, side, side] to half the channels."""
        return self.proj(grid) + self.proj1(grid) + self.proj2(grid) + self.x_proj(grid)


class ConvProcessor(nn.Module):
    """Three grids mixed by a Conv3d, convolved, mapped back to D."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(3, 1, 1)
        self.conv_block = nn.Sequential(MultiScaleConv(dim), nn.ReLU(), nn.Dropout2d(0.3))
        self.linear = nn.Sequential(nn.Linear(dim // 2, dim), nn.LayerNorm(dim))

    def forward(self, source: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
        """Three [1, side², D] to one."""
        side = math.isqrt(source.shape[1])
        grids = [t.transpose(1, 2).reshape(1, -1, side, side) for t in (source, fine, coarse)]
        mixed = self.conv3d(torch.stack(grids, dim=1)).squeeze(1)
        return self.linear(self.conv_block(mixed).flatten(2).transpose(1, 2))


class PublishedCrossFusion(nn.Module):
    """The complete model; `forward` returns the logits of one bag."""

    def __init__(
        self, backbone_dim: int, n_bins: int, dim: int, heads: int, layers: int, attention_dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 1e-6)
        for scale in "csf":
            same = backbone_dim == dim
            projection = nn.Identity() if same else nn.Sequential(nn.Linear(backbone_dim, dim), nn.LayerNorm(dim))
            setattr(self, f"{scale}_lin_proj", projection)
            setattr(self, f"{scale}_transformer", Transformer(dim, heads, layers, attention_dropout))
            setattr(self, f"{scale}_transformer_ln", nn.LayerNorm(dim))
        for scale in "fc":
            setattr(self, f"{scale}_cross_attn", CrossAttention(dim, heads))
            setattr(self, f"{scale}_cross_attn_ln", nn.LayerNorm(dim))
            setattr(self, f"{scale}_cross_attn_ffn", FeedForward(dim))
        self.final_transformer = Transformer(dim, heads, layers, attention_dropout)
        self.final_ln = nn.LayerNorm(dim)
        self.conv_processor = ConvProcessor(dim)
        self.mlp_head = nn.Sequential(nn.Linear(dim, n_bins))

    def forward(self, x5: Tensor, x10: Tensor, x20: Tensor) -> Tensor:
        """Logits [1, n_bins] of bags [1, N_m, d]."""
        coarse, source, fine = (
            getattr(self, f"{scale}_lin_proj")(x) for scale, x in (("c", x5), ("s", x10), ("f", x20))
        )
        coarse, fine = self._cross("c", source, coarse), self._cross("f", source, fine)
        streams = [
            getattr(self, f"{scale}_transformer_ln")(getattr(self, f"{scale}_transformer")(tokens))
            for scale, tokens in (("s", source), ("f", fine), ("c", coarse))
        ]
        tokens = torch.cat([self.cls_token, self.conv_processor(*streams)], dim=1)
        return self.mlp_head(self.final_ln(self.final_transformer(tokens, class_tokens=1))[:, 0])

    def _cross(self, scale: str, source: Tensor, context: Tensor) -> Tensor:
        attended = source + getattr(self, f"{scale}_cross_attn")(source, context)
        y = getattr(self, f"{scale}_cross_attn_ln")(attended)
        return y + getattr(self, f"{scale}_cross_attn_ffn")(y)


class PublishedAMIL(nn.Module):
    """Gated attention MIL as the study has it; `forward` gives the logits of one bag."""

    def __init__(self, backbone_dim: int, n_bins: int, dim: int = 512) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(backbone_dim, dim), nn.ReLU())
        self.attention_a = nn.Sequential(nn.Linear(dim, dim // 2), nn.Tanh())
        self.attention_b = nn.Sequential(nn.Linear(dim, dim // 2), nn.Sigmoid())
        self.attention_c = nn.Linear(dim // 2, 1)
        self.classifiers = nn.Linear(dim, n_bins)

    def forward(self, x20: Tensor) -> Tensor:
        """Logits [1, n_bins] of a bag [1, N, d]."""
        hidden = self.embed(x20.squeeze(0))
        scores = self.attention_c(self.attention_a(hidden) * self.attention_b(hidden))
        return self.classifiers(F.softmax(scores.transpose(0, 1), dim=1) @ hidden)

"""Floating-point operations of a training step, as its definition needs them.

torch's counter takes the gradient of a grouped convolution's weights for that of a dense one, and adds the products
that attention computes a second time in its backward pass. Rates and shares of a peak (MFU) count neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

aten = torch.ops.aten
Shape = Sequence[int]


def _convolution_backward(
    grad_out: Shape, inputs: Shape, weight: Shape, _bias: Any, _stride: Any, _padding: Any, _dilation: Any,
    transposed: bool, _output_padding: Any, _groups: int, wanted: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    """Each of both gradients takes the multiplications of the forward pass."""
    return conv_flop_count(list(inputs), list(weight), list(grad_out), transposed) * (wanted[0] + wanted[1])


def _attention_backward(_grad_out: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Four products where the forward pass has two; that of queries and keys, done again, is not counted."""
    return 2 * sdpa_flop_count(query, key, value)


CORRECTED: dict[Any, Callable[..., int]] = {
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}


def operations(step: Callable[[], Any]) -> float:
    """Run `step` and return its operations: products and convolutions, two for a multiplication with its addition."""
    with FlopCounterMode(display=False, custom_mapping=CORRECTED) as counter:
        step()
    return float(counter.get_total_flops())

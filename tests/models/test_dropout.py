"""Computed dropout masks, and attention that uses them a few queries at a time."""

import pytest
import torch
from torch.nn import functional as F

from cfusion.models import chunked_attention
from cfusion.models.attention import attend
from cfusion.models.chunked_attention import ChunkedAttention
from cfusion.models.dropout import Dropout, keep_mask, random_keys

CPU = torch.device("cpu")


def drawn(seed: int, rows: int, columns: int, share: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(seed)
    return keep_mask(random_keys((rows, 1), CPU), random_keys((1, columns), CPU), share, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5, 0.9])
def test_share_of_dropped_entries(share: float, dtype: torch.dtype):
    mask = drawn(1, 1500, 1000, share, dtype)
    assert set(mask.unique().tolist()) == {0, -1}
    assert mask.element_size() == dtype.itemsize
    # 1.5 million entries of which those in a row or column share a key: five standard deviations of independent ones.
    assert (mask == 0).double().mean().item() == pytest.approx(share, abs=5 * (share * (1 - share) / 1.5e6) ** 0.5)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_entries_are_uncorrelated_along_rows_and_columns_and_over_rectangles(share: float):
    size, repeats = 256, 40
    along_rows, along_columns, rectangles = [], [], []
    for seed in range(repeats):
        kept = -drawn(seed, size, size, share).double()
        z = (kept - (1 - share)) / (share * (1 - share)) ** 0.5
        along_rows.append((z[:, 1:] * z[:, :-1]).mean())
        along_columns.append((z[1:] * z[:-1]).mean())
        corners = (z @ z.T) ** 2 - (z**2) @ (z**2).T
        off_diagonal = corners.sum() - corners.diagonal().sum()
        rectangles.append(off_diagonal / (size * (size - 1)) ** 2)
    assert abs(torch.stack(along_rows).mean()) < 5 / (size * repeats**0.5)
    assert abs(torch.stack(along_columns).mean()) < 5 / (size * repeats**0.5)
    assert abs(torch.stack(rectangles).mean()) < 1e-4


def test_dropout_scales_up_what_it_keeps_and_its_gradient_has_the_same_mask():
    torch.manual_seed(0)
    values = torch.rand(3, 50, 40, dtype=torch.float64).add_(1).requires_grad_()
    dropped = Dropout(0.3)(values)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], values[kept] / 0.7)
    dropped.sum().backward()
    torch.testing.assert_close(values.grad, kept.double() / 0.7)
    assert not torch.equal(kept[0], kept[1])


def test_dropout_is_off_in_evaluation_and_at_zero():
    values = torch.randn(5, 4)
    assert Dropout(0.3).eval()(values) is values
    assert Dropout(0.0)(values) is values


def explicit(query, key, value, bias, share: float) -> torch.Tensor:
    """The same attention with all its weights and the mask of the same keys."""
    bags, heads, queries, dim = query.shape
    rows = random_keys((bags * heads, queries, 1), CPU)
    columns = random_keys((bags * heads, 1, key.shape[2]), CPU)
    kept = keep_mask(rows, columns, share, torch.float64).unflatten(0, (bags, heads)) != 0
    scores = query @ key.transpose(2, 3) * dim**-0.5
    weights = F.softmax(scores if bias is None else scores + bias[:, None, None], dim=3)
    return (weights * kept / (1 - share)) @ value


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_what_it_says_with_its_gradients(masked: bool, share: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunked_attention, "SMALLEST_CHUNK", 5)
    monkeypatch.setattr(chunked_attention, "CHUNK_ELEMENTS", 1)
    torch.manual_seed(1)
    query = torch.randn(2, 3, 13, 4, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 3, 17, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.where(torch.arange(17) < torch.tensor([[17], [9]]), 0.0, -torch.inf).double() if masked else None
    cotangent = torch.randn(2, 3, 13, 4, dtype=torch.float64)
    results = []
    for function in (ChunkedAttention.apply, explicit):
        torch.manual_seed(2)
        out = function(query, key, value, bias, share)
        results.append([out, *torch.autograd.grad((out * cotangent).sum(), (query, key, value))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-10)


def test_attention_with_dropout_has_the_right_mean():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 20, 8) for _ in range(3))
    mean = torch.stack([attend(query, key, value, None, 0.2) for _ in range(3000)]).mean(dim=0)
    torch.testing.assert_close(mean, F.scaled_dot_product_attention(query, key, value), atol=0.03, rtol=0)


def test_no_tensor_of_all_weights_is_made():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple) else (out,):
                if isinstance(one, torch.Tensor):
                    Largest.elements = max(Largest.elements, one.numel())
            return out

    query, key, value = (torch.randn(1, 2, 3000, 8, requires_grad=True) for _ in range(3))
    with Largest():
        attend(query, key, value, None, 0.2).sum().backward()
    assert 0 < Largest.elements <= chunked_attention.CHUNK_ELEMENTS

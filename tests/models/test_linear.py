"""The library that multiplies changes nothing but the rounding."""

import math

import pytest
import torch
from torch import nn

from cfusion.models import build_model, chunked_attention, linear
from cfusion.models.attention import attend
from cfusion.models.dropout import seeded
from cfusion.models.linear import Linear
from cfusion.types import BagBatch

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def onednn(monkeypatch):
    """Every product in f32 goes to oneDNN; yields the rows of each."""
    rows = []
    multiply = linear._onednn

    def noted(values, weight, bias):
        rows.append(len(values))
        return multiply(values, weight, bias)

    monkeypatch.setattr(linear, "LARGE", 0)
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(linear, "_onednn", noted)
    return rows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 33, 24), (2, 7, 24), (5, 24)])
@pytest.mark.parametrize("learnt", [True, False], ids=["behind a layer", "of the bag"])
def test_values_and_gradients_are_those_of_torch(onednn, bias, shape, learnt):
    torch.manual_seed(0)
    ours, theirs = Linear(24, 10, bias), nn.Linear(24, 10, bias)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for module in (ours, theirs):
        values = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).requires_grad_(learnt)
        out = module(values.flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2))
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in module.parameters()), *([values.grad] if learnt else [])])
    for left, right in zip(*found, strict=True):
        assert left.layout == torch.strided
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    rows = math.prod(shape[:-1])
    assert onednn == [rows, *([rows] if learnt else []), 10]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dropout", "kept"), [(0.0, 0), (0.3, 0), (0.3, 1 << 18)])
def test_attention_is_that_of_torch(onednn, monkeypatch, masked, dropout, kept):
    monkeypatch.setattr(chunked_attention, "KEPT_ELEMENTS", kept)
    monkeypatch.setattr(chunked_attention, "SMALLEST_CHUNK", 5)
    monkeypatch.setattr(chunked_attention, "CHUNK_ELEMENTS", 1)
    torch.manual_seed(0)
    # As the model has them: parts of one tensor, so that a row of a head is followed by a gap.
    query, key, value = torch.randn(3, 2, 13, 3, 8).transpose(2, 3).requires_grad_().unbind(0)
    mask = torch.arange(13) < torch.tensor([[13], [9]]) if masked else None
    cotangent = torch.randn(2, 3, 13, 8)
    found = []
    for asked in (True, False):
        monkeypatch.setattr(linear, "onednn_is_faster", lambda asked=asked: asked)
        with seeded(7, query.device):
            out = attend(query, key, value, mask, dropout)
        found.append([out, *torch.autograd.grad((out * cotangent).sum(), (query, key, value))])
        times = len(onednn)
    assert times == 2 * 3 * 3 * (2 + (4 if kept else 5)), "kept weights are not computed again"
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_onednn_is_given_no_matrix_with_gaps():
    part = torch.randn(6, 5, 4)[:, 2]
    for matrix in (part, part.T):
        dense = linear._dense(matrix)
        assert torch.equal(dense, matrix)
        assert dense.is_contiguous() or dense.T.is_contiguous()
    full = torch.randn(6, 4)
    assert linear._dense(full) is full
    assert linear._dense(full.T).data_ptr() == full.data_ptr()


def test_a_model_gives_the_same_and_again_the_same_bits(onednn, monkeypatch):
    torch.manual_seed(0)
    model = build_model("amil", backbone_dim=16, n_bins=4).eval()
    bag = BagBatch({"x20": torch.randn(1, 40, 16)}, None, None, ("a",))
    first, second = model(bag).logits, model(bag).logits
    assert onednn == [40] * 4
    assert torch.equal(first, second)
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: False)
    torch.testing.assert_close(model(bag).logits, first, rtol=1e-5, atol=1e-6)


def test_what_is_small_or_of_another_type_stays_with_torch(onednn, monkeypatch):
    Linear(4, 4).double()(torch.ones(2, 4, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        Linear(4, 4)(torch.ones(2, 4))
    monkeypatch.setattr(linear, "LARGE", 1 << 20)
    Linear(4, 4)(torch.ones(2, 4))
    assert onednn == []

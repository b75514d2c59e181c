"""The library that multiplies changes nothing but the rounding."""

import pytest
import torch
from torch import nn

from cfusion.models import build_model, linear
from cfusion.models.linear import Linear
from cfusion.types import BagBatch

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def onednn(monkeypatch):
    """Every product in f32 goes to oneDNN; yields the rows of each."""
    rows = []
    decide = linear._by_onednn

    def noted(values, weight):
        chosen = decide(values, weight)
        rows.extend([values.shape[-2]] * chosen)
        return chosen

    monkeypatch.setattr(linear, "LARGE", 0)
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(linear, "_by_onednn", noted)
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
    assert len(onednn) == 1


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

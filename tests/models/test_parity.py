"""Models against the published program: its weights, inputs, outputs and gradient norms."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.published_model import PublishedCrossFusion
from cfusion.errors import DataError
from cfusion.models import build_model, load_published_weights, published_state_dict
from cfusion.survival.losses import LOSSES
from cfusion.types import Targets

NAMES = {
    "CrossFusion": "crossfusion", "CrossFusion_identity_2layers": "crossfusion",
    "CrossFusionConcat": "crossfusion_concat",
    "CrossFusionSingle": "crossfusion_single", "AMIL": "amil", "DSMIL": "dsmil", "TransMIL": "transmil",
}  # fmt: skip


CASES = [(file, torch.float32) for file in NAMES] + [
    # The golden figures are f32, in which TransMIL's pseudo-inverse of a nearly singular matrix has few true digits.
    (file, torch.float64) for file in NAMES if file != "TransMIL"
]  # fmt: skip


@pytest.mark.parametrize(("file", "dtype"), CASES, ids=str)
def test_outputs_and_gradient_norms_of_the_published_program(shared: Path, file: str, dtype: torch.dtype):
    golden = np.load(shared / "golden" / f"{file}.npz", allow_pickle=False)
    config = json.loads(str(golden["config"]))
    shape = {key: config[key] for key in ("embed_dim", "num_heads", "num_layers") if key in config}
    model = build_model(
        NAMES[file], backbone_dim=config["backbone_dim"], n_bins=config["n_classes"], published=True, **shape
    )
    weights = {k[6:]: torch.from_numpy(golden[k]) for k in golden.files if k.startswith("param/")}
    load_published_weights(model, weights)
    model.to(dtype).eval()
    output = model(*(torch.from_numpy(golden[f"input/{name}"]) for name in ("x5", "x10", "x20")))
    for field in ("logits", "hazards", "survival", "risk"):
        np.testing.assert_allclose(getattr(output, field).detach().numpy(), golden[f"output/{field}"], atol=1e-5)
    event = torch.tensor([config["censorship"] == 0])
    loss = LOSSES["nll"](output, Targets(torch.tensor([config["label"]]), event, torch.ones(1)), alpha=config["alpha"])
    np.testing.assert_allclose(loss.item(), golden["output/loss"], rtol=1e-5)
    loss.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: gradient.norm().item() for name, gradient in published_state_dict(model, gradients).items()}
    expected = {k.removeprefix("grad_norm/"): golden[k] for k in golden.files if k.startswith("grad_norm/")}
    assert norms.keys() == expected.keys()
    for name, norm in norms.items():
        if name.endswith(("k_proj.bias", "attention_c.bias")):
            # Softmax cancels a bias of keys or scores: its gradient is rounding error on both sides.
            assert max(norm, expected[name]) < 1e-7, name
        else:
            np.testing.assert_allclose(norm, expected[name], rtol=1e-4, err_msg=name)
    for name, weight in published_state_dict(model).items():
        assert torch.equal(weight, weights[name].to(dtype)), name


@pytest.mark.slow
@settings(deadline=None, max_examples=15, database=None)
@given(
    st.sampled_from([(8, 1), (12, 3), (16, 4)]), st.sampled_from([8, 11]), st.integers(1, 3), st.integers(2, 6),
    st.tuples(st.integers(1, 6), st.integers(1, 30), st.integers(1, 50)), st.integers(0, 99),
)  # fmt: skip
def test_any_shape_against_a_transcription(
    width: tuple[int, int], backbone: int, layers: int, bins: int, sizes: tuple[int, int, int], seed: int
):
    torch.manual_seed(seed)
    dim, heads = width
    plain = PublishedCrossFusion(backbone, bins, dim, heads, layers).double().eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model = build_model(
        "crossfusion", backbone_dim=backbone, n_bins=bins, embed_dim=dim, num_heads=heads, num_layers=layers
    )
    model.double().eval()
    load_published_weights(model, plain.state_dict())
    bags = [torch.randn(1, size, backbone, dtype=torch.float64) for size in sizes]
    expected, output = plain(*bags), model(*bags).logits
    torch.testing.assert_close(output, expected, atol=1e-8, rtol=1e-8)
    cotangent = torch.randn_like(expected)
    (expected * cotangent).sum().backward()
    (output * cotangent).sum().backward()
    gradients = published_state_dict(model, {name: p.grad for name, p in model.named_parameters()})
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-7, rtol=1e-6)


def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded():
    small = {"backbone_dim": 12, "embed_dim": 16, "num_heads": 2}
    model, weights = build_model("crossfusion", **small), published_state_dict(build_model("crossfusion", **small))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lacking = {name: tensor for name, tensor in weights.items() if name != "cls_token"}
    with pytest.raises(DataError, match=r"missing \['cls_token'\], unknown none"):
        load_published_weights(model, lacking)
    with pytest.raises(DataError, match=r"missing none, unknown \['extra'\]"):
        load_published_weights(model, {**weights, "extra": torch.zeros(1)})
    with pytest.raises(DataError, match=r"cls_token is \(1, 1, 8\), which does not fit class_token \(16,\)"):
        load_published_weights(model, {**weights, "cls_token": torch.zeros(1, 1, 8)})
    with pytest.raises(DataError, match="has no MeanMIL"):
        load_published_weights(build_model("mean_mil", **small), weights)
    with pytest.raises(DataError, match="one magnification, or three with the middle one as the source"):
        published_state_dict(build_model("crossfusion", magnifications=(20, 10), **small))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

"""Models against the published program: its weights, inputs, outputs and gradient norms."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

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
        # Softmax cancels a key projection's bias: its gradient is rounding error on both sides.
        np.testing.assert_allclose(norm, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    for name, weight in published_state_dict(model).items():
        assert torch.equal(weight, weights[name].to(dtype)), name

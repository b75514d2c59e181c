"""Logits and gradients in each precision against those of the published program, stored for fixed weights and bags."""

from __future__ import annotations

import contextlib
import copy
import json

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench, Limit
from cfusion.config import ParallelConfig
from cfusion.models import build_model, load_published_weights
from cfusion.training.world import join_world

MODELS = {
    "CrossFusion": "crossfusion", "CrossFusionSingle": "crossfusion_single", "CrossFusionConcat": "crossfusion_concat",
    "AMIL": "amil", "DSMIL": "dsmil", "TransMIL": "transmil",
}  # fmt: skip
LIMITS = {"f32": (1e-5, 1e-4), "bf16": (2e-2, 3e-2), "fp16": (2e-2, 3e-2)}
"""Largest difference of a logit, and relative difference of the gradient."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def measure(bench: Bench) -> None:
    """Compare every model in f32 and bf16, and on a GPU in fp16."""
    folder = bench.shared / "golden"
    if not folder.is_dir():
        bench.skip("all", f"no folder golden in {bench.shared}; give --shared")
        return
    join_world(ParallelConfig())  # f32 without TF32
    for file, name in MODELS.items():
        if not (folder / f"{file}.npz").is_file():
            bench.skip(file, "not in the folder golden")
            continue
        stored = np.load(folder / f"{file}.npz", allow_pickle=False)
        _compare(bench, file, name, {key: stored[key] for key in stored.files})


def _compare(bench: Bench, file: str, name: str, stored: dict[str, np.ndarray]) -> None:
    config = json.loads(str(stored["config"]))
    shape = {key: config[key] for key in ("embed_dim", "num_heads", "num_layers") if key in config}
    model = build_model(name, backbone_dim=config["backbone_dim"], n_bins=config["n_classes"], published=True, **shape)
    load_published_weights(model, {k[6:]: torch.from_numpy(v) for k, v in stored.items() if k.startswith("param/")})
    bags = [torch.from_numpy(stored[f"input/{scale}"]) for scale in ("x5", "x10", "x20")]
    _, true = _outcome(model, bags, torch.device("cpu"), None)
    for precision, (most_logit, most_gradient) in LIMITS.items():
        if precision == "fp16" and not bench.on_gpu:
            continue
        logits, gradient = _outcome(model, bags, bench.device, DTYPES.get(precision))
        logit = float(np.abs(logits.numpy() - stored["output/logits"]).max())
        relative = float((gradient - true).norm() / true.norm())
        note = ""
        if name == "transmil" and precision != "f32":
            note = "its pseudo-inverse is ill-conditioned"
        bench.tell(f"{file}, {precision}: largest difference of a logit", logit, "", Limit(most_logit), note)
        if precision == "f32" and not bench.on_gpu:
            bench.skip(f"{file}, f32: gradient", "it is compared with f32 on the CPU, which is this device")
            continue
        bench.tell(f"{file}, {precision}: gradient, relative difference", relative, "", Limit(most_gradient), note)


def _outcome(
    model: nn.Module, bags: list[Tensor], device: torch.device, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return the logits, and the gradient of the sum of their squares over all parameters, as f32 on the CPU."""
    module = copy.deepcopy(model).to(device).eval()
    with contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype):
        logits = module(*(bag.to(device) for bag in bags)).logits
    logits.float().square().sum().backward()
    gradients = [parameter.grad.flatten().float() for parameter in module.parameters() if parameter.grad is not None]
    return logits.detach().float().cpu(), torch.cat(gradients).cpu()

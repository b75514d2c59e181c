"""Six published models at weights and bags drawn from a seed, and their training through the product's own loop.

`material/golden/seeded.json` holds the published program's figures; `material/README.md` has the recipe of the draws.
In its training `partial` the last bag's gradient enters the next epoch's first step (`train.published_errors`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import cfusion.training.loop as loop
from cfusion.config import Config
from cfusion.data.bags import BagEntry
from cfusion.models import build_model, load_published_weights, published_state_dict
from cfusion.survival.bins import TimeBins
from cfusion.survival.losses import LOSSES
from cfusion.survival.metrics import concordance
from cfusion.training.optimizers import make_optimizer
from cfusion.training.step import Stepper
from cfusion.training.world import join_world
from cfusion.types import BagBatch, SurvivalOutput, Targets

RECORDS = json.loads((Path(__file__).parents[1] / "material" / "golden" / "seeded.json").read_text())
EVERY_MODEL = pytest.mark.parametrize(
    "record",
    [
        pytest.param(record, id=record["model"], marks=[pytest.mark.slow] if record["model"] == "transmil" else [])
        for record in RECORDS
    ],
)
NAMES = ("x5", "x10", "x20")
INSIGNIFICANT = ("k_proj.bias", "attention_c.bias")
"""Softmax cancels a bias of keys or scores: its gradient is rounding error on both sides."""


def tolerance(record: dict[str, Any]) -> float:
    """DSMIL divides by a square root that the published program takes in f32."""
    return 1e-7 if record["model"] == "dsmil" else 1e-12


def drawn_model(record: dict[str, Any]) -> nn.Module:
    shape = {key: value for key, value in record["config"].items() if key != "n_classes"}
    name = "crossfusion" if record["model"].startswith("crossfusion_identity") else record["model"]
    options = {"crossfusion": {"dropout": 0.0, "attention_dropout": 0.0}, "transmil": {"dropout": 0.0}}
    chosen = options.get(name.partition("_")[0], {})
    model = build_model(name, n_bins=record["config"]["n_classes"], published=True, **shape, **chosen)
    stream, weights = np.random.RandomState(record["seed"]), {}
    for key, like in sorted(published_state_dict(model).items()):
        z = stream.standard_normal(tuple(like.shape))
        z = z / np.sqrt(np.prod(like.shape[1:])) if like.ndim > 1 else 0.1 * z + key.endswith(".weight")
        weights[key] = torch.from_numpy(z)
    model.double()
    load_published_weights(model, weights)
    return model


def drawn_bags(record: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    bags = []
    for number, bag in enumerate(record["bags"]):
        stream = np.random.RandomState(1000 * record["seed"] + number)
        shapes = [(1, tiles, record["config"]["backbone_dim"]) for tiles in bag["sizes"]]
        drawn = [torch.from_numpy(stream.standard_normal(shape)) for shape in shapes]
        bags.append(dict(zip(NAMES, drawn, strict=True)))
    return bags


def targets_of(bag: dict[str, Any]) -> Targets:
    event = torch.tensor([bag["censorship"] == 0])
    return Targets(torch.tensor([bag["label"]]), event, torch.tensor([bag["months"]], dtype=torch.float64))


@EVERY_MODEL
def test_outputs_losses_and_gradients_of_the_published_program(record: dict[str, Any]):
    model, bound = drawn_model(record).eval(), tolerance(record)
    outputs: list[SurvivalOutput] = [model(*bag.values()) for bag in drawn_bags(record)]
    for output, bag in zip(outputs, record["bags"], strict=True):
        np.testing.assert_allclose(output.logits[0].detach(), bag["logits"], rtol=bound, atol=bound)
        assert output.risk.item() == pytest.approx(bag["risk"], rel=bound)
        plain = SurvivalOutput.from_logits(output.logits)
        for name, loss, alpha in (("nll", "nll", 0.2), ("nll_alpha_0", "nll", 0.0), ("ce", "ce", 0.2)):
            # The published cross-entropy adds 1e-8 where it takes a logarithm.
            near = max(bound, 1e-6 if loss == "ce" else 0.0)
            assert LOSSES[loss](plain, targets_of(bag), alpha=alpha).item() == pytest.approx(bag[name], rel=near), name
    LOSSES["nll"](outputs[0], targets_of(record["bags"][0]), alpha=0.2).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: g.norm().item() for name, g in published_state_dict(model, gradients).items()}
    assert norms.keys() == record["gradient_norms_of_bag_0"].keys()
    for name, expected in record["gradient_norms_of_bag_0"].items():
        if name.endswith(INSIGNIFICANT):
            assert max(norms[name], expected) < 1e-12, name
        else:
            assert norms[name] == pytest.approx(expected, rel=100 * bound, abs=bound), name
    time = np.array([bag["months"] for bag in record["bags"]])
    event = np.array([bag["censorship"] == 0 for bag in record["bags"]])
    assert concordance(time, event, np.array([o.risk.item() for o in outputs])).cindex == record["cindex"]


@dataclass(frozen=True)
class DrawnBags:
    """Bags in memory, in float64, with what the loop asks of a `BagSet`."""

    bags: tuple[BagEntry, ...]
    features: list[dict[str, torch.Tensor]]

    @property
    def costs(self) -> np.ndarray:
        return np.ones(len(self.bags))

    lengths = costs

    @property
    def loader(self) -> Any:
        return SimpleNamespace(stream=self.stream)

    def stream(self, micro_batches: Any, *, epoch: int, training: bool) -> Any:
        for (number,) in micro_batches:
            yield BagBatch(self.features[number], case_ids=(self.bags[number].case_id,))


def recipe(record: dict[str, Any], errors: bool) -> Config:
    return Config.model_validate({
        "train": {
            "epochs": len(record["whole"]["losses"]), "patience": None, "optimizer": "adam", "weight_decay": 4e-6,
            "lr": record["training"]["lr"], "schedule": "published", "warmup_fraction": 0.0, "clip_norm": None,
            "alpha": record["training"]["alpha"], "published_errors": errors,
        },
        "parallel": {"precision": "f64", "global_batch": record["training"]["bags_a_step"]},
        "evaluation": {"protocol": "published" if errors else "fixed-epoch", "n_bins": record["config"]["n_classes"]},
    })  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [
        # A minute of pseudo-inverses in float64.
        pytest.param(r, id=r["model"], marks=[pytest.mark.long] if r["model"] == "transmil" else [])
        for r in RECORDS
    ],
)
@pytest.mark.parametrize(
    ("windows", "errors"), [("whole", False), ("whole", True), ("partial", True)], ids=["full", "carried", "partial"]
)
def test_training_through_the_loop_is_the_published_training(
    record: dict[str, Any], windows: str, errors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected, count = record[windows], record[windows]["bags"]
    assert bool(count % record["training"]["bags_a_step"]) == (windows == "partial")
    config, features, bound = recipe(record, errors), drawn_bags(record), tolerance(record)
    sizes = [dict(zip(NAMES, bag["sizes"], strict=True)) for bag in record["bags"]]
    bags = tuple(BagEntry(f"bag-{i}", f"case-{i}", (f"slide-{i}",), sizes[i]) for i in range(count))
    rows = record["bags"][:count]
    cases = pd.DataFrame(
        {"time_months": [bag["months"] for bag in rows], "event": [bag["censorship"] == 0 for bag in rows]},
        index=[bag.case_id for bag in bags],
    )
    bins = TimeBins((0.0, 10.0, 25.0, 50.0, 100.0, 101.0)[: record["config"]["n_classes"] + 1])
    cases["label"] = bins.label(cases["time_months"].to_numpy())
    assert cases["label"].tolist() == [bag["label"] for bag in rows]
    losses: list[float] = []

    class Recorded:
        set_wise = False

        def __call__(self, *arguments: Any, alpha: float) -> torch.Tensor:
            loss = LOSSES["nll"](*arguments, alpha=alpha)
            losses.append(loss.item())
            return loss

    monkeypatch.setattr(loop, "epoch_order", lambda keys, **_: np.arange(len(keys)))
    monkeypatch.setattr(loop, "distribute", in_order)
    rates: list[float] = []
    job = loop.FoldJob(
        config=config, train=DrawnBags(bags, features), validation=None, cases=cases, bins={"seeded": bins},
        sampling_weights=None, name="seeded", identity={}, card={}, folder=tmp_path,
        on_epoch=lambda epoch, metrics: rates.append(metrics["learning_rate"]),
    )  # fmt: skip
    runtime, network = join_world(config.parallel), drawn_model(record)
    model, optimizer = runtime.prepare(network, make_optimizer(network, config.train))
    stepper = Stepper(runtime, model, optimizer, Recorded(), config.train.alpha, config.train.clip_norm)
    loop.train_fold(runtime, job, network, stepper)

    assert rates == pytest.approx(expected["learning_rates"], rel=1e-12)
    assert losses == pytest.approx([loss for epoch in expected["losses"] for loss in epoch], rel=bound)
    norms = {name: tensor.norm().item() for name, tensor in published_state_dict(network).items()}
    assert norms.keys() == expected["parameter_norms"].keys()
    for name, norm in expected["parameter_norms"].items():
        if not name.endswith(INSIGNIFICANT):
            assert norms[name] == pytest.approx(norm, rel=bound, abs=bound), name
    network.eval()
    for bag, logits in zip(features, expected["logits"], strict=True):
        np.testing.assert_allclose(network(*bag.values()).logits[0].detach(), logits, rtol=bound, atol=bound)
    runtime.release()


def in_order(costs: np.ndarray, world_size: int, micro_batch: int, **_: Any) -> list[list[Any]]:
    """One bag a pass, in the order of the batch, as the published program has them."""
    assert (world_size, micro_batch) == (1, 1)
    return [[loop.MicroBatch((i,), (1,)) for i in range(len(costs))]]

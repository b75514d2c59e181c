"""Prototype, attention and multi-scale models against figures of their authors' programs.

`material/golden/rivals_b.json` holds the figures; `material/README.md` has the recipe of the draws.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cfusion.errors import ConfigError, DataError
from cfusion.models import build_model
from cfusion.models.panther import PANTHER
from cfusion.survival.losses import LOSSES, cox
from cfusion.types import BagBatch, SurvivalOutput, Targets

MODELS_OF_RECORDS = json.loads((Path(__file__).parents[1] / "material" / "golden" / "rivals_b.json").read_text())
CASES = {case["case"]: case for model in MODELS_OF_RECORDS for case in model["cases"]}
BOUND = 1e-9


def drawn(shapes: Mapping[str, list[int]], seed: int) -> dict[str, torch.Tensor]:
    """The published weights, drawn in the order of their names."""
    stream, weights = np.random.RandomState(seed), {}
    for name, shape in sorted(shapes.items()):
        z = stream.standard_normal(tuple(shape))
        z = z / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1 * z + name.endswith(".weight")
        weights[name] = torch.from_numpy(z)
    return weights


def published_name(ours: str, names: Mapping[str, str]) -> str:
    """The published name of a parameter, by the longest beginning of its name that `names` has."""
    start = max((key for key in names if ours.startswith(key)), key=len)
    return names[start] + ours.removeprefix(start)


def load(model: nn.Module, weights: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> nn.Module:
    """Fill all parameters of a model from published weights, in float64."""
    model.double().eval()
    with torch.no_grad():
        for ours, parameter in model.named_parameters():
            parameter.copy_(weights[published_name(ours, names)].view_as(parameter))
    return model


def check_gradients(model: nn.Module, norms: Mapping[str, float | None], names: Mapping[str, str]) -> None:
    """All norms that are recorded, and no others; a softmax cancels the bias of its scores."""
    found = {published_name(ours, names): p.grad for ours, p in model.named_parameters()}
    assert {name for name, norm in norms.items() if norm is not None} == found.keys()
    for name, gradient in found.items():
        assert gradient.norm().item() == pytest.approx(norms[name], rel=BOUND, abs=BOUND), name


def stream_of(case: Mapping[str, Any], bag: int) -> np.random.RandomState:
    return np.random.RandomState(1000 * case["seed"] + bag)


def tiles_of(case: Mapping[str, Any], bag: int, count: int, dim: int) -> torch.Tensor:
    """The first draw of a bag: [1, tile, dim]."""
    return torch.from_numpy(stream_of(case, bag).standard_normal((1, count, dim)))


def targets_of(bag: Mapping[str, Any]) -> Targets:
    return Targets(
        torch.tensor([bag["label"]]), torch.tensor([bag["censorship"] == 0]), torch.tensor([bag["months"]]).double()
    )


def nll(output: SurvivalOutput, bag: Mapping[str, Any]) -> torch.Tensor:
    return LOSSES["nll"](SurvivalOutput.from_logits(output.logits), targets_of(bag), alpha=0.2).sum()


def close(found: torch.Tensor, expected: Any) -> None:
    np.testing.assert_allclose(found.detach().flatten(), np.ravel(expected), rtol=BOUND, atol=BOUND)


ABMIL_NAMES = {
    "before.": "slide_encoder.model.pre_attention_layers.",
    "scores.0.content.": "slide_encoder.model.image_pooler.attention_heads.0.0.",
    "scores.0.gate.": "slide_encoder.model.image_pooler.gating_layers.0.0.",
    "scores.0.score.": "slide_encoder.model.image_pooler.branching_layers.0.",
    "after.": "slide_encoder.model.post_attention_layers.",
    "head.": "classification_head.",
}


@pytest.mark.parametrize("name", ["abmil_gated", "abmil_not_gated"])
def test_attention_of_patho_bench(name: str):
    case = CASES[name]
    shape = case["arguments"]
    model = build_model(
        "abmil", backbone_dim=shape["input_feature_dim"], embed_dim=shape["head_dim"], gated=shape["gated"],
        heads=shape["n_heads"], n_bins=4,
    )  # fmt: skip
    load(model, drawn(case["parameters"], case["seed"]), ABMIL_NAMES)
    outputs = []
    for number, bag in enumerate(case["bags"]):
        tiles = tiles_of(case, number, bag["n"], shape["input_feature_dim"])
        outputs.append(model(tiles))
        close(outputs[-1].logits, bag["logits"])
        close(outputs[-1].survival, bag["survival"])
        close(outputs[-1].risk, bag["risk"])
        assert nll(outputs[-1], bag).item() == pytest.approx(bag["nll"], rel=1e-6)  # they clamp at 1e-7
    nll(outputs[0], case["bags"][0]).backward()
    check_gradients(model, case["gradient_norms_of_bag_0"], ABMIL_NAMES)


def test_published_number_of_parameters_of_attention():
    model = build_model("abmil", backbone_dim=1024)
    assert sum(p.numel() for p in model.parameters()) == 3_153_413


def test_several_attention_heads_are_condensed():
    model = build_model("abmil", backbone_dim=12, embed_dim=8, heads=3).eval()
    assert model.condense.in_features == 36
    assert model(torch.randn(2, 5, 12)).logits.shape == (2, 4)
    with pytest.raises(ConfigError, match=r"model.options.heads=0: expected at least 1"):
        build_model("abmil", backbone_dim=12, heads=0)


def panther(name: str, head: str) -> tuple[PANTHER, dict[str, Any]]:
    """A model with the recorded prototypes and one of the recorded heads."""
    case = CASES[name]
    settings, record = case["settings"], case["heads"][head]
    model = build_model(
        "panther", backbone_dim=settings["in_dim"], n_bins=record["parameters"]["classifier.weight"][0], prototypes=4,
        iterations=settings["em_iter"], prior_tiles=settings["tau"], prior_variance=settings["ot_eps"],
    )  # fmt: skip
    load(model, drawn(record["parameters"], record["seed"]), {"head.": "classifier."})
    prior = drawn(case["parameters"], case["seed"])
    model.prototype_means.copy_(prior["panther.priors.m"])
    model.prototype_variances.copy_(settings["ot_eps"] * torch.nn.functional.softplus(prior["panther.priors.V_"]))
    return model, record


def panther_tiles(name: str) -> list[torch.Tensor]:
    case = CASES[name]
    bags = enumerate(case["bags"])
    return [tiles_of(case, number, bag["n"], case["settings"]["in_dim"]) for number, bag in bags]


@pytest.mark.parametrize("name", ["panther_one_step_tau_1", "panther_as_configured"])
def test_mixtures_of_panther_and_its_linear_head(name: str):
    model, record = panther(name, "linear_nll")
    outputs = []
    for number, (tiles, bag) in enumerate(zip(panther_tiles(name), CASES[name]["bags"], strict=True)):
        mixture = model.mixture(tiles, None)
        close(mixture.weights, bag["pi"])
        close(mixture.means, bag["mu"])
        close(mixture.variances, bag["sigma"])
        outputs.append(model(tiles))
        close(outputs[-1].logits, record["logits"][number])
        close(outputs[-1].survival, record["survival"][number])
        assert nll(outputs[-1], bag).item() == pytest.approx(record["nll_by_bag"][number], rel=1e-6)
    nll(outputs[0], CASES[name]["bags"][0]).backward()
    check_gradients(model, record["gradient_norms_of_bag_0"], {"head.": "classifier."})


@pytest.mark.parametrize("name", ["panther_one_step_tau_1", "panther_as_configured"])
def test_cox_loss_of_panther(name: str):
    model, record = panther(name, "linear_cox")
    log_risks = torch.cat([model(tiles).logits[:, 0] for tiles in panther_tiles(name)])
    close(log_risks, record["log_risk"])
    bags = CASES[name]["bags"]
    months = torch.tensor([bag["months"] for bag in bags]).double()
    event = torch.tensor([bag["censorship"] == 0 for bag in bags])
    loss = cox(log_risks, months, event).sum() / event.sum()
    assert loss.item() == pytest.approx(record["cox_loss_of_the_four_bags"], rel=1e-7)  # which they compute in f32


def made_up_bags(sizes: tuple[int, ...], dim: int = 5) -> list[BagBatch]:
    generator = torch.Generator().manual_seed(4)
    return [BagBatch({"x20": torch.randn(1, size, dim, generator=generator)}) for size in sizes]


def test_prototypes_come_from_the_training_bags_alone_and_repeat():
    found = []
    for _ in range(2):
        model = build_model("panther", backbone_dim=5, prototypes=3)
        model.prepare(iter(made_up_bags((9, 2, 20))), 3, edges_months=(0, 1, 2, 3, 4), seed=7)
        found.append(model.prototype_means)
    assert torch.equal(found[0], found[1])
    tiles = torch.cat([bag.features["x20"][0] for bag in made_up_bags((9, 2, 20))])
    nearest = torch.cdist(tiles, found[0]).argmin(dim=1)
    expected = torch.stack([tiles[nearest == k].mean(dim=0) for k in range(3)])
    torch.testing.assert_close(found[0], expected)


def test_more_prototypes_than_tiles_in_a_bag_leave_the_rest_at_their_prototypes():
    model = build_model("panther", backbone_dim=5, prototypes=6).eval()
    model.prototype_means.mul_(100)
    (bag,) = made_up_bags((1,))
    mixture = model.mixture(bag.features["x20"], None)
    unused = mixture.weights[0] < 0.01
    assert unused.sum() == 5
    torch.testing.assert_close(mixture.means[0][unused], model.prototype_means[unused])
    assert torch.isfinite(model(bag).logits).all()


@pytest.mark.parametrize("sizes", [(2, 3), (1, 5, 1)])
def test_more_prototypes_than_training_tiles_are_refused(sizes: tuple[int, ...]):
    model = build_model("panther", backbone_dim=5, prototypes=8)
    message = rf"prototypes=8, but the {len(sizes)} training bags have only {sum(sizes)} different tiles at x20"
    with pytest.raises(DataError, match=message):
        model.prepare(iter(made_up_bags(sizes)), len(sizes), edges_months=(0, 1), seed=0)


def test_equal_tiles_are_no_prototypes():
    model = build_model("panther", backbone_dim=5, prototypes=8)
    with pytest.raises(DataError, match=r"only 1 different tiles"):
        model.prepare([BagBatch({"x20": torch.ones(1, 30, 5)})], 1, edges_months=(0, 1), seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prototypes": 0}, "prototypes=0: expected an integer of at least 1"),
        ({"prior_tiles": 0.0}, r"prior_tiles=0.0: expected a number above 0"),
        ({"features": "variances"}, "features='variances': expected all or means"),
    ],
)
def test_options_of_panther_are_checked(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build_model("panther", backbone_dim=5, **options)


def test_only_the_means_of_the_mixture():
    model = build_model("panther", backbone_dim=5, prototypes=3, features="means")
    assert model.head.in_features == 15
    assert model(torch.randn(2, 4, 5)).logits.shape == (2, 4)

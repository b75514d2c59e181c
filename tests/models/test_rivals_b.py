"""Prototype, attention and multi-scale models against figures of their authors' programs.

`material/golden/rivals_b.json` holds the figures; `material/README.md` has the recipe of the draws.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from factories import make_cohort
from made_up_bags import WIDTH, pad
from made_up_bags import bag as bag_of_tiles
from made_up_bags import build as made_up
from planted_bags import ensemble, planted_slide
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from typer.testing import CliRunner

from cfusion.cli.main import app
from cfusion.config import DataConfig
from cfusion.data.bags import make_bags
from cfusion.data.loader import BagLoader
from cfusion.data.shards import open_shards
from cfusion.errors import ConfigError, DataError
from cfusion.explanation import explain
from cfusion.models import attention_maps, build_model
from cfusion.models.pairing import rows_above
from cfusion.models.panther import PANTHER
from cfusion.models.scmil import SCMIL, ClusterAttention
from cfusion.models.time_mixture import TimeMixture, TimeMixtureHead
from cfusion.runs.crossval import cross_validate
from cfusion.runs.run import Run
from cfusion.survival.losses import LOSSES, cox
from cfusion.training.folds import ready_fold
from cfusion.training.world import join_world
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
    with pytest.raises(ConfigError, match=r"model.options.heads=0: expected an integer of at least 1"):
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


def test_prototypes_come_only_from_the_training_bags_and_repeat():
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


def mustmil_names(scales: int) -> dict[str, str]:
    names = {"joint_scores.content.": "attention_general.0.", "joint_scores.score.": "attention_general.2."}
    names["joint_head."] = "classifier."
    for i in range(scales):
        names |= {f"embed.{i}.": f"embeddings.{i}.", f"heads.{i}.": f"embeddings_fc.{i}.0."}
        names |= {f"scores.{i}.content.": f"attentions.{i}.0.", f"scores.{i}.score.": f"attentions.{i}.2."}
    return names


@pytest.mark.parametrize("name", ["mustmil_multilabel", "mustmil_binary", "mustmil_three_scales"])
def test_mustmil_and_the_losses_of_its_scales(name: str):
    case = CASES[name]
    settings = case["settings"]
    scales, dim = settings["magnifications"], settings["fc_input_features"]
    magnifications = (20, 10, 5)[:scales]
    model = build_model(
        "mustmil", backbone_dim=dim, n_bins=settings["n_classes"], embed_dim=128, magnifications=magnifications,
        source=10,
    )  # fmt: skip
    names = mustmil_names(scales)
    load(model, drawn(case["parameters"], case["seed"]), names)
    losses = []
    for number, bag in enumerate(case["bags"]):
        stream = stream_of(case, number)
        drawn_tiles = [torch.from_numpy(stream.standard_normal((n, dim)))[None] for n in bag["patches_per_scale"]]
        output = model(BagBatch({f"x{m}": tiles for m, tiles in zip(magnifications, drawn_tiles, strict=True)}))
        close(output.logits, bag["logits"])
        probabilities = [logits.sigmoid() for logits in output.branch_logits]
        close(torch.cat(probabilities), bag["probabilities_by_scale"])
        target = torch.tensor([bag["target"]]).double()
        losses.append(sum(bce(logits, target) for logits in output.heads))
        assert losses[-1].item() == pytest.approx(bag["loss"], rel=BOUND)
    losses[0].backward()
    check_gradients(model, case["gradient_norms_of_bag_0"], names)


def test_the_loss_of_mustmil_is_the_mean_over_its_branches():
    output = made_up("mustmil")(bag_of_tiles(3, 5))
    targets = Targets(torch.tensor([1]), torch.tensor([True]), torch.tensor([4.0]))
    terms = [LOSSES["nll"](SurvivalOutput.from_logits(logits), targets) for logits in output.heads]
    assert len(terms) == 4
    torch.testing.assert_close(LOSSES["nll"](output, targets), sum(terms) / 4)


CSMIL_NAMES = {
    "embed.": "embedding_net.", "scale.": "res_attention.", "scores.content.": "attention.0.",
    "scores.score.": "attention.2.", "head.": "fc6.",
}  # fmt: skip


@pytest.mark.parametrize("name", ["csmil_three_clusters", "csmil_toy_softmax_over_scales"])
def test_csmil_with_and_without_a_softmax_over_scales(name: str):
    case = CASES[name]
    dim = case["parameters"]["embedding_net.0.weight"][1]
    model = build_model(
        "csmil", backbone_dim=dim, n_bins=1, clusters=0, as_published=name == "csmil_three_clusters"
    )  # fmt: skip
    load(model, drawn(case["parameters"], case["seed"]), CSMIL_NAMES)
    probabilities = []
    for number, bag in enumerate(case["bags"]):
        tiles = csmil_tiles(case, number, dim)
        pooled: list[torch.Tensor] = []
        hook = model.head.register_forward_hook(lambda module, given, found, pooled=pooled: pooled.append(given[0]))
        output = model(BagBatch({f"x{m}": tiles[:, :, scale] for scale, m in enumerate((20, 10, 5))}))
        hook.remove()
        close(output.logits, bag["logit"])
        close(pooled[0], bag["slide_feature"])
        probabilities.append(output.hazards)
        close(output.hazards, bag["probability"])
    label = torch.tensor([[float(case["bags"][0]["label"] % 2)]]).double()
    torch.nn.functional.binary_cross_entropy(probabilities[0], label).backward()
    check_gradients(model, case["gradient_norms_of_bag_0"], CSMIL_NAMES)


def csmil_tiles(case: dict[str, Any], number: int, dim: int) -> torch.Tensor:
    """[1, tile, scale, dim]; tiles of empty clusters, which have no weight there, are left out."""
    stream, counts = stream_of(case, number), case["bags"][number]["patches_per_cluster"]
    if case["case"] == "csmil_toy_softmax_over_scales":
        return torch.from_numpy(stream.standard_normal((1, counts[0], 3, 1, 1, dim)))[:, :, :, 0, 0]
    parts = [stream.standard_normal((count, dim, 3, 1)) for count in counts if count]
    return torch.from_numpy(np.concatenate(parts))[..., 0].transpose(1, 2)[None]


def test_each_cluster_of_csmil_has_its_share_whatever_its_size():
    model = made_up("csmil", clusters=2, dtype=torch.float64)
    near, far = torch.zeros(1, 1, WIDTH).double(), torch.full((1, 1, WIDTH), 9.0).double()
    few, many = (torch.cat([near.expand(1, n, -1), far], dim=1) for n in (1, 30))
    risks = [model(BagBatch(dict.fromkeys(("x20", "x10", "x5"), tiles))).risk.item() for tiles in (few, many)]
    assert risks[0] == pytest.approx(risks[1])
    unbalanced = made_up("csmil", clusters=0, dtype=torch.float64)
    others = [unbalanced(BagBatch(dict.fromkeys(("x20", "x10", "x5"), tiles))).risk.item() for tiles in (few, many)]
    assert others[0] != pytest.approx(others[1], abs=1e-6)


def test_tiles_are_paired_with_the_tiles_that_contain_them():
    batch = pad([bag_of_tiles(1, 3), bag_of_tiles(2, 9)], 2)
    for finer, coarser, ratio in (("x20", "x10", 2), ("x20", "x5", 4), ("x10", "x5", 2)):
        rows = rows_above(batch, finer, coarser)
        for bag in range(2):
            real = batch.masks[finer][bag]
            assert batch.masks[coarser][bag, rows[bag][real]].all()
            above = batch.positions[coarser][bag, rows[bag][real]]
            assert torch.equal(above, batch.positions[finer][bag][real] // ratio)


def test_pairs_follow_the_parents_of_the_shards(tmp_path: Path):
    files = make_cohort(tmp_path, patients=3, two_slides=2)
    data = DataConfig(shards=str(files.shards))
    dataset = open_shards(data)
    bags = make_bags(dataset, {"PT-0000": ("PT-0000-1", "PT-0000-2")}, "case", (20.0, 10.0, 5.0))
    loader = BagLoader(dataset, bags, data, magnifications=(20, 10, 5), seed=0)
    (batch,) = loader.stream([[0]], epoch=0, training=False)
    start, expected = 0, []
    for slide in bags[0].slide_ids:
        expected.append(dataset.read(slide, ["parent_x20"])["parent_x20"] + start)
        start += dataset.tiles(slide)["x10"]
    assert rows_above(batch, "x20", "x10")[0].tolist() == np.concatenate(expected).tolist()


@pytest.mark.parametrize("name", ["mustmil", "csmil"])
def test_tiles_without_a_pair_are_refused(name: str):
    model = made_up(name)
    one = bag_of_tiles(1, 5)
    with pytest.raises(DataError, match=r"Bag case-1 has no coordinates, 10 tiles at x20 and 5 at x10"):
        model(dataclasses.replace(one, positions=None))
    moved = {**one.positions, "x5": one.positions["x5"] + 1000}
    with pytest.raises(DataError, match=r"Bag case-1: 10 of 10 tiles at x20 lie in no tile at x5"):
        model(dataclasses.replace(one, positions=moved))
    with pytest.raises(ConfigError, match=r"x20 and x15: expected magnifications of which one is an integer multiple"):
        build_model(name, backbone_dim=4, magnifications=(20, 15), source=20)
    with pytest.raises(DataError, match=r"The model reads x10, but the bags carry x20"):
        model(BagBatch({"x20": torch.randn(1, 3, WIDTH)}))


SCMIL_NAMES = {
    "gate.": "backbone.softfilter.layers.",
    "scores.content.": "backbone.amil.attention_a.0.", "scores.gate.": "backbone.amil.attention_b.0.",
    "scores.score.": "backbone.amil.attention_c.",
    **{f"layers.{i}.query_key_value.": f"backbone.attens.{i}.to_qkv." for i in range(2)},
    **{f"layers.{i}.out.": f"backbone.attens.{i}.to_out." for i in range(2)},
    "head.hidden.": "mlp.layers.", "head.weight.": "mlp.fc.", "head.mean": "params.mu",
    "head.deviation": "params.sigma", "head.mean_map": "layer_mu.0", "head.deviation_map": "layer_sigma.0",
}  # fmt: skip


def scmil(case: Mapping[str, Any]) -> SCMIL:
    backbone, head = case["backbone_arguments"], case["head_arguments"]
    model = build_model(
        "scmil", backbone_dim=backbone["input_size"], cluster_size=backbone["cluster_size"], layers=backbone["deep"],
        feature_weight=backbone["feature_weight"], components=head["K"], head_width=head["hidden_size"],
        as_published=True,
    )  # fmt: skip
    weights = drawn(case["parameters"], case["seed"])
    for name, added in (case["added_to_the_drawn_weights"] or {}).items():
        weights[name] += torch.tensor(added)
    return load(model, weights, SCMIL_NAMES)


def published_density(mixture: TimeMixture, time: torch.Tensor) -> torch.Tensor:
    """The density at the time as the program computes it, with its three additions of 1e-6."""
    place = torch.log(time.exp() - 1 + 1e-6)
    log_normal = torch.distributions.Normal(mixture.means, mixture.deviations).log_prob(place)
    top = log_normal.max()
    mixed = torch.log((mixture.weights[0] * (log_normal - top).exp()).sum() + 1e-6) + top
    return (mixed + torch.log(time.exp() / (time.exp() - 1 + 1e-6))).exp()


@pytest.mark.parametrize("name", ["scmil_given_clusters", "scmil_kmeans_two_layers", "scmil_months"])
def test_distributions_of_scmil(name: str, monkeypatch: pytest.MonkeyPatch):
    case = CASES[name]
    model, own_clusters = scmil(case), case["kmeans"] == "sklearn"
    dim = case["backbone_arguments"]["input_size"]
    losses, kmeans_labels = [], ClusterAttention.labels
    for number, bag in enumerate(case["bags"]):
        calls = iter(bag["kmeans_calls"])

        def labels(layer: ClusterAttention, tiles: torch.Tensor, places: torch.Tensor, calls=calls) -> torch.Tensor:
            if len(tiles) < 2:
                return torch.zeros(len(tiles), dtype=torch.long)
            expected = torch.tensor(next(calls)["labels"])
            if own_clusters:
                assert torch.equal(kmeans_labels(layer, tiles, places), expected)
            return expected

        with monkeypatch.context() as patched:
            patched.setattr(ClusterAttention, "labels", labels)
            tiles = tiles_of(case, number, bag["n"], dim)
            batch = BagBatch({"x20": tiles}, None, {"x20": torch.tensor(bag["coords"])[None]})
            mixture = model.mixture(batch.features, batch)
        assert not list(calls)
        close(mixture.weights, bag["w"])
        close(mixture.means, bag["mu"])
        close(mixture.deviations, bag["sigma"])
        close(mixture.log_survival(torch.tensor(case["times"], dtype=torch.float64)).exp(), bag["survival_at_times"])
        time = torch.tensor([bag["time"]], dtype=torch.float64)
        survival, density = mixture.log_survival(time).exp().squeeze(), published_density(mixture, time)
        close(survival, bag["survival"])
        close(density, bag["pdf"])
        hazard = torch.log((density + 1e-6) / (survival + 1e-6)) * (bag["censorship"] == 0)
        losses.append(-hazard - torch.log(survival + 1e-6))
        assert losses[-1].item() == pytest.approx(bag["loss"], rel=BOUND)
    losses[0].sum().backward()
    check_gradients(model, case["gradient_norms_of_bag_0"], SCMIL_NAMES)


def test_hazards_of_scmil_are_those_of_its_distribution_between_the_edges():
    model = made_up("scmil", dtype=torch.float64)
    model.prepare(iter(()), 0, edges_months=(0.0, 2.0, 7.5, 30.0, 150.0), seed=0)
    batch = bag_of_tiles(1, 9)
    features = {"x20": batch.features["x20"].double()}
    survival = model.mixture(features, batch).log_survival(torch.tensor([2.0, 7.5, 30.0, 150.0]).double()).exp()
    torch.testing.assert_close(model(batch).survival, survival)


def test_late_times_are_finite_in_f32():
    mixture = TimeMixture(torch.zeros(1, 1), torch.tensor([120.0]), torch.tensor([9.0]))
    months = torch.tensor([1e-4, 80.0, 100.0, 120.0, 140.0, 4000.0])
    expected = torch.special.ndtr((120 - torch.log(torch.expm1(months.double()[1:5]))) / 9)
    torch.testing.assert_close(mixture.log_survival(months)[0, 1:5].exp().double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.isfinite(mixture.logits(torch.cat([torch.zeros(1), months]))).all()


def test_a_component_with_a_share_too_small_for_f32_has_a_finite_gradient():
    head = TimeMixtureHead(4, 8, 3, 0.0)
    with torch.no_grad():
        head.weight.bias.copy_(torch.tensor([200.0, 0.0, -200.0]))
    mixture = head(torch.ones(1, 4))
    assert (mixture.weights == 0).any()
    mixture.logits(torch.tensor([0.0, 10.0, 50.0])).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters() if parameter.grad is not None)


def test_windows_hold_each_tile_once_and_less_than_two_clusters():
    layer = ClusterAttention(8, 4, 0.8, 0.0, restore_order=True)
    labels = torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(2)) * 2
    order, windows, real = layer.windows(labels)
    assert order[windows[real]].sort().values.tolist() == list(range(50))
    assert real.sum(dim=1).max() < 8
    assert all(len(labels[order[window[own]]].unique()) == 1 for window, own in zip(windows, real, strict=True))


def test_layers_of_scmil_return_the_tiles_in_their_order():
    layer = ClusterAttention(8, 4, 0.8, 0.0, restore_order=True).eval()
    tiles, places = torch.randn(30, 8), torch.arange(60).reshape(30, 2)
    order, windows, real = layer.windows(layer.labels(tiles, places))
    clusters = [window[own] for window, own in zip(windows, real, strict=True)]
    for members in clusters:
        rows = order[members]
        query, key, value = layer.query_key_value(tiles[rows]).unflatten(1, (3, 8, 1)).permute(1, 2, 0, 3)
        weights = (query @ key.mT).softmax(dim=2)
        expected = layer.out((weights @ value).squeeze(2).T) + tiles[rows]
        torch.testing.assert_close(layer(tiles, places)[rows], expected)


def test_a_bag_of_which_the_filter_keeps_nothing():
    model = made_up("scmil").train()
    torch.nn.init.constant_(model.gate[2].bias, -100.0)
    model(bag_of_tiles(1, 5)).logits.sum().backward()
    assert not model.layers[0].query_key_value.weight.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 20}, r"model.embed_dim is 20: scmil has 8 heads"),
        ({"as_published": True}, r"The width of the embeddings is 12: scmil has 8 heads"),
        ({"layers": 0}, r"model.options.layers=0: expected an integer of at least 1"),
        ({"feature_weight": 2}, r"model.options.feature_weight=2: expected a number from 0 to 1"),
    ],
)
def test_options_of_scmil_are_checked(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build_model("scmil", **{"backbone_dim": WIDTH, "embed_dim": 16, **options})


def test_scmil_needs_coordinates():
    with pytest.raises(DataError, match="The model needs the position of every x20 tile, and these bags have none"):
        made_up("scmil")(dataclasses.replace(bag_of_tiles(1, 5), positions=None))


def prototype_layer(ours: str, published: str) -> dict[str, str]:
    parts = {
        "query": "to_q", "key": "to_k", "value": "to_v", "out.0": "out_proj", "network": "mlp",
        "attention_norm": "att_norm", "network_norm": "post_norm",
    }  # fmt: skip
    return {f"{ours}.{part}.": f"{published}.{name}." for part, name in parts.items()}


PROTOSURV_NAMES = {
    "start.": "ProtoGNN.proto_attention.proto_mlp.", "log_spread": "ProtoGNN.proto_attention.proto_logsigma",
    "offsets": "ProtoGNN.proto_attention.rand_mul", "before.": "pre_fc.", "after.": "post_fc.",
    "head.": "risk_prediction_layer.", "as_tiles.": "mlp_comp.",
}  # fmt: skip
for i in range(8):
    PROTOSURV_NAMES |= prototype_layer(f"reading.{i}", f"ProtoGNN.proto_attention.layers.{i}")
for i in range(2):
    PROTOSURV_NAMES |= prototype_layer(f"fusion.{i}", f"proto_fusion_to_p.layers.{i}")
    convolution = f"total_layers.{i}.conv."
    PROTOSURV_NAMES |= {
        f"convolutions.{i}.inverse_temperature": f"{convolution}aggr_module.t",
        f"convolutions.{i}.expand.": f"{convolution}mlp.0.", f"convolutions.{i}.norm.": f"{convolution}mlp.1.",
        f"convolutions.{i}.contract.": f"{convolution}mlp.4.", f"norms.{i}.": f"total_layers.{i + 1}.norm.",
    }  # fmt: skip


def protosurv_bag(case: Mapping[str, Any], number: int) -> BagBatch:
    bag = case["bags"][number]
    tiles = torch.from_numpy(stream_of(case, number).standard_normal((bag["n"], case["arguments"]["input_dim"])))
    neighbours = torch.tensor(bag["edges"][1]).reshape(1, bag["n"], -1)
    return BagBatch(
        {"x20": tiles[None]}, None, {"x20": torch.tensor(bag["coords"])[None]}, ("",), None, {"x20": neighbours}
    )


def test_risks_and_losses_of_protosurv(monkeypatch: pytest.MonkeyPatch):
    case = CASES["protosurv"]
    shape = case["arguments"]
    model = build_model(
        "protosurv", backbone_dim=shape["input_dim"], n_bins=1, embed_dim=shape["proto_fc_hidden_dim"],
        types=shape["nr_types"], prototypes=shape["num_proto"], layers=shape["num_layers"], width=shape["dim_proto"],
        iterations=shape["proto_iters"], fusion_layers=shape["fusion_layer_to_p"], graph_width=shape["hidden_dim"],
        as_published=True,
    )  # fmt: skip
    weights = drawn(case["parameters"], case["seed"])
    for stands, others in case["names_that_share_a_tensor"].items():
        weights |= dict.fromkeys(others, weights[stands])
    load(model, weights, PROTOSURV_NAMES)
    types = [torch.tensor(bag["patch_types"])[None] for bag in case["bags"]]
    outputs = []
    for number, bag in enumerate(case["bags"]):
        monkeypatch.setattr(model, "types_of", lambda tiles, number=number: types[number])
        one = protosurv_bag(case, number)
        outputs.append(model(one))
        close(outputs[-1].logits, bag["log_risk"])
        expected = 0.01 * bag["compatibility"] + 0.1 * bag["orthogonality"]
        assert outputs[-1].penalty.item() == pytest.approx(expected, rel=BOUND)
    record = case["batch_of_four"]
    log_risks, penalty = torch.cat([o.logits[:, 0] for o in outputs]), torch.stack([o.penalty for o in outputs]).mean()
    months = torch.tensor([bag["months"] for bag in case["bags"]], dtype=torch.float64)
    event = torch.tensor([bag["censorship"] == 0 for bag in case["bags"]])
    loss = published_cox(log_risks, months, event)
    assert loss.item() == pytest.approx(record["cox"], rel=BOUND)
    assert (loss + penalty).item() == pytest.approx(record["total"], rel=BOUND)
    (loss + penalty).backward()
    check_gradients(model, record["gradient_norms"], PROTOSURV_NAMES)


def published_cox(log_risks: torch.Tensor, months: torch.Tensor, event: torch.Tensor) -> torch.Tensor:
    """Cox's loss as ProtoSurv computes it, with 1e-5 in the logarithm."""
    order = months.argsort(descending=True)
    top = log_risks.max()
    at_risk = ((log_risks[order] - top).exp().cumsum(0) + 1e-5).log() + top
    return ((at_risk - log_risks[order]) * event[order]).sum() / event.sum()


def test_published_number_of_parameters_of_protosurv():
    with torch.device("meta"):
        model = build_model("protosurv", backbone_dim=1024, n_bins=1)
    assert sum(p.numel() for p in model.parameters()) == 52_987_779 - 919_808


def test_prototypes_read_the_tiles_of_their_type():
    model = made_up("protosurv", types=2, prototypes=3)
    model.type_centres.copy_(torch.stack([torch.full((WIDTH,), -5.0), torch.full((WIDTH,), 5.0)]))
    one = bag_of_tiles(1, 5)
    tiles = one.features["x20"]
    tiles[0, :4] -= 5
    tiles[0, 4:] += 5
    assert model.types_of(tiles)[0].tolist() == [0] * 4 + [1] * 6
    (maps,) = attention_maps(model, one)
    assert not maps["reading.0"].received[:, 4:].any()
    assert not maps["reading.3"].received[:, :4].any()
    assert maps["reading.3"].summary.shape == (3 * 3, 10)
    assert (maps["fusion.0"].received > 0).all()


def test_types_that_a_slide_lacks_read_all_its_tiles():
    model = made_up("protosurv", types=4)
    model.type_centres.copy_(1000.0 * torch.eye(WIDTH)[:4])
    one = bag_of_tiles(1, 5)
    one.features["x20"][..., 1] += 100
    assert set(model.types_of(one.features["x20"])[0].tolist()) == {1}
    output = model(one)
    assert torch.isfinite(output.logits).all()
    assert torch.isfinite(output.penalty).all()


def test_types_are_centres_of_the_training_tiles():
    model = build_model("protosurv", backbone_dim=5, embed_dim=8, types=3)
    model.prepare(iter(made_up_bags((9, 20))), 2, edges_months=(0, 1), seed=1)
    (bag,) = made_up_bags((9,))
    expected = torch.cdist(bag.features["x20"], model.type_centres).argmin(dim=2)
    assert torch.equal(model.types_of(bag.features["x20"]), expected)
    with pytest.raises(DataError, match=r"model.options.types=3, but the 1 training bags have only 2 different tiles"):
        model.prepare(iter(made_up_bags((2,))), 1, edges_months=(0, 1), seed=1)


@pytest.mark.parametrize("loss", ["nll", "cox"])
def test_penalties_enter_the_loss(loss: str):
    bags = pad([bag_of_tiles(1, 5), bag_of_tiles(2, 3)])
    targets = Targets(torch.tensor([1, 2]), torch.tensor([True, True]), torch.tensor([3.0, 4.0]))
    output = made_up("protosurv")(bags)
    plain = dataclasses.replace(output, penalty=None)
    torch.testing.assert_close(LOSSES[loss](output, targets), LOSSES[loss](plain, targets) + output.penalty)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"types": 0}, "model.options.types=0: expected an integer of at least 1"),
        ({"layers": 1}, "model.options.layers=1: expected an integer of at least 2"),
        ({"width": 10}, "model.options.width=10: protosurv has 3 heads"),
    ],
)
def test_options_of_protosurv_are_checked(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build_model("protosurv", backbone_dim=5, **options)


TRAINED = [
    ("abmil", {}, "nll"), ("abmil", {}, "cox"), ("panther", {"prototypes": 4}, "nll"), ("mustmil", {}, "nll"),
    ("csmil", {"clusters": 3}, "nll"), ("scmil", {"cluster_size": 4}, "nll"), ("protosurv", {"types": 3}, "cox"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "loss"), TRAINED, ids=str)
def test_a_cohort_is_trained_from_the_command_line(name: str, options: dict[str, Any], loss: str, tmp_path: Path):
    files = make_cohort(tmp_path / "cohort", patients=30)
    config = files.config(
        tmp_path / "run", model={"name": name, "options": options}, train={"epochs": 1, "loss": loss},
        splits={"folds": 2}, evaluation={"n_bins": 3},
    )  # fmt: skip
    settings = tmp_path / "study.yaml"
    settings.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    result = CliRunner().invoke(app, ["train", str(settings)])
    assert result.exit_code == 0, result.output
    predictions = pd.read_csv(tmp_path / "run" / "predictions.csv").set_index("case_id")
    assert len(predictions) == 30
    assert np.isfinite(predictions["risk"]).all()
    model, out = str(tmp_path / "run" / "fold_0" / "model"), tmp_path / "risks.csv"
    again = CliRunner().invoke(app, ["predict", str(files.shards), "--model", model, "--out", str(out)])
    assert again.exit_code == 0, again.output
    repeated = pd.read_csv(out).set_index("case_id")["risk"]  # without a table a slide counts as a patient
    fold = predictions.loc[(predictions["fold"] == 0) & (predictions.index != "PT-0000"), "risk"]
    np.testing.assert_allclose(repeated[fold.index + "-1"], fold, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("panther", {"prototypes": 4}), ("scmil", {"cluster_size": 4})])
def test_folds_that_share_a_read_are_prepared_as_separate_ones(name: str, options: dict[str, Any], tmp_path: Path):
    files, found = make_cohort(tmp_path / "cohort", patients=30), []
    for folds in ("separate", "together"):
        config = files.config(
            tmp_path / folds, model={"name": name, "options": options}, train={"epochs": 2, "folds": folds},
            splits={"folds": 2}, parallel={"precision": "f64"}, evaluation={"n_bins": 3},
        )  # fmt: skip
        cross_validate(config)
        found.append(pd.read_csv(config.output / "predictions.csv").set_index("case_id")["risk"])
    np.testing.assert_allclose(found[0], found[1][found[0].index], atol=1e-9)


def test_a_fold_is_prepared_only_from_its_training_patients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = make_cohort(tmp_path / "cohort", patients=20)
    config = files.config(
        tmp_path / "run", model={"name": "panther", "options": {"prototypes": 2}}, splits={"folds": 2},
        evaluation={"n_bins": 2},
    )  # fmt: skip
    run, seen = Run.prepare(config), []

    def prepare(model: PANTHER, bags: Iterable[BagBatch], count: int, **facts: Any) -> None:
        cases = [case for bag in bags for case in bag.case_ids]
        assert len(cases) == count
        seen.append((cases, facts["edges_months"]))

    monkeypatch.setattr(PANTHER, "prepare", prepare)
    runtime = join_world(config.parallel)
    for split in run.splits:
        fold = ready_fold(config, run.cohort, split, run.dataset, runtime, folder=tmp_path, on_epoch=None)
        assert seen[-1] == (list(split.train), fold.job.bins[run.cohort.name].edges)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["abmil", "panther", "scmil", "protosurv", "mustmil", "csmil"])
def test_tiles_are_explained(name: str, tmp_path: Path):
    slide, _ = planted_slide(3)
    found = explain(ensemble(tmp_path, name, folds=1), slide, occlusion="tiles")
    assert list(found.levels) == (["x20", "x10", "x5"] if name in ("mustmil", "csmil") else ["x20"])
    assert ("attention" in found.methods) == (name != "panther")
    assert all(np.isfinite(level.mean).all() for level in found.levels.values())

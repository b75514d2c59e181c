"""Patch-GCN, DeepGraphConv, HIPT and ZoomMIL against their authors' programs.

`material/golden/rivals_a.json` holds the programs' figures; `material/README.md` has the recipe of the draws.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cfusion.errors import ConfigError
from cfusion.models import build_model, zoommil
from cfusion.models.attention_scores import AttentionScores
from cfusion.models.graph import latent_neighbours
from cfusion.neighbours import nearest_tiles
from cfusion.survival.losses import LOSSES
from cfusion.types import BagBatch, Targets

RECORDS = {
    record["model"]: record
    for record in json.loads((Path(__file__).parents[1] / "material" / "golden" / "rivals_a.json").read_text())
}
DGC = ["deepgraphconv_small", "deepgraphconv_default"]
GRAPHS = ["patchgcn_small", *DGC]
Names = dict[str, tuple[str, ...]]


def both(ours: str, *theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for kind in ("weight", "bias"):
        yield f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs)


def gated(ours: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from both(f"{ours}.content", f"{theirs}.attention_a.0")
    yield from both(f"{ours}.gate", f"{theirs}.attention_b.0")
    yield from both(f"{ours}.score", f"{theirs}.attention_c")


def names_of_graph_models() -> Names:
    names = [*both("embed.0", "fc.0"), *both("joint.0", "path_phi.0"), *gated("gated", "path_attention_head")]
    names += [*both("summary.0", "path_rho.0"), *both("head", "classifier")]
    for layer in range(3):
        conv = f"layers.{layer}.conv"
        names += [(f"convolutions.{layer}.inverse_temperature", (f"{conv}.t",))]
        for ours, theirs in (("expand", "mlp.0"), ("norm", "mlp.1"), ("contract", "mlp.4")):
            names += both(f"convolutions.{layer}.{ours}", f"{conv}.{theirs}")
        names += both(f"norms.{layer - 1}", f"layers.{layer}.norm")
        names += both(f"convolutions.{layer}.network.0", f"conv{layer + 1}.nn.0")
        names += both(f"convolutions.{layer}.network.2", f"conv{layer + 1}.nn.2")
    return dict(names)


def names_of_hipt() -> Names:
    names = [*both("embed.0", "global_phi.0"), *gated("gated", "global_attn_pool"), *both("summary.0", "global_rho.0")]
    names += both("head", "classifier")
    names += [("region.class_token", ("local_vit.cls_token",)), ("region.positions", ("local_vit.pos_embed",))]
    names += [*both("region.embed.0", "local_vit.phi.0"), *both("region.norm", "local_vit.norm")]
    for number in range(6):
        parts = {
            "attention_norm": "norm1", "query_key_value": "attn.qkv", "out": "attn.proj", "feed_forward_norm": "norm2",
            "feed_forward.0": "mlp.fc1", "feed_forward.2": "mlp.fc2",
        }  # fmt: skip
        for ours, theirs in parts.items():
            names += both(f"region.blocks.{number}.{ours}", f"local_vit.blocks.{number}.{theirs}")
    for number in range(2):
        layer = f"global_transformer.layers.{number}"
        for kind in ("weight", "bias"):
            names.append((f"layers.{number}.attention.query_key_value.{kind}", (f"{layer}.self_attn.in_proj_{kind}",)))
        parts = {
            "attention.out": "self_attn.out_proj", "attention_norm": "norm1", "feed_forward.0": "linear1",
            "feed_forward.3": "linear2", "feed_forward_norm": "norm2",
        }  # fmt: skip
        for ours, theirs in parts.items():
            names += both(f"layers.{number}.{ours}", f"{layer}.{theirs}")
    return dict(names)


def names_of_zoommil() -> Names:
    names = [*both("head", "classify_head")]
    for ours, theirs in (("x5", "low"), ("x10", "mid"), ("x20", "high")):
        names += [*both(f"embed.{ours}.0", f"fc_{theirs}_mag.0"), *gated(f"gated.{ours}", f"ga_{theirs}_mag")]
        names += gated(f"selectors.{ours}", f"aux_ga_{theirs}_mag")
    return dict(names)


NAMES = {
    "PatchGCN": names_of_graph_models(), "DeepGraphConv": names_of_graph_models(), "HIPT": names_of_hipt(),
    "ZoomMIL": names_of_zoommil(),
}  # fmt: skip
"""Per class, the published names whose tensors, stacked by rows, make ours."""


def drawn_weights(record: dict[str, Any]) -> dict[str, torch.Tensor]:
    stream, weights = np.random.RandomState(record["seed"]), {}
    for name, shape in sorted({**record["parameters"], **record["buffers"]}.items()):
        z = stream.standard_normal(shape)
        z = z / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1 * z + name.endswith(".weight")
        weights[name] = torch.from_numpy(z)
    return weights


def load(model: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """Load weights by their published names; ours may stack several."""
    names = NAMES[type(model).__name__]
    model.double().load_state_dict({
        ours: torch.cat([weights[name] for name in names[ours]]).reshape(like.shape)
        for ours, like in model.state_dict().items()
    })  # fmt: skip
    return model.eval()


def gradient_norms(model: nn.Module) -> dict[str, float]:
    norms, names = {}, NAMES[type(model).__name__]
    for ours, parameter in model.named_parameters():
        if parameter.grad is not None:
            for name, part in zip(names[ours], parameter.grad.chunk(len(names[ours])), strict=True):
                norms[name] = part.norm().item()
    return norms


def check_outputs(model: nn.Module, bags: list[BagBatch], record: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare logits, risks and, where the record has them, losses and gradient norms."""
    outputs = [model(bag) for bag in bags]
    for output, ours, theirs in zip(outputs, record["bags"], expected["bags"], strict=True):
        np.testing.assert_allclose(output.logits[0].detach(), theirs["logits"], rtol=1e-9, atol=1e-9)
        if "risk" in theirs:
            assert output.risk.item() == pytest.approx(theirs["risk"], rel=1e-9)
        if "nll" in theirs:
            targets = Targets(torch.tensor([ours["label"]]), torch.tensor([ours["censorship"] == 0]), torch.ones(1))
            assert LOSSES["nll"](output, targets, alpha=0.2).item() == pytest.approx(theirs["nll"], rel=1e-9)
    if "gradient_norms_of_bag_0" not in expected:
        return
    first = Targets(torch.tensor([1]), torch.tensor([True]), torch.ones(1))
    LOSSES["nll"](outputs[0], first, alpha=0.2).sum().backward()
    norms = gradient_norms(model)
    for name, theirs in expected["gradient_norms_of_bag_0"].items():
        assert norms.pop(name) == pytest.approx(theirs, rel=1e-8, abs=1e-12), name
    assert all(norm < 1e-12 for norm in norms.values()), norms


def graph_bag(record: dict[str, Any], number: int) -> BagBatch:
    stream, bag = np.random.RandomState(1000 * record["seed"] + number), record["bags"][number]
    tiles = stream.standard_normal((bag["nodes"], bag["features"])) * record["feature_scale"]
    places = stream.permutation(1_000_000)[: bag["nodes"]]
    positions = torch.from_numpy(np.stack([places // 1000, places % 1000], axis=1))
    return BagBatch({"x20": torch.from_numpy(tiles)[None]}, None, {"x20": positions[None]})


def graph_model(record: dict[str, Any], **options: Any) -> nn.Module:
    weights = drawn_weights(record)
    if record["model"] == "patchgcn_small":
        name, dim, width = "patchgcn", 4 * record["constructor"]["hidden_dim"], weights["fc.0.weight"].shape[1]
    else:
        name, dim = "deepgraphconv", 2 * record["constructor"].get("hidden_dim", 256)
        width = weights["conv1.nn.0.weight"].shape[1]
    model = load(
        build_model(name, backbone_dim=width, embed_dim=dim, **{"as_published": True, "dropout": 0.0, **options}),
        weights,
    )
    for number, convolution in enumerate(model.convolutions, 1):
        if name == "deepgraphconv":
            convolution.epsilon = weights[f"conv{number}.eps"].item()
    return model


@pytest.mark.parametrize("name", ["patchgcn_small", "deepgraphconv_small"])
def test_graphs_are_those_of_the_program(name: str):
    record = RECORDS[name]
    for number, bag in enumerate(record["bags"]):
        batch = graph_bag(record, number)
        assert nearest_tiles(batch.positions["x20"][0].numpy(), 8).tolist() == bag["neighbours_spatial"]
        if "neighbours_latent" in bag:
            assert latent_neighbours(batch, "x20", 8)[0].tolist() == bag["neighbours_latent"]


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_models_agree_with_the_program(name: str):
    record = RECORDS[name]
    bags = [graph_bag(record, number) for number in range(len(record["bags"]))]
    model = graph_model(record)
    check_outputs(model, bags, record, record)
    if name in DGC:
        check_outputs(graph_model(record, edges="spatial"), bags, record, record["with_edge_agg_spatial"])
        for convolution in model.convolutions:
            convolution.epsilon = 0.0
        check_outputs(model, bags, record, record["with_eps_zero"])


@pytest.mark.parametrize(("name", "edges"), [("patchgcn_small", "spatial"), ("deepgraphconv_small", "latent")])
def test_two_slides_in_one_bag_agree_with_the_program(name: str, edges: str):
    record = RECORDS[name]
    bags = [graph_bag(record, number) for number in (0, 1)]
    tiles, positions = (
        {"x20": torch.cat([getattr(bag, part)["x20"] for bag in bags], dim=1)} for part in ("features", "positions")
    )
    slides = torch.tensor([[0] * record["bags"][0]["nodes"] + [1] * record["bags"][1]["nodes"]])
    batch = BagBatch(tiles, None, positions, slides={"x20": slides})
    logits = graph_model(record)(batch).logits[0].detach()
    np.testing.assert_allclose(logits, record["two_slides"][f"logits_with_edge_agg_{edges}"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["patchgcn_small", "deepgraphconv_small"])
def test_by_default_a_tile_receives_from_its_own_neighbours(name: str):
    record = RECORDS[name]
    bag, model = graph_bag(record, 3), graph_model(record, as_published=False)
    kind = "neighbours_latent" if name in DGC else "neighbours_spatial"
    tiles = bag.features["x20"].requires_grad_()
    caught = []
    model.convolutions[0].register_forward_hook(lambda _m, _i, output: caught.append(output))
    model(bag)
    (gradient,) = torch.autograd.grad(caught[0][5].sum(), tiles)
    assert gradient[0].abs().sum(dim=1).nonzero().flatten().tolist() == sorted([5, *record["bags"][3][kind][5]])


@pytest.mark.parametrize("name", ["patchgcn", "deepgraphconv"])
def test_options_of_graph_models_are_checked(name: str):
    for options, message in (
        ({"edges": "near"}, "edges='near': expected spatial or latent"),
        ({"neighbours": 0}, "neighbours=0: expected an integer of at least 1"),
        ({"dropout": 2}, "dropout=2: expected a number"),
        ({"embed_dim": 63}, "embed_dim=63"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_model(name, **{"backbone_dim": 8, **options})


@pytest.mark.parametrize(
    ("name", "record", "unused"),
    [
        ("patchgcn", "patchgcn_small", 256),
        ("deepgraphconv", "deepgraphconv_default", 0),
        ("zoommil", "zoommil_small", 0),
    ],
)
def test_numbers_of_parameters_at_the_published_size(name: str, record: str, unused: int):
    with torch.device("meta"):
        model = build_model(name, backbone_dim=1024)
    expected = RECORDS[record]["n_parameters_at_default_size"] - unused
    assert sum(p.numel() for p in model.parameters()) == expected


def square(rows: int, side: int) -> torch.Tensor:
    """Positions [rows × side², 2] of squares next to each other, each row by row."""
    within = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")[::-1], dim=2)
    left = torch.tensor([side, 0]) * torch.arange(rows)[:, None, None, None]
    return (within + left).reshape(-1, 2)


@pytest.mark.parametrize("name", ["hipt_gp", "hipt_lgp"])
def test_hipt_agrees_with_the_program(name: str):
    record, region = RECORDS[name], {"hipt_gp": "mean", "hipt_lgp": "transformer"}[name]
    side = {"hipt_gp": 1, "hipt_lgp": 16}[name]
    bags = []
    for number, bag in enumerate(record["bags"]):
        stream, shape = np.random.RandomState(1000 * record["seed"] + number), bag["input_shape"]
        tiles = torch.from_numpy(stream.standard_normal(shape)).reshape(1, -1, shape[-1])
        bags.append(BagBatch({"x20": tiles}, None, {"x20": square(shape[0], side)[None]}))
    model = build_model(
        "hipt", backbone_dim=bags[0].features["x20"].shape[2], region=region, side=side, dropout=0.0, as_published=True
    )
    load(model, drawn_weights(record))
    summaries = []
    model.region.register_forward_hook(lambda _m, _i, output: summaries.append(output.detach()))
    check_outputs(model, bags, record, record)
    if first := record.get("region_embedding_of_bag_1_first_8"):
        np.testing.assert_allclose(summaries[1][0, :8], first, rtol=1e-9, atol=1e-9)
    if name == "hipt_lgp":
        assert sum(p.numel() for p in model.parameters()) == record["n_parameters_at_default_size"]


def zoommil_bags(record: dict[str, Any]) -> list[BagBatch]:
    bags = []
    for number, bag in enumerate(record["bags"]):
        stream, features, positions = np.random.RandomState(1000 * record["seed"] + number), {}, {}
        coarse = torch.stack([torch.arange(bag["patches"][0]), torch.zeros(bag["patches"][0], dtype=torch.long)], dim=1)
        for name, count in zip(("x5", "x10", "x20"), bag["patches"], strict=True):
            features[name] = torch.from_numpy(stream.standard_normal((1, count, record["constructor"]["in_feat_dim"])))
            positions[name] = coarse[None]
            coarse = (2 * coarse[:, None] + square(1, 2)).reshape(-1, 2)
        bags.append(BagBatch(features, None, positions))
    return bags


def zoommil_model(record: dict[str, Any], **options: Any) -> nn.Module:
    model = build_model("zoommil", backbone_dim=24, embed_dim=16, selected=3, **options)
    for scores in (model.gated, model.selectors):
        for name in scores:
            scores[name] = AttentionScores(16, record["constructor"]["hidden_feat_dim"])  # not half of 16
    return load(model, drawn_weights(record))


def test_zoommil_agrees_with_the_program():
    record = RECORDS["zoommil_small"]
    bags, model = zoommil_bags(record), zoommil_model(record)
    check_outputs(model, bags, record, record)
    for bag, selected in zip(bags, record["selected_indices"], strict=True):
        rows = model.tile_view("pool.x10", bag).rows.reshape(-1, 4)
        assert (rows[:, 0] // 4).tolist() == selected["low"]
        children = [rows.flatten()[i].item() for i in selected["mid_within_selection"]]
        assert (model.tile_view("pool.x20", bag).rows.reshape(-1, 4)[:, 0] // 4).tolist() == children


def test_zoommil_trains_as_the_program_does(monkeypatch: pytest.MonkeyPatch):
    record = RECORDS["zoommil_small"]
    bags, model = zoommil_bags(record), zoommil_model(record, as_published=True).train()
    seeds = iter(1000 * record["seed"] + 500 + number for number in range(len(bags)))

    def outputs(bag: BagBatch) -> Any:
        stream = np.random.RandomState(next(seeds))
        monkeypatch.setattr(zoommil, "random_normal", lambda shape, _: torch.from_numpy(stream.standard_normal(shape)))
        return model(bag)

    found = [outputs(bag) for bag in bags]
    for output, theirs in zip(found, record["training_mode"]["bags"], strict=True):
        np.testing.assert_allclose(output.logits[0].detach(), theirs["logits"], rtol=1e-9, atol=1e-9)
    first = Targets(torch.tensor([1]), torch.tensor([True]), torch.ones(1))
    LOSSES["nll"](found[0], first, alpha=0.2).sum().backward()
    norms = gradient_norms(model)
    for name, theirs in record["training_mode"]["gradient_norms_of_bag_0"].items():
        assert norms[name] == pytest.approx(theirs, rel=1e-8, abs=1e-12), name

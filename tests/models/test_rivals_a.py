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
from cfusion.models import build_model
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
    yield from both(f"{ours}.gate", f"{theirs}.attention_a.0", f"{theirs}.attention_b.0")
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


NAMES = names_of_graph_models()


def drawn_weights(record: dict[str, Any]) -> dict[str, torch.Tensor]:
    stream, weights = np.random.RandomState(record["seed"]), {}
    for name, shape in sorted({**record["parameters"], **record["buffers"]}.items()):
        z = stream.standard_normal(shape)
        z = z / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1 * z + name.endswith(".weight")
        weights[name] = torch.from_numpy(z)
    return weights


def load(model: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """Load weights by their published names; ours may stack several."""
    model.double().load_state_dict({
        ours: torch.cat([weights[name] for name in NAMES[ours]]).reshape(like.shape)
        for ours, like in model.state_dict().items()
    })  # fmt: skip
    return model.eval()


def gradient_norms(model: nn.Module) -> dict[str, float]:
    norms = {}
    for ours, parameter in model.named_parameters():
        if parameter.grad is not None:
            for name, part in zip(NAMES[ours], parameter.grad.chunk(len(NAMES[ours])), strict=True):
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
        ({"neighbours": 0}, "neighbours=0: expected a number of tiles from 1"),
        ({"dropout": 2}, "dropout=2: expected a number"),
        ({"embed_dim": 63}, "embed_dim=63"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_model(name, **{"backbone_dim": 8, **options})


@pytest.mark.parametrize(
    ("name", "record", "unused"),
    [("patchgcn", "patchgcn_small", 256), ("deepgraphconv", "deepgraphconv_default", 0)],
)
def test_numbers_of_parameters_at_the_published_size(name: str, record: str, unused: int):
    with torch.device("meta"):
        model = build_model(name, backbone_dim=1024)
    expected = RECORDS[record]["n_parameters_at_default_size"] - unused
    assert sum(p.numel() for p in model.parameters()) == expected

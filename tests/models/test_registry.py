"""Building models by name, and what holds for every model that can be built."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_bags import WIDTH, bag, build, pad
from torch import nn

from cfusion.errors import ConfigError, DataError
from cfusion.models import MODELS, build_model, load_published_weights, published_state_dict
from cfusion.models.bag import check_share
from cfusion.models.dropout import Dropout
from cfusion.models.registry import reads_positions
from cfusion.survival.losses import LOSSES
from cfusion.types import SurvivalOutput, Targets

PUBLISHED_NAMES = {
    "CrossFusion": "crossfusion", "CrossFusionSingle": "crossfusion_single", "AMIL": "amil", "DSMIL": "dsmil",
    "TransMIL": "transmil",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("crossfusion", 22_963_720), ("crossfusion_concat", 23_575_044), ("crossfusion_single", 9_206_276)],
)
def test_published_numbers_of_parameters(name: str, parameters: int):
    with torch.device("meta"):
        model = build_model(name, backbone_dim=1024)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_trained_parameter_has_a_gradient_in_every_step(name: str, published: bool):
    model = build(name, published=published).train()
    targets = Targets(torch.tensor([1, 2]), torch.tensor([True, False]), torch.tensor([3.0, 4.0]))
    LOSSES["nll"](model(pad([bag(1, 1), bag(2, 6)])), targets).sum().backward()
    without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_bitwise_repeatable_and_has_no_dropout(name: str):
    model = build(name, published=True)
    batch = pad([bag(1, 30), bag(2, 11)])
    risks = []
    for seed in range(3):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        risks.append(model(batch).risk)
        assert torch.equal(torch.get_rng_state(), state), "evaluation drew random numbers"
    assert torch.equal(risks[0], risks[1])
    assert torch.equal(risks[0], risks[2])


@pytest.mark.parametrize("name", ["crossfusion", "crossfusion_concat", "crossfusion_single", "transmil"])
def test_training_has_dropout_and_repeats_with_its_seed(name: str):
    model = build(name, published=True).train()
    batch = pad([bag(1, 30), bag(2, 11)])

    def risk(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(batch).risk

    assert torch.equal(risk(1), risk(1))
    assert not torch.equal(risk(1), risk(2))


def test_published_dropouts_are_an_option():
    def attention_dropout(**options) -> set[float]:
        return {block.attention.dropout for block in build("crossfusion", **options).final.pre}

    assert attention_dropout() == {0.0}
    assert attention_dropout(published=True) == {0.2}
    assert attention_dropout(attention_dropout=0.1, published=True) == {0.1}
    shares = {m.share for m in build("crossfusion", dropout=0.5).modules() if isinstance(m, Dropout)}
    assert shares == {0.5}


@pytest.mark.parametrize("grid", ["file", "spatial"])
def test_a_window_that_is_left_out_is_one_whose_kernel_is_zero(grid: str):
    full, narrow = build("crossfusion", grid=grid), build("crossfusion", grid=grid, windows=[3, 5])
    narrow.load_state_dict({k: v for k, v in full.state_dict().items() if not k.endswith("_7")})
    with torch.no_grad():
        batch = pad([bag(1, 30), bag(2, 11)])
        assert not torch.allclose(full(batch).logits, narrow(batch).logits, atol=1e-4)
        for name, parameter in full.named_parameters():
            if name.endswith("_7"):
                parameter.zero_()
        torch.testing.assert_close(full(batch).logits, narrow(batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["crossfusion", "crossfusion_concat"])
def test_no_position_encoding_is_one_whose_kernels_are_zero(name: str):
    full, without = build(name), build(name, position="none")
    without.load_state_dict({k: v for k, v in full.state_dict().items() if ".position." not in k})
    with torch.no_grad():
        batch = pad([bag(1, 30), bag(2, 11)])
        assert not torch.allclose(full(batch).logits, without(batch).logits, atol=1e-4)
        for key, parameter in full.named_parameters():
            if ".position." in key:
                parameter.zero_()
        torch.testing.assert_close(full(batch).logits, without(batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("source", [5, 10, 20])
def test_each_magnification_can_be_the_source_and_the_rest_are_context(source: float):
    model = build("crossfusion", source=source)
    assert set(model.contexts) == {"x5", "x10", "x20"} - {f"x{source}"}
    one = bag(1, 7)
    risk = model(one).risk
    for name in one.features:
        changed = {**one.features, name: one.features[name] + 1}
        assert (model(dataclasses.replace(one, features=changed)).risk - risk).abs() > 1e-5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("crossfusion", {"windows": []}, r"windows=\[\]: expected a list of different odd numbers from 3"),
        ("crossfusion", {"windows": [4]}, r"windows=\[4\]: expected a list of different odd numbers"),
        ("crossfusion", {"windows": [3, 3]}, r"windows=\[3, 3\]: expected"),
        ("crossfusion", {"windows": [3, 1]}, r"windows=\[3, 1\]: expected"),
        ("crossfusion", {"windows": [True]}, r"windows=\[True\]: expected a list"),
        ("crossfusion", {"position": "sine"}, "position='sine': expected ppeg or none"),
        ("crossfusion_concat", {"position": "none", "windows": [5]}, "windows has no effect"),
        ("crossfusion_concat", {"position": "none", "grid": "spatial"}, "grid has no effect"),
        ("amil", {"windows": [5]}, r"options\.windows: amil has no such option"),
    ],
)
def test_wrong_options_of_the_ablations_are_refused(name: str, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        build(name, **options)


@pytest.mark.parametrize("options", [{"windows": [5, 3]}, {"position": "none"}])
def test_weights_of_the_published_program_do_not_load_into_an_ablation_it_lacks(options: dict):
    weights = published_state_dict(build("crossfusion"))
    with pytest.raises(DataError, match="position encoding, with windows 7, 5 and 3"):
        load_published_weights(build("crossfusion", **options), weights)


def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    model = build_model("crossfusion", backbone_dim=1024)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not linear.bias.any()
    kernel = model.final.position.kernels.weight_7
    assert kernel.std().item() == pytest.approx((2 / (512 * 49)) ** 0.5, rel=0.05)
    assert model.class_token.std().item() == pytest.approx(1e-6, rel=0.2)
    assert model.cross["x20"].attention.scale_embedding.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("file", ["CrossFusion", "CrossFusionSingle", "AMIL", "DSMIL", "TransMIL"])
def test_fresh_weights_are_spread_as_the_published_program_spreads_them(shared: Path, file: str):
    golden = np.load(shared / "golden" / f"{file}.npz", allow_pickle=False)
    config = json.loads(str(golden["config"]))
    shape = {key: config[key] for key in ("embed_dim", "num_heads") if key in config}
    torch.manual_seed(0)
    model = build_model(PUBLISHED_NAMES[file], backbone_dim=config["backbone_dim"], **shape)
    for name, ours in published_state_dict(model).items():
        theirs = torch.from_numpy(golden[f"param/{name}"])
        if ours.numel() < 128:
            continue
        # The stored weights are fresh ones with noise of std .05 on top.
        expected = (ours.var() + 0.05**2).sqrt().item()
        assert theirs.std().item() == pytest.approx(expected, rel=4 / ours.numel() ** 0.5 + 0.01), name


@pytest.mark.parametrize(
    ("magnifications", "source"),
    [((20, 10), 10), ((40, 10, 2.5), 10), ((20, 10, 5), 20), ((40, 20, 10, 5), 10), ((10,), 10)],
)
@pytest.mark.parametrize("name", ["crossfusion", "crossfusion_concat"])
def test_other_magnifications(name: str, magnifications: tuple[float, ...], source: float):
    model = build(name, magnifications=magnifications, source=source)
    assert model.magnification_names == tuple(f"x{m:g}" for m in sorted(magnifications, reverse=True))
    bags = [torch.randn(2, 3 + 4 * i, WIDTH, requires_grad=True) for i in range(len(magnifications))]
    model(*bags).risk.sum().backward()
    assert all(b.grad.abs().sum() > 0 for b in bags)
    assert {key for key, _ in model.named_parameters() if "2.5" in key} == set()


def test_one_magnification_is_the_single_scale_variant():
    one_magnification, single = build("crossfusion", magnifications=(20,), source=20), build("crossfusion_single")
    x20 = torch.randn(1, 7, WIDTH)
    assert torch.equal(one_magnification(x20).risk, single(x20).risk)


def test_a_users_model_joins_by_an_assignment(monkeypatch: pytest.MonkeyPatch):
    class Mine(nn.Module):
        def __init__(self, *, backbone_dim: int, n_bins: int, bias: bool = True) -> None:
            super().__init__()
            self.head = nn.Linear(backbone_dim, n_bins, bias=bias)

        def forward(self, batch):
            return SurvivalOutput.from_logits(self.head(batch.features["x20"].mean(dim=1)))

    monkeypatch.setitem(MODELS, "mine", Mine)
    model = build_model("mine", backbone_dim=WIDTH, bias=False)
    assert model.head.bias is None
    assert model(bag(1, 4)).risk.shape == (1,)
    with pytest.raises(ConfigError, match=r"model.options.bais: mine has no such option. Did you mean bias\?"):
        build_model("mine", backbone_dim=WIDTH, bais=False)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("crosfusion", {}, r"model.name='crosfusion': no such model. Did you mean crossfusion\?"),
        ("crossfusion", {"gird": "file"}, r"model.options.gird: crossfusion has no such option. Did you mean grid\?"),
        ("amil", {"grid": "file"}, r"amil has no such option. Known: none"),
        ("crossfusion", {"grid": "round"}, "grid='round': expected file or spatial"),
        ("crossfusion", {"dropout": 1.0}, r"dropout=1.0: expected a number in \[0, 1\)"),
        ("crossfusion", {"source": 40}, r"model.source=40 is not among the magnifications \[20, 10, 5\]"),
        ("crossfusion", {"magnifications": (20, 10, 10)}, r"\[20, 10, 10\]: expected one or more different, positive"),
        ("amil", {"magnifications": ()}, r"magnifications=\[\]: expected one or more"),
        ("crossfusion", {"embed_dim": 30, "num_heads": 4}, "embed_dim=30 must be even and divisible by num_heads=4"),
        ("transmil", {"dropout": -0.1}, r"dropout=-0.1: expected a number in \[0, 1\)"),
        ("crossfusion", {"num_heads": 0}, "num_heads=0: expected at least 1"),
        ("crossfusion", {"num_layers": 0}, "num_layers=0: expected at least 1"),
        ("dsmil", {"n_bins": 0}, "n_bins=0: expected at least 1"),
        ("mean_mil", {"backbone_dim": -3}, "backbone_dim=-3: expected at least 1"),
        ("transmil", {"embed_dim": 20}, "embed_dim=20: transmil has 8 heads"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        build_model(name, **{"backbone_dim": WIDTH, "embed_dim": 32, **options})


def test_a_share_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match=r"model.options.dropout='much': expected a number in \[0, 1\)"):
        check_share("dropout", "much")


@pytest.mark.parametrize("name", [name for name in MODELS if not reads_positions(name, {})])
def test_a_model_that_reads_no_positions_gives_the_same_without_them(name: str):
    model, one = build(name), bag(1, 30)
    assert torch.equal(model(one).logits, model(dataclasses.replace(one, positions=None)).logits)


def test_positions_are_read_where_a_model_may_want_them():
    assert reads_positions("crossfusion", {"grid": "spatial"})
    assert reads_positions("patchgcn", {})
    assert reads_positions("my_models.py:MyModel", {})
    assert not reads_positions("crossfusion", {})

"""Bags joined in one row without padding give the outputs and gradients of the bags one by one."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from made_up_bags import WIDTH, bag, build

from cfusion.data.batches import pack
from cfusion.errors import ConfigError, DataError
from cfusion.models import MODELS, attention
from cfusion.models.layers import ConvMixer
from cfusion.models.segments import Pairs, Segments
from cfusion.models.token_grid import PackedGrid, file_grid
from cfusion.types import BagBatch

PACKING = [name for name in MODELS if name.startswith("crossfusion")] + ["amil", "abmil", "dsmil", "mean_mil"]
CONFIGURATIONS = [(name, {}) for name in PACKING] + [
    ("crossfusion", {"grid": "spatial"}),
    ("crossfusion", {"num_layers": 2, "windows": [5]}),
    ("crossfusion_concat", {"position": "none"}),
    ("abmil", {"heads": 2}),
]
SIZES = (9, 1, 16, 30, 4)


def outputs_and_gradients(model: torch.nn.Module, batches: Sequence[BagBatch]) -> dict[str, torch.Tensor]:
    """Outputs of all bags, in order, and the gradient of a sum in which every logit counts differently."""
    model.zero_grad()
    outputs = [model(batch) for batch in batches]
    heads = torch.cat([torch.stack(output.heads, dim=1) for output in outputs])
    (heads * torch.arange(1, heads.numel() + 1).view_as(heads)).sum().backward()
    found = {"risk": torch.cat([output.risk for output in outputs]), "heads": heads}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS, ids=str)
def test_packed_bags_give_the_outputs_and_gradients_of_a_loop(name: str, options: dict):
    model = build(name, dtype=torch.float64, **options)
    bags = [bag(seed, size) for seed, size in enumerate(SIZES)]
    packed, loop = outputs_and_gradients(model, [pack(bags)]), outputs_and_gradients(model, bags)
    assert packed.keys() == loop.keys()
    for key, expected in loop.items():
        torch.testing.assert_close(packed[key], expected, atol=1e-12, rtol=1e-12, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", PACKING)
def test_the_risk_of_a_packed_bag_does_not_depend_on_its_companions(name: str):
    model = build(name, dtype=torch.float64)
    one = bag(3, 11)
    with torch.no_grad():
        with_few = model(pack([one, bag(4, 2)])).risk[0]
        with_many = model(pack([bag(5, 30), bag(6, 7), one, bag(7, 1)])).risk[2]
    torch.testing.assert_close(with_few, with_many, atol=1e-12, rtol=1e-12)


def test_a_single_bag_is_packed_as_itself():
    one = bag(1, 5)
    assert pack([one]) is one


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(PACKING)))
def test_a_model_without_a_packed_path_refuses_packed_bags(name: str):
    with pytest.raises(ConfigError, match=r"train\.packed=true: \w+ takes no bags that are joined") as caught:
        build(name)(pack([bag(1, 5), bag(2, 8)]))
    assert "train.packed=false" in caught.value.remedy


def test_packed_bags_that_are_empty_or_of_other_lengths_are_named():
    batch = pack([bag(1, 5), bag(2, 8)])
    counts = batch.lengths["x20"]
    empty = dataclasses.replace(batch, lengths={**batch.lengths, "x20": (sum(counts), 0)})
    with pytest.raises(DataError, match=r"No tile at x20 in bag case-2"):
        build("amil")(empty)
    other = dataclasses.replace(batch, lengths={**batch.lengths, "x20": (counts[0], counts[1] + 1)})
    with pytest.raises(DataError, match=rf"at x20 are 1 × {sum(counts)}, but their bags have {sum(counts) + 1} tiles"):
        build("amil")(other)


def test_dropped_channels_are_drawn_for_each_packed_bag():
    torch.manual_seed(0)
    mixer = ConvMixer(64, 1, 0.5, (3,)).train()
    sizes = (9, 16)
    grid = PackedGrid(Segments(sizes), tuple(file_grid(1, size, None) for size in sizes))
    seen = []
    mixer.linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    mixer([torch.rand(1, sum(sizes), 64) + 1], grid)
    dropped = [(part == 0).all(dim=0) for part in seen[0].split(sizes)]
    for part, channels in zip(seen[0].split(sizes), dropped, strict=True):
        assert (part[:, ~channels] != 0).any(dim=0).all()
    assert 0 < dropped[0].sum() < 32
    assert not torch.equal(dropped[0], dropped[1])


def test_on_a_gpu_attention_of_all_bags_is_one_call(monkeypatch: pytest.MonkeyPatch):
    """PyTorch's function has no CPU kernel: a stand-in with its arguments shows what it is called with."""
    calls = []

    def stand_in(query, key, value, query_edges, key_edges, most_queries, most_keys):
        calls.append((query_edges.tolist(), key_edges.tolist(), most_queries, most_keys))
        assert query_edges.dtype == key_edges.dtype == torch.int32
        found = []
        for bag_number in range(len(query_edges) - 1):
            rows, columns = (slice(*edges[bag_number : bag_number + 2]) for edges in (query_edges, key_edges))
            scores = torch.einsum("qhd,khd->hqk", query[rows], key[columns]) / query.shape[2] ** 0.5
            found.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=2), value[columns]))
        return torch.cat(found)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(Segments, "edges", lambda self, device: torch.tensor([0, *self.lengths]).cumsum(0).int())
    queries, keys = Segments((3, 1)), Segments((2, 5))
    query, key, value = (torch.randn(1, 2, side.total, 4).bfloat16() for side in (queries, keys, keys))
    expected = attention.attend_within(query, key, value, Pairs(queries, keys))
    monkeypatch.setattr(attention, "_varlen_attention", lambda: stand_in)
    found = attention.attend_within(query.as_subclass(OnGpu), key, value, Pairs(queries, keys))
    assert calls == [([0, 3, 4], [0, 2, 7], 3, 5)]
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected, atol=2e-2, rtol=2e-2)
    attention.attend_within(query.float().as_subclass(OnGpu), key.float(), value.float(), Pairs(queries, keys))
    assert len(calls) == 1, "there is none for f32"


def test_torch_has_the_arguments_that_are_given_to_its_attention_of_several_bags():
    import inspect

    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10")
    parameters = list(inspect.signature(varlen.varlen_attn).parameters.values())
    assert [p.name for p in parameters[:7]] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert all(p.default is not p.empty for p in parameters[7:])


def test_features_of_packed_bags_are_one_row():
    batch = pack([bag(1, 5), bag(2, 8)])
    assert len(batch) == 2
    assert batch.features["x20"].shape == (1, 26, WIDTH)
    assert batch.lengths == {"x20": (10, 16), "x10": (5, 8), "x5": (2, 4)}
    assert batch.name(1) == "case-2"

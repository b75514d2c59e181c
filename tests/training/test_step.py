"""One step of one process."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch.utils._python_dispatch import TorchDispatchMode

from cfusion.config import ParallelConfig
from cfusion.errors import DataError
from cfusion.models import build_model
from cfusion.models.dropout import seeded
from cfusion.survival.losses import LOSSES
from cfusion.training.runtime import Runtime
from cfusion.training.step import ComingShares, Share, Stepper
from cfusion.types import BagBatch, Targets


def single_process(precision: str, **settings: bool) -> Runtime:
    accelerator = SimpleNamespace(
        process_index=0, num_processes=1, device=torch.device("cpu"), distributed_type=DistributedType.NO,
        backward=lambda loss: loss.backward(),
    )  # fmt: skip
    return Runtime(accelerator, ParallelConfig(precision=precision, **settings))


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("loss", ["cox", "ranking"])
def test_a_loss_over_sets_is_taken_of_the_logits_that_carry_its_gradient(loss: str, precision: str):
    torch.manual_seed(0)
    model = build_model("crossfusion_single", backbone_dim=8, embed_dim=16, num_heads=2, published=True).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    time, event = torch.tensor([3.0, 1, 2, 2, 5, 4]), torch.tensor([True, True, False, True, False, True])
    bags = [BagBatch({"x20": torch.randn(2, 7, 8)}) for _ in range(3)]
    label = torch.zeros(6, dtype=torch.long)
    shares = [
        Share(bag, Targets(label[i : i + 2], event[i : i + 2], time[i : i + 2]), torch.ones(2), seed=i)
        for i, bag in zip((0, 2, 4), bags, strict=True)
    ]
    runtime = single_process(precision)
    found = Stepper(runtime, model, None, LOSSES[loss], 0.0, None).accumulate(shares, cases=6)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = []
    for share in shares:
        with seeded(share.seed, runtime.device), runtime.autocast():
            logits.append(model(share.batch).logits)
    expected = LOSSES[loss].over_logits(torch.cat(logits).double(), Targets(label, event, time.double())).sum()
    (expected / 6).backward()
    assert found == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def nll_shares(count: int) -> list[Share]:
    targets = Targets(torch.tensor([1]), torch.tensor([True]), torch.tensor([9.0]))
    return [
        Share(BagBatch({"x20": torch.randn(1, 5, 8)}, case_ids=(f"PT-{i}",)), targets, torch.ones(1), seed=i)
        for i in range(count)
    ]


def nll_stepper() -> Stepper:
    torch.manual_seed(0)
    runtime = single_process("f32")
    runtime.accelerator.unscale_gradients, runtime.accelerator.scaler = lambda: None, None
    model = build_model("amil", backbone_dim=8).train()
    return Stepper(runtime, model, torch.optim.SGD(model.parameters(), lr=0.1), LOSSES["nll"], 0.0, 1.0)


def test_a_bag_is_taken_from_the_stream_when_its_pass_begins_and_no_bag_of_the_next_step_is():
    shares, stepper, taken = nll_shares(5), nll_stepper(), []
    held: list[int] = []
    stepper.model.register_forward_pre_hook(lambda *_: held.append(len(taken)))
    stream = (taken.append(number) or share for number, share in enumerate(shares))
    stepper.step(ComingShares(stream, 3), cases=3, lr=0.1)
    assert held == [1, 2, 3]
    assert taken == [0, 1, 2]


def test_a_step_reads_the_device_once_whatever_its_bags(monkeypatch):
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, name=name, call=original, **k: reads.append(name) or call(self, *a, **k),
        )
    stepper = nll_stepper()
    reads.clear()
    stepper.step(nll_shares(6), cases=6, lr=0.1)
    assert reads.count("tolist") == 1
    assert len(reads) == 1, reads


def test_lazily_taken_shares_give_the_same_bits_as_a_list():
    found = []
    for lazily in (False, True):
        torch.manual_seed(1)
        shares, stepper = nll_shares(4), nll_stepper()
        report = stepper.step(ComingShares(iter(shares), 4) if lazily else shares, cases=4, lr=0.1)
        found.append((report.loss, [p.detach().clone() for p in stepper.model.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_loss_that_is_not_finite_changes_nothing_and_names_the_bags():
    stepper, shares = nll_stepper(), nll_shares(2)
    shares[1].batch.features["x20"].fill_(float("nan"))
    before = [p.detach().clone() for p in stepper.model.parameters()]
    with pytest.raises(DataError, match=r"The loss of a step is not finite. Bags of the step: PT-0, PT-1"):
        stepper.step(ComingShares(iter(shares), 2), cases=2, lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, stepper.model.parameters(), strict=True))


class Casts(TorchDispatchMode):
    """Counts conversions to bf16 of tensors of a shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.count += args[0].shape == self.shape
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["crossfusion", "amil", "transmil"])
@pytest.mark.parametrize("loss", ["nll", "cox"])
def test_weights_that_are_cast_once_a_step_give_the_same_bits(name: str, loss: str):
    time, event = torch.tensor([3.0, 1, 2, 4]), torch.tensor([True, True, False, True])
    torch.manual_seed(1)
    shares = [
        Share(
            BagBatch({"x20": torch.randn(1, 16, 8), "x10": torch.randn(1, 4, 8), "x5": torch.randn(1, 1, 8)}),
            Targets(torch.tensor([i % 3]), event[i : i + 1], time[i : i + 1]), torch.ones(1), seed=i,
        )
        for i in range(4)
    ]  # fmt: skip
    found, casts = [], []
    for held in (False, True):
        torch.manual_seed(0)
        model = build_model(name, backbone_dim=8, embed_dim=16, num_heads=2).train()
        stepper = Stepper(single_process("bf16", hold_casts=held), model, None, LOSSES[loss], 0.0, None)
        with Casts(next(p for p in model.parameters() if p.ndim == 2).shape) as watched:
            total = stepper.accumulate(shares, cases=4)
        casts.append(watched.count)
        found.append((float(total), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(gradient, found[1][1][key]) for key, gradient in found[0][1].items())
    assert casts[1] < casts[0]
    assert not torch.is_autocast_enabled("cpu")

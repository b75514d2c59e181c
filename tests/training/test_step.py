"""One step of one process."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from cfusion.config import ParallelConfig
from cfusion.models import build_model
from cfusion.models.dropout import seeded
from cfusion.survival.losses import LOSSES
from cfusion.training.runtime import Runtime
from cfusion.training.step import Share, Stepper
from cfusion.types import BagBatch, Targets


def single_process(precision: str) -> Runtime:
    accelerator = SimpleNamespace(
        process_index=0, num_processes=1, device=torch.device("cpu"), distributed_type=DistributedType.NO,
        backward=lambda loss: loss.backward(),
    )  # fmt: skip
    return Runtime(accelerator, ParallelConfig(precision=precision))


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

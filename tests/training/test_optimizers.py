"""The optimizers are torch's own, without the import of its compiler."""

import subprocess
import sys

import pytest
import torch

from cfusion.config import TrainConfig
from cfusion.training.optimizers import make_optimizer
from cfusion.training.runtime import moments_of


@pytest.mark.parametrize(("name", "reference"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_steps_and_states_are_torchs_to_the_bit(name, reference):
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    train = TrainConfig(optimizer=name, lr=1e-2, weight_decay=0.1)
    pairs = [
        (ours, make_optimizer(ours, train)),
        (theirs, reference(theirs.parameters(), lr=1e-2, weight_decay=0.1)),
    ]
    for _ in range(4):
        values = torch.randn(7, 5)
        for model, optimizer in pairs:
            model(values).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    state, expected = (optimizer.state_dict()["state"] for _, optimizer in pairs)
    assert all(torch.equal(state[i]["exp_avg_sq"], expected[i]["exp_avg_sq"]) for i in range(2))
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_a_training_imports_neither_the_compiler_nor_distributed_tensors():
    code = (
        "import sys, torch, cfusion.runs.crossval\n"
        "from cfusion.config import ParallelConfig, TrainConfig\n"
        "from cfusion.training.optimizers import make_optimizer\n"
        "from cfusion.training.world import join_world\n"
        "runtime, layer = join_world(ParallelConfig(global_batch=1)), torch.nn.Linear(2, 1)\n"
        "model, optimizer = runtime.prepare(layer, make_optimizer(layer, TrainConfig()))\n"
        "runtime.backward(model(torch.ones(1, 2)).sum())\n"
        "finite = bool(runtime.clip(model, 1.0).isfinite())\n"
        "runtime.advance(optimizer, lr=1e-3, clip_norm=1.0, finite=finite)\n"
        "print([m for m in ('torch._dynamo', 'torch._inductor', 'torch.distributed.tensor') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_fused_update_is_that_of_the_plain_one_and_goes_on_from_a_restored_state(name):
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        optimizer = make_optimizer(layer, TrainConfig(optimizer=name, lr=1e-2, fused_optimizer=fused))
        assert bool(optimizer.defaults["fused"]) is fused
        moments = [moments_of(optimizer, parameter) for parameter in layer.parameters()]
        for moment in moments:  # as if the state of five steps had been restored
            moment["step"].fill_(5)
            moment["exp_avg_sq"].fill_(1e-3)
        for _ in range(10):
            layer(torch.randn(7, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert {float(moment["step"]) for moment in moments} == {15.0}
        found.append([parameter.detach().clone() for parameter in layer.parameters()])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-6)

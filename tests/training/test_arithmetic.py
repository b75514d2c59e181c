"""Which algorithms torch may take is set explicitly, for a CPU and for a GPU."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from cfusion.config import ParallelConfig
from cfusion.data import cache
from cfusion.tracking import machine
from cfusion.training.arithmetic import set_arithmetic
from cfusion.training.runtime import Runtime


@pytest.fixture(autouse=True)
def _settings_stay_as_they_were() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (
        torch.get_deterministic_debug_mode(), matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic,
        torch.backends.cuda.cudnn_sdp_enabled(), torch.utils.deterministic.fill_uninitialized_memory,
    )  # fmt: skip
    yield
    torch.set_deterministic_debug_mode(before[0])
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before[1:5]
    torch.backends.cuda.enable_cudnn_sdp(before[5])
    torch.utils.deterministic.fill_uninitialized_memory = before[6]


@pytest.mark.parametrize(
    ("on_cpu", "deterministic", "mode"),
    [(True, "auto", 2), (True, False, 0), (False, "auto", 0), (False, True, 2), (False, False, 0)],
)
def test_a_cpu_is_deterministic_unless_asked_otherwise_and_a_gpu_when_asked(on_cpu, deterministic, mode):
    set_arithmetic(on_cpu=on_cpu, deterministic=deterministic)
    assert torch.get_deterministic_debug_mode() == mode
    assert torch.backends.cudnn.deterministic == (mode == 2 and not on_cpu)
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == (mode == 2 and not on_cpu)


def test_f32_on_a_gpu_is_single_precision_and_attention_stays_away_from_cudnn():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(True)
    set_arithmetic(on_cpu=False, deterministic="auto")
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_each_fold_in_fp16_begins_with_a_new_loss_scale():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    accelerator = SimpleNamespace(
        scaler=scaler, process_index=0, num_processes=1, device=torch.device("cpu"),
        distributed_type=DistributedType.NO, prepare=lambda *both, device_placement: both,
    )  # fmt: skip
    runtime = Runtime(accelerator, ParallelConfig(precision="f32"))
    runtime.loss_scale = {**scaler.state_dict(), "scale": 128.0}
    assert runtime.loss_scale["scale"] == 128
    model = torch.nn.Linear(2, 1)
    runtime.prepare(model, torch.optim.Adam(model.parameters()))
    assert runtime.loss_scale["scale"] == 2**16


def test_free_memory_of_a_gpu_is_that_of_the_share_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5)
    for fraction, free in ((1.0, 60), (0.25, 15), (0.05, 0)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, f=fraction: f)
        assert cache.free_device_bytes(torch.device("cuda")) == free
    assert cache.free_device_bytes(torch.device("cpu")) == 0


@pytest.mark.parametrize("refusal", [RuntimeError("driver"), ModuleNotFoundError("pynvml"), OSError("no library")])
def test_only_the_gpu_of_the_process_is_sampled_and_a_driver_that_refuses_ends_nothing(monkeypatch, refusal):
    asked: list[int] = []

    def memory(device):
        asked.append(device)
        return 30_000_000, 80_000_000

    def utilization(device):
        raise refusal

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    metrics = machine._gpus()
    assert asked == [3]
    assert metrics == {"system/gpu_3_memory_usage_megabytes": 50.0, "system/gpu_3_memory_usage_percentage": 62.5}

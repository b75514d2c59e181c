"""What a process sets for a GPU, and what it says of f32."""

import os
from collections.abc import Iterator

import pytest
import torch

from cfusion.gpu_settings import let_segments_grow, meaning_of_f32, set_tf32


@pytest.fixture(autouse=True)
def _tf32_stays_as_it_was() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_f32_is_named_by_what_products_and_convolutions_do(monkeypatch: pytest.MonkeyPatch):
    set_tf32(True)
    assert meaning_of_f32() == "single precision", "there is no TF32 on a CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert meaning_of_f32() == "TF32 for products and convolutions"
    torch.backends.cuda.matmul.allow_tf32 = False
    assert meaning_of_f32() == "TF32 for convolutions"
    set_tf32(False)
    assert meaning_of_f32() == "single precision"


def test_segments_grow_unless_the_user_has_set_the_allocator(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", asked.append, raising=False)
    for name in [name for name in os.environ if name.endswith("ALLOC_CONF")]:
        monkeypatch.delenv(name)
    let_segments_grow()
    assert asked == ["expandable_segments:True"]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    let_segments_grow()
    assert len(asked) == 1


def test_torch_has_the_allocator_setting_that_is_used():
    assert callable(torch.cuda.memory._set_allocator_settings)

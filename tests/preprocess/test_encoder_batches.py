"""How many tiles an encoder takes at once, and when it may use TF32; a GPU is made up."""

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cfusion.errors import ConfigError
from preprocess import encoders
from preprocess.encoders import load_slots, tiles_per_batch
from preprocess.encoders.cards import EncoderCard
from preprocess.encoders.networks import NetworkEncoder, fitting_tiles, synthetic_tiles
from preprocess.settings import PreprocessConfig

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _tf32_stays_as_it_was() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    ("base", "each", "free", "tiles"),
    [(0, GIB // 64, 10 * GIB, 512), (2 * GIB, GIB // 64, 10 * GIB, 256), (0, 1000, 80 * GIB, 1024), (0, GIB, GIB, 1)],
)
def test_batches_fit_the_free_memory(base: int, each: int, free: int, tiles: int):
    assert fitting_tiles(lambda count: base + each * count, free) == tiles
    assert base + each * tiles <= 0.8 * free or tiles == 1


class Sized:
    """An encoder on a made-up GPU."""

    def __init__(self, fits: int | None) -> None:
        self.fits = fits

    def tiles_that_fit(self) -> int | None:
        return self.fits


def test_auto_takes_the_smallest_batch_of_all_encoders_and_gpus():
    auto = PreprocessConfig(batch_size="auto")
    assert tiles_per_batch(auto, [[Sized(256), Sized(128)], [Sized(512), object()]]) == 128
    assert tiles_per_batch(auto.model_copy(update={"upload_ahead": True}), [[Sized(256)]]) == 128
    assert tiles_per_batch(auto, [[Sized(None)]]) == 64
    assert tiles_per_batch(PreprocessConfig(batch_size=7), [[Sized(256)]]) == 7


def test_on_a_cpu_nothing_is_measured():
    assert tiles_per_batch(PreprocessConfig(batch_size="auto"), load_slots(PreprocessConfig())) == 64


class Rounding(torch.nn.Module):
    """A network whose products are as far off as `error` where TF32 is allowed."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found = torch.stack([pixels.mean(dim=(1, 2, 3)), pixels.std(dim=(1, 2, 3))], dim=1)
        return found + torch.tensor([self.error, 0.0]) * float(torch.backends.cuda.matmul.allow_tf32)


def network(name: str, error: float, precision: str = "f32") -> NetworkEncoder:
    card = EncoderCard(2, "made-up", name, "nowhere", "MIT", gated=False, resize_px=32, image_px=32)
    return NetworkEncoder(name, card, Rounding(error), "none", "cpu", precision)


def test_tf32_is_used_and_recorded_where_all_encoders_agree():
    some = [network("close", 1e-4), network("half", 1.0, "bf16")]
    encoders._choose_tf32(some)
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    assert [encoder.identity["precision"] for encoder in some] == ["tf32", "bf16"]


def test_tf32_is_not_used_if_one_encoder_disagrees(caplog: pytest.LogCaptureFixture):
    some = [network("close", 1e-4), network("far", 0.5)]
    with caplog.at_level(logging.WARNING):
        encoders._choose_tf32(some)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert [encoder.identity["precision"] for encoder in some] == ["f32", "f32"]
    assert "the embeddings of far differ from single precision (cosine below 0.9999)" in caplog.text


def test_tf32_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="--tf32 needs a GPU"):
        load_slots(PreprocessConfig(encoders=("uni",), tf32=True, devices=("cpu",)))


def test_synthetic_tiles_are_the_same_at_each_call_and_differ_among_each_other():
    tiles = synthetic_tiles(4)
    assert tiles.shape == (4, 256, 256, 3)
    assert np.array_equal(tiles, synthetic_tiles(4))
    assert not np.array_equal(tiles[0], tiles[1])

"""Extraction of a slide by a vision transformer: the share of the time in which the network runs on the GPU."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Limit
from benchmarks.gpu.timing import seconds_per_call, synchronize

NEEDED = ("timm", "torchvision", "safetensors", "openslide", "imagecodecs", "tifffile")
SLIDE = "cmu_small_region.svs"


def measure(bench: Bench) -> None:
    """Measure the encoder on tiles at hand, then a complete extraction."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        bench.skip("all", f"{', '.join(missing)} not installed")
        return
    slide = bench.shared / "slides" / SLIDE
    if not slide.is_file():
        bench.skip("all", f"no file slides/{SLIDE} in {bench.shared}; give --shared")
        return
    name = "vit_tiny_patch16_224" if bench.quick else "vit_large_patch16_224"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _random_weights(name, folder / "weights")
        _tiles_at_hand(bench, name, folder)
        _in_tf32(bench, name, folder)
        _complete(bench, name, slide, folder)


def _random_weights(name: str, folder: Path) -> None:
    """Write untrained weights: the speed does not depend on their values."""
    from safetensors.torch import save_file

    from preprocess.encoders.networks import import_timm

    folder.mkdir()
    network = import_timm().create_model(name, num_classes=0)
    save_file(network.state_dict(), folder / f"timm_{name}.safetensors")


def _settings(bench: Bench, name: str, folder: Path, **others: Any) -> Any:
    from preprocess.settings import PreprocessConfig

    return PreprocessConfig(
        encoders=(f"timm:{name}",), weights=folder / "weights", precision="f16" if bench.on_gpu else "f32",
        offline=True, sheets=False, **others,
    )  # fmt: skip


def _tiles_at_hand(bench: Bench, name: str, folder: Path) -> None:
    """Compare tiles in the host's memory with pixels that are on the device and transformed."""
    from preprocess.encoders.networks import load_network

    encoder = load_network(f"timm:{name}", _settings(bench, name, folder), str(bench.device))
    for size in (4,) if bench.quick else (64, 256):
        tiles = np.random.default_rng(0).integers(0, 256, (size, 256, 256, 3), dtype=np.uint8)
        with torch.inference_mode():
            pixels = torch.from_numpy(tiles).to(bench.device).permute(0, 3, 1, 2)
            ready = encoder.transformed(pixels).to(next(encoder._network.parameters()).dtype)
            network = size / seconds_per_call(functools.partial(encoder.pooled, ready), 2.0)
        complete = size / seconds_per_call(functools.partial(encoder.encode, tiles), 2.0)
        bench.tell(f"{name}, batch {size}: network", network, "tiles/s")
        bench.tell(f"{name}, batch {size}: with upload, transform and result", complete, "tiles/s")


def _complete(bench: Bench, name: str, slide: Path, folder: Path) -> None:
    from openslide import OpenSlide
    from PIL import Image

    from benchmarks.tiles import make_pyramid
    from preprocess.extraction import preprocess_slides

    path = folder / "pyramid.svs"
    if bench.quick:
        path.symlink_to(slide.resolve())
    else:
        make_pyramid(slide, path)
    (folder / "masks").mkdir()
    with OpenSlide(path) as opened:  # all of the slide counts as tissue
        Image.new("L", (opened.dimensions[0] // 32, opened.dimensions[1] // 32), 255).save(
            folder / "masks" / "pyramid.png"
        )
    quick: tuple[tuple[Any, bool], ...] = ((16, False), (16, True), ("auto", False))
    for size, ahead in quick if bench.quick else ((64, False), (256, False), (256, True), ("auto", False)):
        case = f"{name}, batch {size}{', upload_ahead' * ahead}, complete extraction"
        if bench.left < 0:
            bench.skip(case, "no time left in this part")
            continue
        settings = {"store": folder / f"store{size}{ahead}", "batch_size": size, "upload_ahead": ahead}
        config = _settings(bench, name, folder, slides=path, masks=folder / "masks", **settings)
        with _network_time() as spans:
            summary = preprocess_slides(config, strict=True)
            busy = _seconds(spans)
        limit = None if ahead else Limit(0.9, "least", speed=True)
        bench.tell(f"{case}: rate", summary.tiles / summary.seconds, "tiles/s")
        bench.tell(f"{case}: calls of the network, share of the time", busy / summary.seconds, "", limit)
        bench.tell(f"{case}: idle share that the program reports", summary.encoder_idle)
    _by_process(bench, name, path, folder)


def _by_process(bench: Bench, name: str, slide: Path, folder: Path) -> None:
    """Extract with a process for each GPU; on one GPU this shows what starting it costs."""
    from launch.extract import extract_by_device

    case = f"{name}, batch 16, process_per_gpu, complete extraction"
    if bench.left < 0:
        bench.skip(case, "no time left in this part")
        return
    devices = () if bench.on_gpu else ("cpu",)
    config = _settings(
        bench, name, folder, slides=slide, masks=folder / "masks", store=folder / "by_process", batch_size=16,
        devices=devices,
    )  # fmt: skip
    summary = extract_by_device(config)
    note = "with the start of the processes"
    bench.tell(f"{case}: rate", summary.tiles / summary.seconds, "tiles/s", note=note)


def _in_tf32(bench: Bench, name: str, folder: Path) -> None:
    """Time the network in f32, in single precision and in TF32, and whether the rule of `--tf32` holds."""
    from cfusion.gpu_settings import set_tf32
    from preprocess.encoders.networks import load_network, synthetic_tiles

    if not bench.on_gpu:
        bench.skip(f"{name}: --tf32", "it concerns a GPU only")
        return
    config = _settings(bench, name, folder).model_copy(update={"precision": "f32"})
    encoder, tiles = load_network(f"timm:{name}", config, str(bench.device)), synthetic_tiles(64)
    bench.tell(f"{name}: embeddings in TF32 agree with single precision", str(encoder.agrees_in_tf32()))
    for allowed in (False, True):
        set_tf32(allowed)
        rate = len(tiles) / seconds_per_call(lambda: encoder.encode(tiles), 2.0)
        bench.tell(f"{name}, batch 64, f32: {'--tf32' if allowed else 'single precision'}", rate, "tiles/s")
    set_tf32(False)


@contextmanager
def _network_time() -> Iterator[list[tuple[Any, Any]]]:
    """Collect the start and the end of each call of the network: events on a GPU, else seconds."""
    from preprocess.encoders.networks import NetworkEncoder

    spans: list[tuple[Any, Any]] = []
    pooled = NetworkEncoder.pooled

    def mark() -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self: NetworkEncoder, pixels: Tensor) -> Tensor:
        start = mark()
        result = pooled(self, pixels)
        spans.append((start, mark()))
        return result

    with mock.patch.object(NetworkEncoder, "pooled", timed):
        yield spans


def _seconds(spans: list[tuple[Any, Any]]) -> float:
    synchronize()
    if torch.cuda.is_available():
        return sum(start.elapsed_time(end) for start, end in spans) / 1e3
    return sum(end - start for start, end in spans)

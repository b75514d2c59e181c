"""Change slides and feature files at random: no change may end a run, hide a neighbour or give wrong numbers.

A change hits one TIFF tag, header bytes, an attribute of an HDF5 file, or bytes of a `.pt` or `.npz` file. Each item is
then read with undamaged neighbours, as `cfusion preprocess` reads it. What is found is one of:

- `refused`: the item is listed with a reason;
- `read`: its numbers are those that an independent reading of the changed file gives (OpenSlide for slides, h5py and
  torch for features);
- a failure: a traceback, a lost neighbour, a wrong number, or a process that dies.

    python -m benchmarks.fuzz_slides --changes 10000 --seed 7

With `TMPDIR` in memory, such as /dev/shm, it is several times as fast.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import io
import logging
import multiprocessing
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import tifffile
import torch

from cfusion.data.store import FeatureStore
from cfusion.errors import CfusionError
from cfusion.files import write_json
from preprocess.importers import import_features
from preprocess.overview import read_overview
from preprocess.readers import choose_reader
from preprocess.resolution import scale_of
from preprocess.slides import open_slide

TILES, DIM, SIDE = 9, 6, 512
"""Tiles of a made-up slide of features, width of an embedding, and side of a tile in level-0 px."""

PX = 700
"""Side of a made-up slide."""

PER_PROCESS = 1000
"""Changes that one process makes, so that a death costs no more."""


class WrongError(Exception):
    """Numbers that differ from an independent reading."""


def picture(rng: np.random.Generator) -> np.ndarray:
    """Return a made-up stain, u8 [h, w, 3]."""
    coarse = rng.integers(60, 230, (PX // 20, PX // 20, 3), np.uint8)
    return np.kron(coarse, np.ones((20, 20, 1), np.uint8))


@functools.cache
def made_slides(seed: int) -> dict[str, bytes]:
    """Return the files of slides of several kinds."""
    found, rng = {}, np.random.default_rng(seed)
    for name, compression, description in (
        ("a.svs", "jpeg", f"Aperio Image Library v1\n{PX}x{PX} (256x256) JPEG/RGB|AppMag = 20|MPP = 0.5"),
        ("b.tif", "jpeg", None), ("c.ndpi", "deflate", None), ("d.tif", "jpeg2000", None),
    ):  # fmt: skip
        stream = io.BytesIO()
        with tifffile.TiffWriter(stream) as tiff:
            tiff.write(
                picture(rng), tile=(256, 256), photometric="rgb", compression=compression, description=description,
                metadata=None, resolution=(20000, 20000), resolutionunit="CENTIMETER",
            )  # fmt: skip
        found[name] = stream.getvalue()
    return found


def change_tags(data: bytearray, rng: np.random.Generator) -> str:
    """Change one field of one tag of the first directory, or a byte of the header."""
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, at)
    if rng.random() < 0.1:
        position = int(rng.integers(0, 16))
        data[position] = int(rng.integers(0, 256))
        return f"header byte {position}"
    where = at + 2 + 12 * int(rng.integers(0, count))
    tag = struct.unpack_from(f"{order}H", data, where)[0]
    field = rng.choice(["tag", "type", "count", "value", "byte"])
    if field == "tag":
        struct.pack_into(f"{order}H", data, where, int(rng.integers(0, 65536)))
    elif field == "type":
        struct.pack_into(f"{order}H", data, where + 2, int(rng.integers(0, 20)))
    elif field == "byte":
        data[where + int(rng.integers(0, 12))] = int(rng.integers(0, 256))
    else:
        number = int(rng.choice([0, 1, 2, 255, len(data) + 5, 2**31, 2**32 - 1, int(rng.integers(0, 2**16))]))
        struct.pack_into(f"{order}I", data, where + (4 if field == "count" else 8), number)
    return f"tag {tag} {field}"


def try_slide(path: Path) -> str:
    """Read a slide as extraction does, and compare its pixels with OpenSlide's."""
    slide = open_slide(path, default_mpp=0.5)
    try:
        scale_of(slide.slide_id, slide.resolution.mpp, 5, "nominal")
        if max(slide.size_px) > 50 * PX:
            return "refused"
        read_overview(slide)
        reader = choose_reader(slide, [(0, 0), (256, 0), (0, 256)])
        try:
            found = reader.region(0, 0, 512, 512)
        finally:
            reader.close()
        with openslide.OpenSlide(path) as other:
            right = slide.composite(np.asarray(other.read_region((0, 0), 0, (512, 512))))
        if not np.array_equal(found, right):
            raise WrongError(f"{reader.name} differs from OpenSlide in {(found != right).mean():.1%} of the values")
        return "read"
    finally:
        slide.close()


def values_of(rng: np.random.Generator) -> np.ndarray:
    """Return made-up features, f32 [tile, dim]."""
    return rng.standard_normal((TILES, DIM)).astype(np.float32)


def write_h5(path: Path, layout: str, rng: np.random.Generator) -> None:
    """Write a feature file of TRIDENT or STAMP."""
    places = np.array([(x * SIDE, y * SIDE) for y in range(3) for x in range(3)])
    with h5py.File(path, "w") as file:
        if layout == "stamp":
            file["coords"], file["feats"] = places.astype(np.float32), values_of(rng).astype(np.float16)
            file.attrs.update(unit="um", tile_size_um=float(SIDE), tile_size_px=SIDE, extractor="e")
        else:
            file.create_dataset("features", data=values_of(rng)).attrs["encoder"] = "e"
            attrs = {"patch_size": 256, "patch_size_level0": SIDE, "target_magnification": 20, "overlap": 0}
            file.create_dataset("coords", data=places).attrs.update(attrs)


def change_h5(path: Path, rng: np.random.Generator) -> str:
    """Change or delete an attribute or dataset, or change bytes."""
    if rng.random() < 0.4:
        return change_bytes(path, rng)
    odd: list[Any] = [
        0, -1, 1e30, float("nan"), "None", b"x", "large", [1, 2, 3], [], True, h5py.Empty("f"), np.bytes_(b"\xff\xfe"),
        2**62, "10", (512.0, 256.0),
    ]  # fmt: skip
    with h5py.File(path, "r+") as file:
        holder = [file, *file.values()][int(rng.integers(0, 1 + len(file)))]
        if len(holder.attrs) and rng.random() < 0.8:
            key = sorted(holder.attrs)[int(rng.integers(0, len(holder.attrs)))]
            value = odd[int(rng.integers(0, len(odd)))]
            if rng.random() < 0.2:
                del holder.attrs[key]
                return f"attribute {key} deleted"
            holder.attrs[key] = value
            return f"attribute {key} = {value!r}"
        name = sorted(file)[int(rng.integers(0, len(file)))]
        del file[name]
        shapes: list[Any] = [
            None, np.zeros(0), np.zeros((0, 2)), np.float64(3), [b"x"] * TILES, np.full((TILES, 2), np.nan),
            np.full((TILES, 2), 2**40), np.zeros((2, TILES, 2)), np.full((TILES, DIM), np.inf), np.zeros((TILES, DIM)),
        ]  # fmt: skip
        value = shapes[int(rng.integers(0, len(shapes)))]
        if value is not None:
            file[name] = value
        return f"dataset {name} = {getattr(value, 'shape', value)}"


def change_bytes(path: Path, rng: np.random.Generator) -> str:
    """Change some bytes, cut the file, or append to it."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["bytes", "bytes", "bytes", "cut", "more"])
    if kind == "cut":
        del data[int(rng.integers(0, len(data))) :]
    elif kind == "more":
        data += rng.bytes(16)
    else:
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(0, len(data)))] = int(rng.integers(0, 256))
    path.write_bytes(data)
    return f"bytes: {kind}"


def write_published(folder: Path, name: str, rng: np.random.Generator, suffix: str = ".pt") -> Path:
    """Write a tensor or an array in the published layout."""
    path = folder / "e/x20" / f"{suffix[1:]}_files" / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".npz":
        np.savez(path.with_suffix(""), values_of(rng))
    else:
        torch.save(torch.from_numpy(values_of(rng)), path)
    return path


def independent(path: Path, kind: str) -> np.ndarray:
    """Read features of the changed file without this program, as f16."""
    if kind == "pt":
        values = torch.load(path, map_location="cpu", weights_only=True).detach().float().numpy()
    elif kind == "npz":
        with np.load(path) as archive:
            (values,) = (archive[name] for name in archive.files)
    else:
        with h5py.File(path) as file:
            values = file["feats" if kind == "stamp" else "features"][:]
    values = values[0] if values.ndim == 3 and len(values) == 1 else values
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float16)


def try_features(folder: Path, path: Path, kind: str, store: Path) -> str:
    """Import a changed file with its neighbours, and compare what was stored with an independent reading."""
    report = import_features(folder, store)
    if not {"neighbour", "another"} <= set(report.imported):
        raise WrongError(f"the neighbour was lost: {report.refused}")
    if "changed" in report.imported:
        (encoder,) = {p.parent.name for p in store.glob("*/changed.zarr")}
        stored = FeatureStore(store / encoder).read("changed")
        (values,) = stored.features.values()
        if not np.array_equal(values, independent(path, kind), equal_nan=True):
            raise WrongError("stored features differ from those in the file")
        return "read"
    if "changed" not in report.refused and str(path) not in report.skipped:
        raise WrongError("the changed file is not in the report")
    return "refused"


def one_change(number: int, seed: int, folder: Path) -> tuple[str, str]:
    """Make one change and return what came of it, and what was changed."""
    rng = np.random.default_rng([seed, number])
    kind = ("tiff", "trident", "stamp", "pt", "npz")[int(rng.choice(5, p=(0.5, 0.15, 0.1, 0.2, 0.05)))]
    if kind == "tiff":
        name, content = list(made_slides(seed).items())[int(rng.integers(0, 4))]
        data, source = bytearray(content), folder / name
        what = f"{name} {change_tags(data, rng)}"
        source.write_bytes(data)
        attempt: Callable[[], str] = lambda: try_slide(source)  # noqa: E731 - the same call for every kind
    else:
        if kind in ("pt", "npz"):
            for name in ("neighbour", "another"):
                write_published(folder, name, rng)
            path = write_published(folder, "changed", rng, f".{kind}")
            change = change_bytes(path, rng)
        else:
            path = folder / "changed.h5"
            for name in ("neighbour", "another"):
                write_h5(folder / f"{name}.h5", kind, rng)
            write_h5(path, kind, rng)
            change = change_h5(path, rng)
        what = f"{kind} {change}"
        attempt = lambda: try_features(folder, path, kind, folder / "store")  # noqa: E731
    try:
        return f"{kind}: {attempt()}", what
    except CfusionError as error:
        # Two encoders in a folder refuse the complete import, by rule; the error names both.
        by_rule = kind == "tiff" or "contains the encoders" in str(error)
        return (f"{kind}: refused" if by_rule else f"{kind}: FAILED run ended"), f"{what}: {error}"
    except WrongError as error:
        return f"{kind}: FAILED wrong", f"{what}: {error}"
    except Exception:  # noqa: BLE001 - any traceback is the finding
        return f"{kind}: FAILED traceback", f"{what}: {traceback.format_exc(limit=-3)}"


def work(numbers: range, seed: int, channel: Any) -> None:
    """Make changes in a separate process, and send the result of each, until the parent process ends."""
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends first, and this process with it
    with contextlib.suppress(BrokenPipeError):
        for number in numbers:
            channel.send(number)
            with tempfile.TemporaryDirectory() as folder:
                channel.send(one_change(number, seed, Path(folder)))
        channel.send(None)


def outcomes(numbers: range, seed: int) -> Iterator[tuple[int, str, str]]:
    """Return what came of each change; a process that dies is a finding, and the next takes the rest."""
    context = multiprocessing.get_context("spawn")
    first = numbers.start
    while first < numbers.stop:
        last = min(first + PER_PROCESS, numbers.stop)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(range(first, last), seed, sender))
        process.start()
        sender.close()
        at = first
        try:
            while (message := receiver.recv()) is not None:
                if isinstance(message, int):
                    at = message
                else:
                    yield at, *message
            first = last
        except EOFError:
            process.join()
            yield at, "FAILED process died", f"exit code {process.exitcode}"
            first = at + 1
        process.join()


def main() -> int:
    """Print the counts, and each failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first change, to repeat one")
    parser.add_argument("--quick", action="store_true", help="200 changes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    start = time.monotonic()
    changes = 200 if arguments.quick else arguments.changes
    for number, outcome, what in outcomes(range(arguments.first, arguments.first + changes), arguments.seed):
        counts[outcome] += 1
        if "FAILED" in outcome:
            print(f"change {number}: {outcome}: {what}", flush=True)
    for outcome, count in sorted(counts.items()):
        print(f"{count:6} {outcome}")
    failed = sum(count for outcome, count in counts.items() if "FAILED" in outcome)
    print(f"{sum(counts.values())} changes in {time.monotonic() - start:.0f} s, {failed} failures")
    if arguments.json is not None:
        write_json(arguments.json, dict(counts))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

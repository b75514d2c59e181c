"""Folder layouts of other programs: where files lie and what their numbers mean."""

from __future__ import annotations

import importlib.util
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cfusion.errors import DataError, LayoutError, MissingExtraError
from cfusion.types import magnification_name

MAGNIFICATION_FOLDER = re.compile(r"x(5|10|20|40|2\.5|1\.25)")
TRIDENT_FOLDER = re.compile(r"(\d+(?:\.\d+)?)x_(\d+)px_(\d+)px_overlap")


@dataclass(frozen=True)
class Level:
    """One slide's features at one magnification, as a layout stores them.

    Attributes:
        features: [N, d].
        coords: i64 [N, 2], top-left corners in level-0 px; None if the layout has none.
        side_px: Side of a tile in level-0 px; None if unknown.
    """

    features: np.ndarray
    coords: np.ndarray | None = None
    side_px: float | None = None

    def subset(self, keep: np.ndarray) -> Level:
        """Return the level with only the tiles of `keep`, bool [N]."""
        return Level(self.features[keep], None if self.coords is None else self.coords[keep], self.side_px)


@dataclass
class Found:
    """The content of a layout.

    Attributes:
        encoder: Name of the encoder, if the files name it.
        files: Per slide and magnification name, a function that reads the level.
        alignment: `grid`: children lie in their parents; `centre`: linked to the parent that contains a tile's centre;
            `none`: no coordinates, so no parents.
    """

    encoder: str | None
    files: dict[str, dict[str, Callable[[], Level]]] = field(default_factory=dict)
    alignment: str = "none"


def find_published(source: Path) -> Found:
    """`{pt_dir}/{backbone}/x{5,10,20}/pt_files/{slide}.pt`: f32 [N, d], no coordinates.

    `source` is `pt_dir` with one backbone, or the backbone's folder.
    """
    # CLAM's tensors lie in folders of the same name, next to its patches.
    folders = [
        p
        for pattern in ("*/pt_files", "*/*/pt_files")
        for p in sorted(source.glob(pattern))
        if MAGNIFICATION_FOLDER.fullmatch(p.parent.name) and not (p.parent / "patches").is_dir()
    ]
    backbones = {p.parent.parent for p in folders}
    if len(backbones) > 1:
        names = ", ".join(sorted(p.name for p in backbones))
        raise LayoutError(f"{source}: contains the backbones {names}.", "Give the folder of one of them.")
    found = Found(next(iter(backbones)).name if backbones else None)
    for folder in folders:
        for path in sorted(folder.glob("*.pt")):
            read = partial(_plain, path)
            found.files.setdefault(path.stem, {})[folder.parent.name] = read
    return found


def find_clam(source: Path) -> Found:
    """CLAM: `patches/{slide}.h5` next to `h5_files/{slide}.h5` or `pt_files/{slide}.pt`.

    A run has one magnification, which its files do not name, so the folders of runs must be named `x20`, `x10`,
    `x5`.
    CLAM's grids begin at the corner of each contour, so the grids of different runs are not aligned.

    Raises:
        LayoutError: `source` is itself a run.
    """
    if (source / "patches").is_dir() and ((source / "h5_files").is_dir() or (source / "pt_files").is_dir()):
        raise LayoutError(
            f"{source}: this is a CLAM run, and its files do not name their magnification.",
            "Name its folder after the magnification, such as x20, and give the parent folder.",
        )
    found = Found(None, alignment="centre")
    runs = {p.name: p for p in sorted(source.iterdir()) if MAGNIFICATION_FOLDER.fullmatch(p.name) and p.is_dir()}
    for name, run in runs.items():
        for patches in sorted((run / "patches").glob("*.h5")):
            features = run / "h5_files" / patches.name
            tensor = run / "pt_files" / f"{patches.stem}.pt"
            if features.is_file() or tensor.is_file():
                read = partial(_clam, patches, features if features.is_file() else tensor)
                found.files.setdefault(patches.stem, {})[name] = read
    return found


def find_trident(source: Path) -> Found:
    """TRIDENT: `{mag}x_{px}px_{overlap}px_overlap/features_{encoder}/{slide}.h5`, on grids from the slide's corner."""
    encoders: set[str] = set()
    overlaps: set[int] = set()
    found = Found(None)
    for folder in sorted(p for p in source.iterdir() if p.is_dir()):
        if not (match := TRIDENT_FOLDER.fullmatch(folder.name)):
            continue
        overlaps.add(int(match[3]))
        for features in sorted(folder.glob("features_*")):
            encoders.add(features.name.removeprefix("features_"))
            for path in sorted(features.glob("*.h5")):
                patches = folder / "patches" / f"{path.stem}_patches.h5"
                read = partial(_trident, path, patches)
                found.files.setdefault(path.stem, {})[magnification_name(float(match[1]))] = read
    if len(encoders) > 1:
        raise LayoutError(
            f"{source}: contains the encoders {', '.join(sorted(encoders))}.", "Keep only one in the folder."
        )
    found.encoder = next(iter(encoders), None)
    found.alignment = "grid" if overlaps <= {0} else "centre"
    return found


def find_stamp(source: Path) -> Found:
    """STAMP: `{slide}.h5` with `coords` f32 in µm, `feats` f16 and the attributes `unit`, `tile_size_um`."""
    found = Found(None, alignment="centre")
    for path in sorted(source.glob("*.h5")):
        try:
            with _opened(path) as file:
                if "feats" not in file or "tile_size_um" not in file.attrs:
                    continue
                found.encoder = found.encoder or _text(file.attrs.get("extractor"))
                side_um, side_px = _stamp_sides(file, path)
        except DataError as error:
            found.files[path.stem] = {"x20": partial(_refused, error)}
            continue
        name = magnification_name(round(10 / (side_um / side_px), 3))
        found.files[path.stem] = {name: partial(_stamp, path)}
    return found


def _refused(error: DataError) -> Level:
    raise error


def _plain(path: Path) -> Level:
    values = read_tensor(path)
    if not len(values):
        raise LayoutError(f"{path}: has no tiles.")
    return Level(values)


def _clam(patches: Path, features: Path) -> Level:
    with _opened(patches) as file:
        dataset = _dataset(file, patches, "coords")
        coords = dataset[:]
        # `patch_size` counts pixels of `patch_level`; coordinates count pixels of level 0.
        side = _number(dataset, patches, "patch_size") * _number(dataset, patches, "downsample")
    if features.suffix == ".pt":
        values = read_tensor(features)
    else:
        with _opened(features) as file:
            values = _dataset(file, features, "features")[:]
            if "coords" in file and not np.array_equal(_dataset(file, features, "coords")[:], coords):
                raise LayoutError(f"{features}: its coords are not those of {patches}.")
    return _checked(features, values, coords, side)


def _trident(path: Path, patches: Path) -> Level:
    with _opened(path) as file:
        values, dataset = _dataset(file, path, "features")[:], _dataset(file, path, "coords")
        coords, side = dataset[:], _trident_side(dataset, path)
    if side is None and patches.is_file():
        with _opened(patches) as file:
            side = _trident_side(_dataset(file, patches, "coords"), patches)
    if side is None:
        raise LayoutError(f"{path}: patch_size_level0 is missing.", f"Put {patches.name} next to it, in patches/.")
    return _checked(path, values, coords if coords.size else coords.reshape(-1, 2), side)


def _trident_side(coords: Any, path: Path) -> float | None:
    stored = coords.attrs.get("patch_size_level0")
    # TRIDENT writes None as the string 'None'.
    return None if stored is None or _text(stored) == "None" else _number(coords, path, "patch_size_level0")


def _stamp(path: Path) -> Level:
    with _opened(path) as file:
        unit = _text(file.attrs.get("unit")) or "um"
        if unit != "um":
            raise LayoutError(f"{path}: its coordinates are in {unit!r}, expected um.")
        values, coords = _dataset(file, path, "feats")[:], _dataset(file, path, "coords")[:]
        side_um, side_px = _stamp_sides(file, path)
    # STAMP does not store level-0 px, so pixels of the tile's own resolution stand in for them.
    return _checked(path, values, np.rint(coords * (side_px / side_um)).astype(np.int64), side_px)


def _stamp_sides(file: Any, path: Path) -> tuple[float, float]:
    """Return the side of a tile in µm and in px; STAMP's default is 256 px if its files give none."""
    side_px = _number(file, path, "tile_size_px") if "tile_size_px" in file.attrs else 256.0
    return _number(file, path, "tile_size_um"), side_px


def _checked(path: Path, values: np.ndarray, coords: np.ndarray, side: float) -> Level:
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.size == 0:
        raise LayoutError(f"{path}: has no tiles.")
    if values.ndim != 2 or coords.shape != (len(values), 2):
        raise LayoutError(f"{path}: features {list(values.shape)} and coords {list(coords.shape)} do not match.")
    wild = ~(np.abs(coords) < 2**31).all(axis=1)
    if wild.any():
        raise LayoutError(f"{path}: a tile lies at {coords[wild][0].tolist()}, which cannot be on a slide.")
    return Level(values, coords.astype(np.int64), side)


def read_tensor(path: Path) -> np.ndarray:
    """Read a tensor [N, d] from a `.pt` file; only tensors are unpickled.

    Raises:
        LayoutError: The file is unreadable, or contains something else.
    """
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LayoutError(
            f"{path}: contains a pickled object, not a plain tensor, so it is not opened.",
            "Import the .h5 files next to it, or save it again with torch.save(torch.as_tensor(features), path).",
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise LayoutError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}).") from None
    plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and tensor.is_floating_point()
    if not plain or tensor.ndim != 2:
        is_tensor = isinstance(tensor, torch.Tensor)
        kind = f"a tensor {list(tensor.shape)}, {tensor.dtype}" if is_tensor else type(tensor).__name__
        raise LayoutError(f"{path}: contains {kind}, expected a tensor [N, d] of floats.")
    return tensor.float().numpy()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if importlib.util.find_spec("h5py") is None:
        raise MissingExtraError("h5py", "import", f"Reading {path.name}")
    import h5py

    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError) as error:
        raise LayoutError(f"{path}: not a readable HDF5 file ({error}).") from None


def _dataset(file: Any, path: Path, name: str) -> Any:
    if name not in file:
        raise LayoutError(f"{path}: has no dataset {name!r}, only {', '.join(file)}.")
    found = file[name]
    if getattr(found, "ndim", 0) == 0 or found.dtype.kind not in "fiu":
        raise LayoutError(f"{path}: its {name!r} is not an array of numbers.")
    return found


def _number(holder: Any, path: Path, key: str) -> float:
    """Read a positive number from the attributes; the mean if there are several, as CLAM writes one for x and y."""
    if key not in holder.attrs:
        raise LayoutError(f"{path}: {holder.name} has no attribute {key!r}.")
    stored = holder.attrs[key]
    try:
        number = float(np.mean(np.asarray(stored, np.float64)))
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 < number < float("inf"):
        raise LayoutError(f"{path}: {key} is {stored}, expected a positive number.")
    return number


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, str) else None


LAYOUTS: dict[str, Callable[[Path], Found]] = {
    "published": find_published,
    "trident": find_trident,
    "clam": find_clam,
    "stamp": find_stamp,
}
"""Finders by layout."""

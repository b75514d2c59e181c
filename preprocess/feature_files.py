"""Read the feature files of other programs: HDF5 and plain tensors, checked before their numbers are used."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial import KDTree

from cfusion.errors import LayoutError
from preprocess.tensor_files import check_size, load_tensors

INTEGER_TOLERANCE_PX = 0.01
"""Largest distance of a coordinate in px from an integer."""

SAME_SIDE = 0.02
"""Largest relative difference of two numbers that state the same length."""

FEW_TILES = 8
"""With fewer tiles, it is not suspicious that none touch."""


@dataclass(frozen=True)
class Level:
    """One slide's features at one magnification, as a layout stores them.

    Attributes:
        features: [N, d].
        coords: [N, 2], top-left corners: i64 in level-0 px, or f64 in µm if `um_px` is given; None if there are none.
        side_px: Side of a tile in px: of level 0, or of its magnification if `um_px` is given; None if unknown.
        um_px: µm per px at the tile's magnification, if the coordinates are in µm.
        coords_from: How the space of the coordinates is known.
        size_px: Width and height of the slide's level 0, if the file states it.
        tile_px: Side of a tile in px of its magnification, if the file states it.
        scanned_at: The slide's magnification at level 0, if the file states it.
        warnings: What is suspicious.
    """

    features: np.ndarray
    coords: np.ndarray | None = None
    side_px: float | None = None
    um_px: float | None = None
    coords_from: str = ""
    size_px: tuple[int, int] | None = None
    tile_px: float | None = None
    scanned_at: float | None = None
    warnings: tuple[str, ...] = ()

    def subset(self, keep: np.ndarray) -> Level:
        """Return the level with only the tiles of `keep`, bool [N]."""
        coords = None if self.coords is None else self.coords[keep]
        return replace(self, features=self.features[keep], coords=coords)


def placed_level(
    path: Path, values: np.ndarray, coords: np.ndarray, side: float, step: float | None = None, **known: Any
) -> Level:
    """Check features and coordinates against each other and make a level of them; see `Level` for `known`.

    A leading axis of length 1 is dropped, as TRIDENT and CLAM write `[1, N, d]`.

    Args:
        path: The file, for messages.
        values: Features.
        coords: Top-left corners of the tiles.
        side: Side of a tile in px; see `Level`.
        step: Distance of neighbouring tiles in the unit of `coords`, if the file states it.
        known: Further attributes of the level.

    Raises:
        LayoutError: There are no tiles, the shapes differ, a coordinate cannot be on a slide, or the tiles lie
            nearer to each other than the file says.
    """
    values, coords = (a[0] if a.ndim == 3 and a.shape[0] == 1 else a for a in (values, coords))
    if values.size == 0:
        raise LayoutError(f"{path}: has no tiles.")
    if values.ndim != 2 or coords.shape != (len(values), 2):
        raise LayoutError(f"{path}: features {list(values.shape)} and coords {list(coords.shape)} do not match.")
    if values.dtype.kind != "f":
        raise LayoutError(f"{path}: its features are {values.dtype}, expected floats.")
    tolerance = INTEGER_TOLERANCE_PX if "um_px" not in known else SAME_SIDE * side * known["um_px"]
    wild = ~((coords > -tolerance) & (coords < 2**31)).all(axis=1)
    if wild.any():
        raise LayoutError(f"{path}: a tile lies at {coords[wild][0].tolist()}, which cannot be on a slide.")
    unit = known.get("um_px", 1.0)
    warnings = _spacing(path, coords.astype(np.float64), side * unit, step, "µm" if "um_px" in known else "px")
    known["warnings"] = (*warnings, *constant(values))
    if "um_px" in known:
        return Level(values, np.maximum(coords.astype(np.float64), 0), side, **known)
    rounded = np.rint(coords.astype(np.float64))
    broken = (np.abs(coords - rounded) > INTEGER_TOLERANCE_PX).any(axis=1)
    if broken.any():
        raise LayoutError(
            f"{path}: a tile lies at {coords[broken][0].tolist()}, expected integer pixels of level 0.",
            "Check in which unit its coordinates are.",
        )
    return Level(values, rounded.astype(np.int64), side, **known)


def _spacing(path: Path, coords: np.ndarray, side: float, step: float | None, unit: str) -> list[str]:
    """Compare the distances of the tiles with their side; return what is suspicious.

    Raises:
        LayoutError: Most tiles lie nearer to each other than `step`, so the coordinates count something else.
    """
    if len(coords) < 2:
        return []
    nearest = KDTree(coords).query(coords, k=2, p=np.inf)[0][:, 1]
    usual = float(np.median(nearest))
    remedy = "Check in which unit its coordinates are, and the size of its tiles."
    if step is not None and usual < (1 - SAME_SIDE) * step - 1:
        raise LayoutError(
            f"{path}: its tiles lie {usual:g} {unit} apart, but its attributes say {step:g} {unit}.", remedy
        )
    found = []
    if usual < (1 - SAME_SIDE) * side - 1 and step is None:
        found.append(f"tiles of {side:g} {unit} lie {usual:g} {unit} apart, so they overlap")
    if len(coords) >= FEW_TILES and (apart := float(nearest.min())) > (1 + SAME_SIDE) * side + 1:
        found.append(f"no two tiles touch: tiles of {side:g} {unit} lie at least {apart:g} {unit} apart")
    if twice := int((nearest == 0).sum()):
        found.append(f"{twice} tiles lie at the place of another tile")
    return found


def constant(values: np.ndarray) -> list[str]:
    """Return that all tiles have the same features, if so."""
    same = len(values) > 1 and bool((values == values[0]).all())
    return [f"all {len(values)} tiles have the same features"] if same else []


def loaded_pt(path: Path, remedy: str) -> Any:
    """Load what a `.pt` file contains, tensors and plain containers only.

    Args:
        path: The file.
        remedy: What to do with a file of pickled objects.

    Raises:
        LayoutError: The file is unreadable, or contains other objects.
    """
    try:
        return load_tensors(path)
    except pickle.UnpicklingError as error:
        raise LayoutError(
            f"{path}: contains a pickled object, not a plain tensor, so it is not opened.", remedy
        ) from error
    except (LayoutError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - a damaged archive ends in errors of many kinds
        raise LayoutError(f"{path}: cannot be read ({said(error)}).", "Copy it, or save it, again.") from None


def read_tensor(path: Path) -> np.ndarray:
    """Read a tensor [N, d] from a `.pt` file; only tensors are unpickled.

    Raises:
        LayoutError: The file is unreadable, or contains something else.
    """
    tensor = loaded_pt(
        path, "Import the .h5 files next to it, or save it again with torch.save(torch.as_tensor(features), path)."
    )
    plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and tensor.is_floating_point()
    if plain:
        _check_expanded(path, tensor)
    if plain and tensor.ndim == 3 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if not plain or tensor.ndim != 2:
        is_tensor = isinstance(tensor, torch.Tensor)
        kind = f"a tensor {list(tensor.shape)}, {tensor.dtype}" if is_tensor else type(tensor).__name__
        raise LayoutError(f"{path}: contains {kind}, expected a tensor [N, d] of floats.")
    return tensor.detach().float().numpy()


def _check_expanded(path: Path, tensor: torch.Tensor) -> None:
    """Refuse a tensor that shows the same stored numbers many times."""
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:
        raise LayoutError(
            f"{path}: its tensor {list(tensor.shape)} is expanded from {stored} bytes.",
            "Save it again with torch.save(features.contiguous(), path).",
        )


def read_array(path: Path) -> np.ndarray:
    """Read an array from a `.npy` file, or from a `.npz` file its only one or that named `features`.

    Raises:
        LayoutError: The file is unreadable, contains pickled objects, declares more numbers than it can have, or has
            several arrays, none named `features`.
    """
    try:
        for shape, dtype, stored in _npy_headers(path):
            check_size(path, math.prod(shape) * dtype.itemsize, stored)
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = loaded.files
            name = "features" if "features" in names else names[0] if len(names) == 1 else None
            if name is not None:
                return np.asarray(loaded[name])
    except (LayoutError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - damaged archives end in errors of many kinds
        raise LayoutError(
            f"{path}: cannot be read ({said(error)}).", "Expected an array of numbers, saved without pickle."
        ) from None
    raise LayoutError(f"{path}: has the arrays {', '.join(names)}, none named features.", "Save it with features=….")


def _npy_headers(path: Path) -> Iterator[tuple[tuple[int, ...], np.dtype, int]]:
    """Read shape, type and stored bytes of the array of a `.npy` file, or of that which is read of a `.npz` file."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as stream:
            yield *_npy_header(stream), path.stat().st_size
        return
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: part for part in archive.infolist()}
        name = "features.npy" if "features.npy" in parts else next(iter(parts), None)
        if name is not None:
            with archive.open(name) as stream:
                yield *_npy_header(stream), parts[name].compress_size


def _npy_header(stream: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def declared_shape(path: Path) -> tuple[int, ...] | None:
    """Return the shape that a file states for its features, without reading them; None if these are no floats."""
    try:
        if path.suffix.lower() in (".h5", ".hdf5"):
            with opened(path) as file:
                name = next(name for name in ("features", "feats") if name in file)
                shape, floats = tuple(file[name].shape), file[name].dtype.kind == "f"
        elif path.suffix.lower() in (".npy", ".npz"):
            shape, dtype, _ = next(_npy_headers(path))
            floats = dtype.kind == "f"
        else:
            tensor = torch.load(path, map_location="meta", weights_only=True)
            shape, floats = tuple(tensor.shape), tensor.is_floating_point()
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - the import of the file says what is wrong with it
        return None
    return shape if floats else None


def read_matrix(path: Path) -> np.ndarray:
    """Read features [N, d] as f32 from a `.npy` or `.npz` file, or from the dataset `features` of a `.h5` file.

    Raises:
        LayoutError: As `read_array` or `dataset`, or the array is not [N, d] of floats.
    """
    if path.suffix.lower() == ".h5":
        with opened(path) as file:
            values = dataset(file, path, "features")[:]
    else:
        values = read_array(path)
    values = values[0] if values.ndim == 3 and values.shape[0] == 1 else values
    if values.ndim != 2 or values.dtype.kind != "f":
        raise LayoutError(f"{path}: contains {values.dtype} {list(values.shape)}, expected floats [N, d].")
    return values.astype(np.float32)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open an HDF5 file for reading.

    Raises:
        LayoutError: The file is unreadable, or what is read from it within the block is damaged.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            yield file
    except (LayoutError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - damaged files end in errors of many kinds
        raise LayoutError(f"{path}: not a readable HDF5 file ({said(error)}).") from None


def dataset(file: Any, path: Path, name: str) -> Any:
    """Return a dataset of numbers.

    Raises:
        LayoutError: It is missing, or is not an array of numbers.
    """
    if name not in file:
        raise LayoutError(f"{path}: has no dataset {name!r}, only {', '.join(file)}.")
    found = file[name]
    if getattr(found, "ndim", 0) == 0 or found.dtype.kind not in "fiu":
        raise LayoutError(f"{path}: its {name!r} is not an array of numbers.")
    check_size(path, math.prod(found.shape) * found.dtype.itemsize, path.stat().st_size)
    _check_written(path, name, found)
    return found


def _check_written(path: Path, name: str, found: Any) -> None:
    """Refuse a dataset of which parts were never written: HDF5 would read zeros."""
    if found.is_virtual:
        raise LayoutError(f"{path}: its {name!r} is virtual: its numbers lie in other files.", "Copy them into it.")
    if found.chunks is not None:
        there = found.id.get_num_chunks()
        expected = math.prod(-(-n // chunk) for n, chunk in zip(found.shape, found.chunks, strict=True))
    else:
        there, expected = found.id.get_storage_size(), math.prod(found.shape) * found.dtype.itemsize
    if there < expected:
        raise LayoutError(
            f"{path}: {1 - there / expected:.0%} of its {name!r} were never written.",
            "The program that wrote it was interrupted: extract the slide again.",
        )


def number(holder: Any, path: Path, key: str) -> float:
    """Read a positive number from the attributes; CLAM writes one for x and one for y.

    Raises:
        LayoutError: It is missing or not positive, or x and y differ by more than 2%.
    """
    if key not in holder.attrs:
        raise LayoutError(f"{path}: {holder.name} has no attribute {key!r}.")
    stored = holder.attrs[key]
    try:
        values = np.asarray(stored, np.float64).ravel()
    except (TypeError, ValueError):
        values = np.empty(0)
    if not values.size or not np.isfinite(values).all() or not (values > 0).all():
        raise LayoutError(f"{path}: {key} is {stored}, expected a positive number.")
    if values.max() > 1.02 * values.min():
        raise LayoutError(f"{path}: {key} is {stored}; expected the same for x and y.")
    return float(values.mean())


def number_if_given(holder: Any, path: Path, key: str) -> float | None:
    """Read a positive number from the attributes; None if it is missing. TRIDENT writes None as the string 'None'."""
    return None if key not in holder.attrs or text(holder.attrs[key]) == "None" else number(holder, path, key)


def text(value: Any) -> str | None:
    """Return an attribute's text; None if it is empty or something else."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return value.strip() or None if isinstance(value, str) else None


def said(error: BaseException) -> str:
    """Return what a library's error says, in one short line, with the error's class if it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__

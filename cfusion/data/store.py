"""The feature store: one zarr v3 group per slide and encoder, `STORE/{encoder}/{slide_id}.zarr`.

A group contains, per magnification, `features` f16 [N, d] and `coords` i32 [N, 2] in level-0 px, and for all but the
coarsest `parent` i32 [N], the row in the next coarser magnification. Chunks have 1024 rows and are not compressed:
compression doubles the reading time for 7% of the size. A group is written to a temporary and renamed, so every group
in the store is complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np

from cfusion.data.encoder_names import encoder_name
from cfusion.errors import DISK, DataError, StoreError
from cfusion.files import atomic_path, is_orphan
from cfusion.types import SlideFeatures, magnification_value

CHUNK_ROWS = 1024
"""Rows of a chunk; measured: with 1024, reading a complete bag or a random quarter of it is fastest."""

SUFFIX = ".zarr"

RACES = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR})
"""System errors when two processes put the same slide in place at once."""

RACE_ATTEMPTS = 8

_EXTRACT = "Delete the group and extract the slide again."

ABANDONED_S = 6 * 3600
"""Age after which a temporary of another machine counts as left by a killed process."""


class FeatureStore:
    """Reads the slides of one encoder from a feature store.

    Args:
        path: Folder of one encoder, with the slides' groups.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    def open(cls, root: str | os.PathLike[str], encoder: str | None = None) -> FeatureStore:
        """Open the features of `encoder`, also by TRIDENT's name, in the store at `root`; None: of its only encoder.

        Raises:
            StoreError: The store is missing, lacks the encoder, or has several and none was named.
        """
        found = encoders_in(root)
        if encoder is not None and encoder not in found:
            encoder = next((name for name in found if encoder_name(name) == encoder_name(encoder)), encoder)
        if encoder is None:
            if len(found) != 1:
                which = f"holds the encoders {', '.join(found)}" if found else "holds no encoder's features"
                raise StoreError(f"{root}: {which}.", "Name the encoder." if found else "Run `cfusion preprocess`.")
            encoder = found[0]
        if encoder not in found:
            raise StoreError(
                f"{root}: holds no features of the encoder {encoder!r}.",
                f"It has: {', '.join(found)}." if found else "Run `cfusion preprocess` first.",
            )
        return cls(Path(root) / encoder)

    def __repr__(self) -> str:
        count = len(self.slide_ids())
        return f"FeatureStore({self.path}: {count} slide{'s' * (count != 1)})"

    @property
    def encoder(self) -> str:
        """Name of the encoder."""
        return self.path.name

    def slide_ids(self) -> list[str]:
        """The slides in the store, sorted."""
        groups = (p.name for p in self.path.glob(f"*{SUFFIX}") if not p.name.startswith("."))
        return sorted(name.removesuffix(SUFFIX) for name in groups)

    def group_path(self, slide_id: str) -> Path:
        """Return the folder of a slide's group, whether it exists or not."""
        return self.path / f"{checked_name(slide_id)}{SUFFIX}"

    def attrs(self, slide_id: str) -> dict[str, Any]:
        """Return the provenance of a slide's features, as written."""
        return dict(self._group(slide_id).attrs)

    def read(self, slide_id: str) -> SlideFeatures:
        """Read all features of one slide.

        Raises:
            StoreError: The slide is not in the store, or its group is unreadable.
        """
        group = self._group(slide_id)
        arrays: dict[str, dict[str, np.ndarray]] = {"features": {}, "coords": {}, "parent": {}}
        try:
            for name in sorted(group.group_keys(), key=magnification_value, reverse=True):
                for key, by_name in arrays.items():
                    if key in group[name]:
                        by_name[name] = np.asarray(group[name][key][:])
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable(slide_id, error) from error
        return SlideFeatures(
            slide_id, arrays["features"], arrays["coords"], arrays["parent"], dict(group.attrs.items())
        )

    def shapes(self, slide_id: str) -> dict[str, tuple[int, int]]:
        """Return the number and width of tiles per magnification, finest first, without reading the features.

        Raises:
            StoreError: The slide is not in the store, or its group is unreadable.
        """
        group = self._group(slide_id)
        try:
            names = sorted(group.group_keys(), key=magnification_value, reverse=True)
            return {name: tuple(group[name]["features"].shape) for name in names}
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable(slide_id, error) from error

    def _unreadable(self, slide_id: str, error: Exception) -> StoreError:
        where = self.group_path(slide_id)
        return StoreError(f"{where}: cannot be read ({error}).", "Delete it and extract the slide again.")

    def attrs_if_complete(self, slide_id: str) -> dict[str, Any] | None:
        """Return the provenance of a slide's features; None if they are missing or incomplete."""
        if not self.group_path(slide_id).is_dir():
            return None
        try:
            return self.attrs(slide_id)
        except DataError:
            return None

    def _group(self, slide_id: str) -> Any:
        path = self.group_path(slide_id)
        if not path.is_dir():
            raise StoreError(
                f"{self.path}: contains no slide {slide_id!r}.", "`cfusion preprocess inspect` lists the slides."
            )
        import zarr

        try:
            return zarr.open_group(path, mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(
                f"{path}: not a zarr group ({error}).", "Delete it and extract the slide again."
            ) from error


def encoders_in(root: str | os.PathLike[str]) -> list[str]:
    """List the encoders of a feature store, sorted.

    Raises:
        StoreError: There is no folder at `root`.
    """
    root = Path(root)
    if not root.is_dir():
        raise StoreError(f"{root}: no such feature store.", "Give the folder that `cfusion preprocess` wrote.")
    return sorted(p.name for p in root.iterdir() if p.is_dir() and any(p.glob(f"[!.]*{SUFFIX}")))


def write_slide(store_root: str | os.PathLike[str], features: SlideFeatures) -> Path:
    """Write one slide's features; an existing group is replaced as a unit.

    `features.attrs["encoder"]` names the encoder. The digest of each array is added to the attributes, for `verify`.

    Raises:
        StoreError: An array has the wrong shape, or a value that is not finite in f16.
    """
    check_features(features)
    store = FeatureStore(Path(store_root) / checked_name(str(features.attrs["encoder"])))
    target = store.group_path(features.slide_id)
    for attempt in range(RACE_ATTEMPTS):
        try:
            _put(target, features)
            break
        except OSError as error:
            if error.errno not in RACES or attempt == RACE_ATTEMPTS - 1:
                raise StoreError(
                    f"{target}: cannot be written ({error.strerror or error}).", DISK.get(error.errno or 0, "")
                ) from error
            time.sleep(random.random() * 0.1)
    _sweep(target)
    return target


def _sweep(target: Path) -> None:
    """Remove the leftovers of a killed or overtaken writer of this slide."""
    for left in target.parent.glob(f".{target.name}.*"):
        with contextlib.suppress(OSError):
            if left.suffix == ".old" or is_orphan(left) or time.time() - left.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)


def _put(target: Path, features: SlideFeatures) -> None:
    import zarr

    digests = array_digests(features)
    with atomic_path(target) as temporary:
        group = zarr.open_group(temporary, mode="w", zarr_format=3)
        for key, array in _arrays(features):
            rows = (CHUNK_ROWS, *array.shape[1:])
            group.create_array(key, data=array, chunks=rows, compressors=None, filters=None)
        group.attrs.update({**features.attrs, "digests": digests})


def check_features(features: SlideFeatures) -> None:
    """Check features for errors that would make them unusable.

    Raises:
        StoreError: Rows do not match, a parent does not exist, or a value is not finite.
    """
    names = sorted(features.features, key=magnification_value, reverse=True)
    for name, coarser in zip(names, [*names[1:], None], strict=True):
        array, coords = features.features[name], features.coords.get(name)
        where = f"slide {features.slide_id}, {name}"
        if array.ndim != 2 or array.dtype != np.float16:
            raise StoreError(f"{where}: features are {array.dtype} {array.shape}, expected float16 [N, d].")
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
            raise StoreError(f"{where}: the features of tile {row} are not finite.")
        if coords is not None and coords.size and coords.shape != (len(array), 2):
            raise StoreError(f"{where}: {len(array)} features, but coordinates of shape {coords.shape}.")
        parents = features.parents.get(name)
        if parents is None or coarser is None:
            continue
        limit = len(features.features[coarser])
        if parents.shape != (len(array),) or (parents.size and not 0 <= parents.min() <= parents.max() < limit):
            raise StoreError(f"{where}: parents point outside the rows of {coarser} ({limit} rows).")


def check_digests(features: SlideFeatures) -> None:
    """Check features against their digests, for example for the zeros that zarr reads for a lost chunk.

    Raises:
        StoreError: An array differs from its digest, or is missing, or there are no digests.
    """
    digests = features.attrs.get("digests")
    if not isinstance(digests, dict):
        raise StoreError(f"slide {features.slide_id}: its attributes have no digests.", _EXTRACT)
    found = array_digests(features)
    for key in sorted(digests.keys() | found.keys()):
        if digests.get(key) != found.get(key):
            state = "is missing" if key not in found else "differs from its digest"
            raise StoreError(f"slide {features.slide_id}: {key} {state}.", _EXTRACT)


def array_digests(features: SlideFeatures) -> dict[str, str]:
    """Compute the digest of each array of a slide's group, by its path in the group."""
    return {key: array_digest(array) for key, array in _arrays(features)}


def array_digest(array: np.ndarray) -> str:
    """Compute the SHA-256 of an array's bytes, as hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"").hexdigest()


def _arrays(features: SlideFeatures) -> list[tuple[str, np.ndarray]]:
    kinds: dict[str, tuple[Mapping[str, np.ndarray], Any]] = {
        "features": (features.features, np.float16),
        "coords": (features.coords, np.int32),
        "parent": (features.parents, np.int32),
    }
    return [
        (f"{name}/{key}", np.ascontiguousarray(arrays[name], dtype=dtype))
        for name in features.features
        for key, (arrays, dtype) in kinds.items()
        if name in arrays
    ]


def checked_name(name: str) -> str:
    """Return `name` if it is one component of a path that stays in its folder.

    Raises:
        StoreError: It is empty, hidden, or leads elsewhere.
    """
    valid = name and not name.startswith(".") and name == Path(name).name and "\\" not in name
    if not valid or any(category(character) in ("Cc", "Cs") for character in name):
        raise StoreError(f"{name!r}: not a valid name for a slide or an encoder.", "Use a plain file name.")
    return name

"""Folder layouts of other programs: where files lie and what their numbers mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cfusion.data.encoder_names import encoder_name
from cfusion.errors import DataError, LayoutError
from cfusion.types import magnification_name
from preprocess.feature_files import (
    SAME_SIDE,
    Level,
    constant,
    dataset,
    declared_shape,
    number,
    number_if_given,
    opened,
    placed_level,
    read_matrix,
    read_tensor,
    text,
)
from preprocess.names import files_below, without_suffix

MAGNIFICATION_FOLDER = re.compile(r"x(5|10|20|40|2\.5|1\.25)")
NAMED_MAGNIFICATION = re.compile(r"x(\d+(?:\.\d+)?)|(\d+(?:\.\d+)?)x")
"""`20x` or `x20`, as a word of a folder's name."""
TRIDENT_FOLDER = re.compile(r"(\d+(?:\.\d+)?)x_(\d+px_(\d+)px)_overlap")

STAMP_PX, STAMP_UM, HISTORIC_STAMP_STRIDE = 256.0, 256.0, 224
"""Side of STAMP's tiles in px if its files do not state it; its first version: px of 256 / 224 µm."""


@dataclass(frozen=True)
class FeatureFile:
    """One slide's features at one magnification.

    Attributes:
        slide_id: The slide.
        magnification: Its name; empty if neither the file nor its folders state it.
        encoder: The encoder that the file or its folder names, under the layout's name.
        read: Reads the features.
        paths: Files that `read` opens; the first has the features.
        tiling: Size and overlap of the tiles, if the folder's name states them.
    """

    slide_id: str
    magnification: str
    encoder: str | None
    read: Callable[[], Level]
    paths: tuple[Path, ...]
    tiling: str = ""


@dataclass
class Found:
    """The content of a layout.

    Attributes:
        files: The features.
        refused: Files that belong to the layout and cannot be used: slide, file, reason.
        alignment: `grid`: children lie in their parents; `centre`: linked to the parent that contains a tile's
            centre; `none`: no coordinates, so no parents.
    """

    files: list[FeatureFile] = field(default_factory=list)
    refused: list[tuple[str, Path, str]] = field(default_factory=list)
    alignment: str = "none"


@dataclass(frozen=True)
class SourceFolder:
    """A folder of another program's features.

    Attributes:
        path: The folder.
        only: Patterns of folders or files to take; empty: all.
        magnification: Magnification of files that do not state theirs.
    """

    path: Path
    only: tuple[str, ...] = ()
    magnification: float | None = None

    def files(self, *suffixes: str) -> Iterator[Path]:
        """List the chosen files with these suffixes, in subfolders too, sorted; a pipe is no file."""
        found = (p for p in files_below(self.path) if p.name.lower().endswith(suffixes) and self._wanted(p))
        yield from sorted(p for p in found if p.is_file() or not p.exists())

    def unreadable(self) -> list[Path]:
        """List the subfolders that cannot be searched."""
        return [path for path in files_below(self.path) if path.is_dir()]

    def _wanted(self, path: Path) -> bool:
        parts = path.relative_to(self.path.parent if self.path.name else self.path).parts
        return not self.only or any(fnmatchcase(part, pattern) for part in parts for pattern in self.only)


def find_published(source: SourceFolder) -> Found:
    """`{pt_dir}/{backbone}/x{5,10,20}/pt_files/{slide}.pt`: f32 [N, d], no coordinates.

    The same with `.npy` or `.npz` files, also in folders `npy_files` or `npz_files`.
    """
    found = Found()
    for path in source.files(".pt", ".npy", ".npz"):
        magnification = path.absolute().parent.parent
        # CLAM's tensors lie in folders of the same name, next to its patches.
        if (
            path.parent.name in ("pt_files", "npy_files", "npz_files")
            and MAGNIFICATION_FOLDER.fullmatch(magnification.name)
            and not (magnification / "patches").is_dir()
        ):
            read, backbone = partial(read_plain, path), magnification.parent.name
            found.files.append(FeatureFile(slide_name(path), magnification.name, backbone, read, (path,)))
    return found


def find_clam(source: SourceFolder) -> Found:
    """CLAM: `patches/{slide}.h5` next to `h5_files/{slide}.h5` or `pt_files/{slide}.pt`.

    A run has one magnification, which its files do not name, so the folders of runs must be named `x20`, `x10`,
    `x5`. CLAM's grids begin at the corner of each contour, so the grids of different runs are not aligned.

    Raises:
        LayoutError: `source` is itself a run, and its magnification is not known.
    """
    found = Found(alignment="centre")
    runs: dict[Path, str] = {}
    for path in source.files(".h5", ".pt"):
        run = path.parent.parent
        if path.parent.name in ("patches", "h5_files", "pt_files") and _is_clam_run(run):
            runs.setdefault(run, "")
    for run in runs:
        named = MAGNIFICATION_FOLDER.fullmatch(run.absolute().name)
        if named and (run != source.path or source.magnification is not None):
            runs[run] = named[0]
        elif source.magnification is not None:
            runs[run] = magnification_name(source.magnification)
        else:
            raise LayoutError(
                f"{run}: this is a CLAM run, and its files do not name their magnification.",
                "Name its folder after the magnification, such as x20, and give the parent folder; or give "
                "--magnification.",
            )
        _add_clam_run(found, source, run, runs[run])
    return found


def _is_clam_run(run: Path) -> bool:
    return (run / "patches").is_dir() and ((run / "h5_files").is_dir() or (run / "pt_files").is_dir())


def _add_clam_run(found: Found, source: SourceFolder, run: Path, magnification: str) -> None:
    by_slide: dict[str, dict[str, Path]] = {}
    twice: dict[str, str] = {}
    for path in source.files(".h5", ".pt"):
        if path.parent.parent == run and path.parent.name in ("patches", "h5_files", "pt_files"):
            slide_id = slide_name(path)
            other = by_slide.setdefault(slide_id, {}).setdefault(path.parent.name, path)
            if other != path:
                twice[slide_id] = f"{other} and {path} are both slide {slide_id}; rename or move one"
    for slide_id, has in by_slide.items():
        patches, features = has.get("patches"), has.get("h5_files", has.get("pt_files"))
        if slide_id in twice:
            found.refused.append((slide_id, next(iter(has.values())), twice[slide_id]))
        elif patches is None:
            found.refused.append(
                (slide_id, next(iter(has.values())), "its patches/ file with the coordinates is missing")
            )
        elif features is None:
            found.refused.append((slide_id, patches, "has patches, but no features in h5_files/ or pt_files/"))
        else:
            others = [p for p in has.values() if p not in (features, patches)]
            read, paths = partial(_clam, patches, features, *others), (features, patches, *others)
            found.files.append(FeatureFile(slide_id, magnification, None, read, paths))


def find_trident(source: SourceFolder) -> Found:
    """TRIDENT: `{mag}x_{px}px_{overlap}px_overlap/features_{encoder}/{slide}.h5`, or the same files in any folder.

    Folders tell encoder, magnification and overlap; in a flat tree, the attributes of the files do.
    """
    found, overlaps = Found(), set()
    for path in source.files(".h5"):
        folder = path.absolute().parent
        if folder.name in ("patches", "h5_files") or folder.name.startswith("slide_features_"):
            continue
        named = folder.name.removeprefix("features_") if folder.name.startswith("features_") else None
        if named and NAMED_MAGNIFICATION.fullmatch(named):
            named = None  # a folder such as features_20x, of a flat tree
        match = TRIDENT_FOLDER.fullmatch(folder.parent.name) if named else None
        if match is not None:
            overlaps.add(int(match[3]))
            patches = path.parent.parent / "patches" / f"{path.stem}_patches.h5"
            paths = (path, patches) if patches.is_file() else (path,)
            name = magnification_name(float(match[1]))
            read = partial(_trident, path, patches, float(match[1]), named, match[2])
            found.files.append(FeatureFile(slide_name(path), name, named, read, paths, match[2]))
        else:
            try:
                file = _flat_trident(path, named, source.magnification, overlaps)
            except DataError as error:
                found.refused.append((slide_name(path), path, error.message))
                continue
            if file is not None:
                found.files.append(file)
    found.alignment = "grid" if overlaps <= {0} else "centre"
    return found


def _flat_trident(path: Path, named: str | None, magnification: float | None, overlaps: set[int]) -> FeatureFile | None:
    """Return a file of a flat tree; None if it is not TRIDENT's."""
    with opened(path) as file:
        if "features" not in file or "coords" not in file:
            return None
        overlap = _integer(file["coords"].attrs.get("overlap", 0))
        stated = _positive(file["coords"], path, "target_magnification")
        encoder = text(file["features"].attrs.get("encoder"))
    # An overlap that is no number is not taken for none.
    overlaps.add(-1 if overlap is None else overlap)
    magnification = magnification or stated
    name = "" if magnification is None else magnification_name(magnification)
    encoder = named or (encoder if encoder != "None" else None)
    return FeatureFile(slide_name(path), name, encoder, partial(_trident, path, None, magnification, encoder), (path,))


def find_stamp(source: SourceFolder) -> Found:
    """STAMP: `{slide}.h5` with `coords` f32 in µm and `feats` f16, in any folder.

    The side of a tile is the attribute `tile_size_um`, before version 2.1 `tile_size`. The first version wrote no
    attributes, and coordinates in pixels of 256 / 224 µm.
    """
    found = Found(alignment="centre")
    for path in source.files(".h5"):
        try:
            with opened(path) as file:
                if "feats" not in file:
                    continue
                encoder = text(file.attrs.get("extractor"))
                side_um, side_px, _ = _stamp_sides(file, path)
        except DataError as error:
            found.refused.append((slide_name(path), path, error.message))
            continue
        name = magnification_name(round(10 / (side_um / side_px), 3))
        found.files.append(FeatureFile(slide_name(path), name, encoder, partial(_stamp, path), (path,)))
    return found if found.files else Found()


def stated_magnification(folder: str) -> float | None:
    """Return the magnification that a word of a folder's name states, such as `uni_20x`; None if none does."""
    words = (NAMED_MAGNIFICATION.fullmatch(word) for word in re.split(r"[\s_-]+", folder))
    return next((float(word[1] or word[2]) for word in words if word), None)


def slide_name(path: Path) -> str:
    """Return the name of the slide of a feature file, which may keep the slide's suffix: `s.svs.h5` is slide `s`."""
    return without_suffix(path.stem)


def read_plain(path: Path) -> Level:
    """Read the embeddings of a slide's tiles from a file that has nothing else."""
    values = read_tensor(path) if path.suffix.lower() == ".pt" else read_matrix(path)
    if not values.size:
        raise LayoutError(f"{path}: has no tiles.")
    return Level(values, warnings=tuple(constant(values)))


def _clam(patches: Path, features: Path, *others: Path) -> Level:
    with opened(patches) as file:
        stored = dataset(file, patches, "coords")
        coords = stored[:]
        # `patch_size` counts pixels of `patch_level`; coordinates count pixels of level 0.
        side = number(stored, patches, "patch_size") * number(stored, patches, "downsample")
        size = _size(stored.attrs.get("level_dim")) if _integer(stored.attrs.get("patch_level")) == 0 else None
    if features.suffix.lower() == ".pt":
        values = read_tensor(features)
    else:
        with opened(features) as file:
            values = dataset(file, features, "features")[:]
            if "coords" in file and not np.array_equal(dataset(file, features, "coords")[:], coords):
                raise LayoutError(f"{features}: its coords are not those of {patches}.")
    for other in others:
        if (shape := declared_shape(other)) != values.shape:
            raise LayoutError(
                f"{features} has features {list(values.shape)}, but {other} {list(shape or ())}.",
                "Delete the file that is out of date.",
            )
    return placed_level(features, values, coords, side, coords_from="CLAM counts level-0 px", size_px=size)


def _size(stored: Any) -> tuple[int, int] | None:
    values = [_integer(v) for v in np.asarray(stored if stored is not None else [], object).ravel()]
    if len(values) != 2 or values[0] is None or values[1] is None or min(values[0], values[1]) <= 0:
        return None
    return values[0], values[1]


def _integer(stored: Any) -> int | None:
    """Return an attribute that should be an integer; None if it is not a number."""
    try:
        return int(stored)
    except (TypeError, ValueError, OverflowError):
        return None


def _trident(
    path: Path, patches: Path | None, magnification: float | None, encoder: str | None, tiling: str = ""
) -> Level:
    with opened(path) as file:
        stored, coords = dataset(file, path, "features"), dataset(file, path, "coords")
        values, places = stored[:], coords[:]
        stated = _positive(coords, path, "target_magnification")
        _agree(path, encoder, text(stored.attrs.get("encoder")), magnification, stated)
        side, size = number_if_given(coords, path, "patch_size_level0"), _size([
            coords.attrs.get("level0_width"), coords.attrs.get("level0_height")
        ])  # fmt: skip
        known = _stated(path, coords, tiling)
        if not values.size:
            raise LayoutError(f"{path}: has no tiles.")
        source = "TRIDENT counts level-0 px"
        if side is None and patches is None:
            side = _stride(path, places[0] if places.ndim == 3 else places)
            source += "; the side of a tile is the stride of its coordinates"
    if side is None and patches is not None and patches.is_file():
        with opened(patches) as file:
            side = number_if_given(dataset(file, patches, "coords"), patches, "patch_size_level0")
    if side is None:
        raise LayoutError(
            f"{path}: patch_size_level0 is missing.", f"Put {path.stem}_patches.h5 next to it, in patches/."
        )
    places = places if places.size else places.reshape(-1, 2)
    overlap = known.pop("overlap")
    step = None if overlap is None else side * (1 - overlap / (known["tile_px"] or side))
    return placed_level(path, values, places, side, step, coords_from=source, size_px=size, **known)


def _stated(path: Path, coords: Any, tiling: str) -> dict[str, Any]:
    """Return tile size, overlap and slide magnification that the attributes state, compared with each other.

    Raises:
        LayoutError: They contradict each other, or the name of the folder.
    """
    px, overlap = number_if_given(coords, path, "patch_size"), _integer(coords.attrs.get("overlap", 0))
    if tiling:
        named = [int(n) for n in re.findall(r"\d+", tiling)]
        stated = [named[0] if px is None else px, named[1] if "overlap" not in coords.attrs else overlap]
        if named != stated:
            raise LayoutError(
                f"{path}: its attributes say tiles of {stated[0]:g} px with an overlap of {stated[1]}, its folder "
                f"{named[0]} px with {named[1]}.",
                "Move it to the folder of its tiles.",
            )
        px, overlap = named
    if px and overlap is not None and overlap >= px:
        raise LayoutError(
            f"{path}: its attributes say tiles of {px:g} px with an overlap of {overlap}.", "Extract it again."
        )
    side, scanned, taken = (
        _positive(coords, path, key) for key in ("patch_size_level0", "level0_magnification", "target_magnification")
    )
    if px and side and scanned and taken and abs(side * taken / (px * scanned) - 1) > SAME_SIDE:
        raise LayoutError(
            f"{path}: its attributes say tiles of {px:g} px at {taken:g}x of a slide of {scanned:g}x, which are "
            f"{px * scanned / taken:g} px of level 0, but patch_size_level0 is {side:g}.",
            "Extract the slide again.",
        )
    return {"tile_px": px, "overlap": overlap, "scanned_at": scanned}


def _positive(coords: Any, path: Path, key: str) -> float | None:
    """Return an attribute; None if it states nothing: −1, 'None', or missing."""
    try:
        return number_if_given(coords, path, key)
    except LayoutError:
        return None


def _agree(path: Path, named: str | None, encoder: str | None, folder: float | None, stated: float | None) -> None:
    """Refuse a file whose attributes contradict its folders."""
    if named and encoder and encoder != "None" and encoder_name(named) != encoder_name(encoder):
        raise LayoutError(
            f"{path}: its attribute says the encoder {encoder}, its folder {named}.",
            "Move it to the folder of its encoder.",
        )
    if folder and stated and abs(stated / folder - 1) > 0.01:
        raise LayoutError(
            f"{path}: its attributes say {stated:g}x, but its folder or --magnification says {folder:g}x.",
            "Move it to the folder of its magnification, or leave out --magnification.",
        )


def _stride(path: Path, places: np.ndarray) -> float:
    """Return the smallest distance between columns or rows of tiles."""
    steps = [np.diff(np.unique(places[:, axis])) for axis in range(2)] if places.ndim == 2 and places.size else []
    steps = [step.min() for step in steps if len(step)]
    if not steps or min(steps) <= 0:
        raise LayoutError(f"{path}: neither its attributes nor its coordinates give the side of a tile.")
    return float(min(steps))


def _stamp(path: Path) -> Level:
    with opened(path) as file:
        unit = text(file.attrs.get("unit")) or "um"
        if unit != "um":
            raise LayoutError(f"{path}: its coordinates are in {unit!r}, expected um.")
        values, coords = dataset(file, path, "feats")[:], dataset(file, path, "coords")[:]
        side_um, side_px, um_per_unit = _stamp_sides(file, path)
    um = coords.astype(np.float64) * um_per_unit
    known = {"um_px": side_um / side_px, "tile_px": side_px, "coords_from": "STAMP counts µm"}
    return placed_level(path, values, um, side_px, side_um, **known)


def _stamp_sides(file: Any, path: Path) -> tuple[float, float, float]:
    """Return the side of a tile in µm and in px, and the µm that one unit of the coordinates has."""
    key = next((key for key in ("tile_size_um", "tile_size") if key in file.attrs), None)
    if key is not None:
        side_px = number(file, path, "tile_size_px") if "tile_size_px" in file.attrs else STAMP_PX
        return number(file, path, key), side_px, 1.0
    stride = _stride(path, dataset(file, path, "coords")[:])
    if round(stride) != HISTORIC_STAMP_STRIDE:
        raise LayoutError(
            f"{path}: has no attribute tile_size_um or tile_size, and its tiles are {stride:g} apart.",
            f"Expected STAMP's attributes, or tiles {HISTORIC_STAMP_STRIDE} apart, as its first version wrote.",
        )
    return STAMP_UM, float(HISTORIC_STAMP_STRIDE), STAMP_UM / HISTORIC_STAMP_STRIDE

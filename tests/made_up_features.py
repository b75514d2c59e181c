"""Writes feature files of other programs, from the description of their layouts."""

from pathlib import Path

import h5py
import numpy as np
import torch

DIM = 6
SIDES = {"x20": 512, "x10": 1024, "x5": 2048}
"""Tiles of a 40x slide in level-0 px."""


def grid(side: int, columns: int, rows: int, origin=(0, 0)) -> np.ndarray:
    return np.array([(origin[0] + c * side, origin[1] + r * side) for r in range(rows) for c in range(columns)])


def features(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def write_published(root: Path, slides=("a", "b")) -> None:
    for name, count in (("x20", 16), ("x10", 4), ("x5", 1)):
        folder = root / "resnet50" / name / "pt_files"
        folder.mkdir(parents=True)
        for number, slide in enumerate(slides):
            torch.save(torch.from_numpy(features(count, number)), folder / f"{slide}.pt")


def write_plain(path: Path, values: np.ndarray) -> None:
    """Write features, and nothing else, in the format that the suffix names."""
    if path.suffix == ".pt":
        torch.save(torch.from_numpy(values), path)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["features"] = values
    else:
        {".npy": np.save, ".npz": np.savez}[path.suffix](path, values)


def write_clam(root: Path, slides=("a",), aligned: bool = False, coords_in_features: bool = True) -> None:
    for number, (name, columns, rows) in enumerate((("x20", 8, 8), ("x10", 4, 4), ("x5", 2, 2))):
        run = root / name
        for sub in ("patches", "h5_files", "pt_files"):
            (run / sub).mkdir(parents=True)
        level, downsample = (0, 1.0) if name == "x20" else (1, 4.0)
        coords = grid(SIDES[name], columns, rows, (0, 0) if aligned else (300 * number, 11 * number))
        for slide in slides:
            with h5py.File(run / "patches" / f"{slide}.h5", "w") as file:
                dataset = file.create_dataset("coords", data=coords)
                dataset.attrs["patch_size"] = SIDES[name] / downsample
                dataset.attrs["patch_level"] = level
                dataset.attrs["downsample"] = (downsample, downsample)
                dataset.attrs["level_dim"] = (4096, 4096)
            with h5py.File(run / "h5_files" / f"{slide}.h5", "w") as file:
                file["features"] = features(len(coords))
                if coords_in_features:
                    file["coords"] = coords
            torch.save(torch.from_numpy(features(len(coords))), run / "pt_files" / f"{slide}.pt")


def write_trident(root: Path, slides=("a",), overlap: int = 0, attrs_in_features: bool = True) -> None:
    for name, columns, rows in (("x20", 8, 8), ("x10", 4, 4), ("x5", 2, 2)):
        folder = root / f"{name[1:]}x_256px_{overlap}px_overlap"
        (folder / "patches").mkdir(parents=True)
        (folder / "features_uni_v1").mkdir()
        coords = grid(SIDES[name], columns, rows).astype(np.int64)
        attrs = {
            "patch_size": 256, "patch_size_level0": SIDES[name], "level0_magnification": 40,
            "target_magnification": int(name[1:]), "overlap": overlap, "savetodir": "None",
        }  # fmt: skip
        for slide in slides:
            with h5py.File(folder / "patches" / f"{slide}_patches.h5", "w") as file:
                file.create_dataset("coords", data=coords).attrs.update(attrs)
            with h5py.File(folder / "features_uni_v1" / f"{slide}.h5", "w") as file:
                file.create_dataset("features", data=features(len(coords))).attrs["encoder"] = "uni_v1"
                dataset = file.create_dataset("coords", data=coords)
                if attrs_in_features:
                    dataset.attrs.update(attrs)


def write_stamp(root: Path, slides=("a",)) -> None:
    for slide in slides:
        with h5py.File(root / f"{slide}.h5", "w") as file:
            file["coords"] = (grid(256, 3, 3)).astype(np.float32)
            file["feats"] = features(9).astype(np.float16)
            file.attrs.update({"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "extractor": "virchow2"})


def write_flat(path: Path, count: int = 9, dtype=np.float32, leading: bool = False, encoder=None, **attrs) -> None:
    """Write a file as in a flat tree of TRIDENT's, such as `TCGA-BLCA/NAME.UUID.h5`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values, places = features(count).astype(dtype), grid(512, 3, count // 3).astype(np.int64)
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("features", data=values[None] if leading else values)
        if encoder:
            stored.attrs["encoder"] = encoder
        file.create_dataset("coords", data=places[None] if leading else places).attrs.update(attrs)


KNOWN = {"patch_size": 256, "patch_size_level0": 512, "target_magnification": 20, "overlap": 0}


def replace(name: str, value):
    def change(file) -> None:
        attrs = dict(file[name].attrs)
        del file[name]
        (file.create_group(name) if value is None else file.create_dataset(name, data=value)).attrs.update(attrs)

    return change


def set_attribute(key: str, value):
    return lambda file: file["coords"].attrs.__setitem__(key, value)

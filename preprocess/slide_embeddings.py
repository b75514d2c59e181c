"""Embeddings of entire slides, made by slide encoders: one vector per slide, imported as a bag of one tile."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cfusion.errors import LayoutError
from cfusion.types import SLIDE
from preprocess.feature_files import Level, dataset, loaded_pt, opened, read_array
from preprocess.layouts import FeatureFile, Found, SourceFolder, slide_name

FOLDER = "slide_features_"
"""TRIDENT's folders are named `slide_features_ENCODER`."""

CHIEF_FOLDER = "WSI_level_feature"
"""CHIEF's program writes `WSI_level_feature/DATASET/SLIDE.pt`."""

OUTPUTS = ("last_layer_embed", "image_embedding", "WSI_feature")
"""Keys under which Prov-GigaPath, PRISM and CHIEF return the embedding of a slide, if all outputs were saved."""

NAMES = {"gigapath": "gigapath-slide"}
"""Our name of a slide encoder by TRIDENT's, where that is also the name of a tile encoder."""


def find_slide_embeddings(source: SourceFolder) -> Found:
    """One vector per slide: TITAN, PRISM, CHIEF, Prov-GigaPath or FEATHER, as TRIDENT and their programs write them.

    `slide_features_{encoder}/{slide}.h5` (TRIDENT), the same with `.pt`, `.npy` or `.npz` files, and CHIEF's
    `WSI_level_feature/{dataset}/{slide}.pt`. TITAN's published tables are pickles, which are not opened.
    """
    found = Found()
    for path in source.files(".h5", ".pt", ".npy", ".npz", ".pkl"):
        folder = path.absolute().parent
        if folder.name.startswith(FOLDER):
            named = folder.name.removeprefix(FOLDER)
            encoder = NAMES.get(named, named)
        elif CHIEF_FOLDER in (folder.name, folder.parent.name) and path.suffix.lower() == ".pt":
            encoder = "chief"
        elif path.suffix.lower() == ".pkl" and "titan" in path.name.lower():
            why = "a pickled table, which could run code, so it is not opened; save its vectors as SLIDE.npy"
            found.refused.append((slide_name(path), path, f"{why} in {FOLDER}titan/"))
            continue
        else:
            continue
        found.files.append(FeatureFile(slide_name(path), SLIDE, encoder, partial(_one_vector, path), (path,)))
    return found if found.files else Found()


def _one_vector(path: Path) -> Level:
    if path.suffix.lower() == ".h5":
        with opened(path) as file:
            values = dataset(file, path, "features")[:]
    elif path.suffix.lower() == ".pt":
        values = _tensor(path)
    else:
        values = read_array(path)
    vector = np.squeeze(values)
    if vector.ndim != 1 or vector.dtype.kind != "f":
        raise LayoutError(
            f"{path}: contains {values.dtype} {list(values.shape)}, expected one vector [d] of floats.",
            "Features of tiles belong into a layout of tiles, such as TRIDENT's.",
        )
    return Level(vector[None].astype(np.float32))


def _tensor(path: Path) -> np.ndarray:
    loaded = loaded_pt(path, "Save it again with torch.save(torch.as_tensor(vector), path).")
    if isinstance(loaded, Mapping):
        keys = [key for key in OUTPUTS if key in loaded]
        if len(keys) != 1:
            raise LayoutError(f"{path}: has the keys {', '.join(map(str, loaded))}, expected one of {OUTPUTS}.")
        loaded = loaded[keys[0]]
    if not isinstance(loaded, torch.Tensor):
        raise LayoutError(f"{path}: contains {type(loaded).__name__}, expected a tensor.")
    return loaded.detach().float().numpy()

"""A store as a table, a slide as a picture, and bytes that are no longer what was written."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cfusion.data.store import write_slide
from cfusion.errors import ConfigError, DataError
from cfusion.types import SlideFeatures
from preprocess.inspection import draw_slide, list_store, verify_store


def stored(slide_id: str, cells: int = 4) -> SlideFeatures:
    rng = np.random.default_rng(0)
    counts = {"x20": 16 * cells, "x10": 4 * cells, "x5": cells}
    sides = {"x20": 256, "x10": 512, "x5": 1024}
    coords = {n: np.array([(sides[n] * (i % 4), sides[n] * (i // 4)) for i in range(c)]) for n, c in counts.items()}
    return SlideFeatures(
        slide_id,
        {n: rng.standard_normal((c, 5)).astype(np.float16) for n, c in counts.items()},
        {n: c.astype(np.int32) for n, c in coords.items()},
        {n: (np.arange(counts[n]) // 4).astype(np.int32) for n in ("x20", "x10")},
        {"encoder": "e", "mpp": 0.25, "mpp_source": "mpp", "tile_px_level0": sides, "unreadable_cells": [[0, 1]]},
    )


def test_a_store_as_a_table(tmp_path: Path):
    write_slide(tmp_path, stored("b", 1))
    write_slide(tmp_path, stored("a"))
    rows = list_store(tmp_path)
    assert [(r.slide_id, r.tiles, r.dim, r.mpp, r.unreadable) for r in rows] == [
        ("a", {"x20": 64, "x10": 16, "x5": 4}, 5, "0.25 (mpp)", 1),
        ("b", {"x20": 16, "x10": 4, "x5": 1}, 5, "0.25 (mpp)", 1),
    ]
    with pytest.raises(DataError, match="holds no features of the encoder 'f'"):
        list_store(tmp_path, "f")


def test_changed_bytes_and_lost_arrays_are_found(tmp_path: Path):
    for name in ("good", "changed", "lost", "short"):
        write_slide(tmp_path, stored(name))
    assert verify_store(tmp_path) == {}
    chunk = tmp_path / "e/changed.zarr/x20/features/c/0/0"
    data = bytearray(chunk.read_bytes())
    data[10] ^= 1
    chunk.write_bytes(data)
    (tmp_path / "e/lost.zarr/x10/features/c/0/0").unlink()
    (tmp_path / "e/short.zarr/x5/features/c/0/0").write_bytes(b"\0\0")
    wrong = verify_store(tmp_path)
    assert set(wrong) == {"e/changed", "e/lost", "e/short"}
    assert "x20/features differs from its digest" in wrong["e/changed"]
    assert "x10/features differs from its digest" in wrong["e/lost"]


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\0\0"], ids=["lost", "empty", "other", "zeros"])
def test_a_damaged_group_is_named(tmp_path: Path, content: bytes | None):
    write_slide(tmp_path, stored("a"))
    described = tmp_path / "e/a.zarr/x10/features/zarr.json"
    described.unlink() if content is None else described.write_bytes(content)
    with pytest.raises(DataError, match=r"a.zarr: cannot be read .*Delete it and extract"):
        list_store(tmp_path)
    assert set(verify_store(tmp_path)) == {"e/a"}


@pytest.mark.parametrize("cells", [1, 4])
def test_a_slide_as_a_picture(tmp_path: Path, cells: int):
    draw_slide(stored("a", cells), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 2 * picture.height
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 3 * cells


def test_a_slide_without_places_cannot_be_drawn(tmp_path: Path):
    slide = stored("a")
    slide.coords.clear()
    with pytest.raises(DataError, match="has no coordinates"):
        draw_slide(slide, tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"a.foo: pictures cannot be written as foo. Supported: .*png"):
        draw_slide(stored("a"), tmp_path / "a.foo")
    assert not list(tmp_path.iterdir())

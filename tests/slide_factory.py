"""Real slides for tests: tiled TIFFs, some as Aperio writes them, with the faults that hospitals' slides have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

GLASS = (243, 242, 244)


def tissue_picture(width: int, height: int, seed: int = 0, share: float = 0.7) -> np.ndarray:
    """Pink and violet texture on glass, u8 [h, w, 3]; a disk in the middle of about `share` of the shorter side."""
    rng = np.random.default_rng(seed)
    texture = np.kron(rng.integers(0, 72, (height // 8 + 1, width // 8 + 1), np.uint8), np.ones((8, 8), np.uint8))
    texture = texture[:height, :width]
    tissue = np.stack([205 - texture, 120 - texture, 175 - texture // 2], axis=2)
    y, x = np.ogrid[:height, :width]
    radius = share * min(width, height) / 2
    inside = (x - width / 2) ** 2 + (y - height / 2) ** 2 < radius**2
    tissue[~inside] = GLASS
    return tissue


def write_slide(
    path: Path,
    picture: np.ndarray,
    *,
    mpp: float | None = 0.5,
    power: float | None = None,
    level_sizes: tuple[tuple[int, int], ...] = (),
    tile: int = 256,
    compression: str = "jpeg",
    aperio: bool = True,
) -> Path:
    """Write a picture as a tiled TIFF of the Aperio kind.

    Args:
        path: File to write.
        picture: u8 [h, w, 3].
        mpp: µm/px in the description; None: not given.
        power: Objective power in the description; None: not given.
        level_sizes: Width and height of further levels; pixels are taken by nearest neighbour.
        tile: Side of a tile.
        compression: jpeg or jpeg2000 as tifffile names them.
        aperio: Whether the description names Aperio; otherwise the file is a plain pyramid without a vendor.
    """
    made_by = "Aperio Image Library v1" if aperio else "a pyramid"
    resolution = "".join(f"|{k} = {v:g}" for k, v in (("AppMag", power), ("MPP", mpp)) if v is not None)
    height, width = picture.shape[:2]
    options = {"photometric": "rgb", "tile": (tile, tile), "compression": compression, "metadata": None}
    if compression == "jpeg":
        options["compressionargs"] = {"level": 90, "outcolorspace": "rgb"}
    path.parent.mkdir(exist_ok=True)
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(picture, description=f"{made_by}\n{width}x{height} ({tile}x{tile}) JPEG/RGB{resolution}", **options)
        for w, h in level_sizes:
            rows, columns = (np.arange(n) * full // n for n, full in ((h, height), (w, width)))
            tiff.write(
                np.ascontiguousarray(picture[rows][:, columns]),
                description=f"{made_by}\n{width}x{height} -> {w}x{h} JPEG/RGB", subfiletype=1, **options,
            )  # fmt: skip
    return path


def tile_bytes(path: Path, level: int = 0) -> list[tuple[int, int]]:
    """Offset and length of each tile of a level."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[level]
        return list(zip(page.dataoffsets, page.databytecounts, strict=True))


def drop_tile(path: Path, number: int, level: int = 0) -> None:
    """Make one tile one that was never written: its length is 0."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages[level].tags["TileByteCounts"]
        tag.overwrite([0 if i == number else count for i, count in enumerate(tag.value)])


def break_tile(path: Path, number: int, level: int = 0) -> None:
    """Overwrite one tile's data with zeros."""
    offset, length = tile_bytes(path, level)[number]
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(bytes(length))

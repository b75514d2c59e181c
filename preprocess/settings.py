"""Settings for extracting slides into a feature store: defaults and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cfusion.config import Section
from cfusion.machine_limits import usable_cores

MIN_PIECE_UM2 = 20_000.0
"""A little more than one 20x tile, so that a needle biopsy fragment stays."""


def _is_a_batch(size: int | Literal["auto"]) -> int | Literal["auto"]:
    if size != "auto" and size < 1:
        raise ValueError("expected a number of tiles from 1, or auto")
    return size


class PreprocessConfig(Section):
    """Settings for extracting slides into a feature store."""

    slides: Path = Path("slides")
    """Folder to search for slides, or one slide."""
    store: Path = Path("features")
    """Feature store to write."""
    encoders: tuple[str, ...] = ("stain-texture",)
    """Encoders to run on each decoded cell."""
    magnifications: tuple[float, ...] = (20.0, 10.0, 5.0)
    """Magnifications of the tiles, finest first, each half the one before."""
    resolution: Literal["nominal", "exact"] = "nominal"
    """`nominal` maps a slide to 80x, 60x, 40x, 20x, 10x or 5x as TRIDENT; `exact` resamples to the true µm/px."""
    default_mpp: float | None = Field(None, gt=0)
    """µm/px of slides whose files have no resolution."""
    mpp_table: Path | None = None
    """CSV `slide_id, mpp` of resolutions, which win over what the files state."""
    resample: Literal["area", "bicubic"] = "area"
    """Filter of the coarser magnifications."""
    min_tissue: float = Field(0.25, gt=0, le=1)
    """Minimum share of a finest tile's area that must be tissue."""
    min_piece_um2: float = Field(MIN_PIECE_UM2, ge=0)
    """Area of the smallest piece of tissue in µm²; smaller ones are dirt, or clusters of cells in cytology."""
    artefacts: bool = False
    """Leave folds and blurred areas out of the tissue; calibrated on synthetic artefacts only."""
    masks: Path | None = None
    """Folder of tissue masks (`SLIDE_ID.png`) or GeoJSON (`SLIDE_ID.geojson`, level-0 px); they override the method."""
    sheets: bool = True
    """Write each slide's tissue mask, its contours as GeoJSON and a review sheet."""
    batch_size: Annotated[int | Literal["auto"], AfterValidator(_is_a_batch)] = 64
    """Tiles per encoder batch, across slides. `auto`: on a GPU, as many as fit its free memory, by measuring two small
    batches of each encoder, at most 1,024; 64 on a CPU. Not measured on a GPU yet."""
    upload_ahead: bool = False
    """Upload and transform a batch while a GPU's network runs on another, through pinned memory; two batches are then
    on each GPU. The features are the same; off, since it has not been measured on a GPU."""
    weights: Path | None = None
    """Folder of encoder checkpoints, `ENCODER.safetensors` or `.pth`, or one of them; none: the hub, or its cache."""
    offline: bool = False
    """Never use the network for weights."""
    precision: Literal["card", "f32", "bf16", "f16"] = "card"
    """Arithmetic of the encoders; `card`: as in the model card, f32 on a CPU. On a GPU, f32 is single precision."""
    tf32: bool = False
    """On a GPU, let encoders in f32 round the inputs of products and convolutions to TF32. Each is run on synthetic
    tiles in both ways first; TF32 is used only if the cosine of each pair of embeddings is at least 0.9999 for all
    encoders. The features record it. Off, since it has not been measured on a GPU."""
    devices: tuple[str, ...] = ()
    """Devices that encode, each with its own encoders, such as `cuda:0`; none: all GPUs, or else the CPU."""
    threads: int = Field(default_factory=usable_cores, ge=1)
    """Reading threads; default: one per core that this process may use."""

"""Settings of the way from slides to a feature store: their defaults and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from cfusion.config import Section


def _cores() -> int:
    """Cores that this process may use: affinity and the limits of a container count."""
    from joblib import cpu_count

    return int(cpu_count())


class PreprocessConfig(Section):
    """From slides to a feature store."""

    slides: Path = Path("slides")
    """Folder that is searched for slides, or one slide."""
    store: Path = Path("features")
    """Feature store to write."""
    encoders: tuple[str, ...] = ("stain-texture",)
    """Encoders to run on each decoded cell."""
    magnifications: tuple[float, ...] = (20.0, 10.0, 5.0)
    """Magnifications of the tiles, finest first, each half the one before."""
    resolution: Literal["nominal", "exact"] = "nominal"
    """`nominal` buckets a slide to 40x/20x/10x, as published features do; `exact` resamples to the true µm/px."""
    default_mpp: float | None = Field(None, gt=0)
    """µm/px of slides whose files do not tell."""
    mpp_table: Path | None = None
    """CSV `slide_id, mpp` that supplies resolutions."""
    resample: Literal["area", "bicubic"] = "area"
    """Filter of the coarser magnifications."""
    min_tissue: float = Field(0.25, gt=0, le=1)
    """Share of a finest tile's area that must be tissue."""
    masks: Path | None = None
    """Folder of tissue masks (`SLIDE_ID.png`) or GeoJSON (`SLIDE_ID.geojson`, level-0 px); they win over the method."""
    sheets: bool = True
    """Write each slide's tissue mask, its contours as GeoJSON and a sheet to look at."""
    batch_size: int = Field(64, ge=1)
    """Tiles that an encoder takes at once, over slides."""
    weights: Path | None = None
    """Folder of encoder checkpoints, `ENCODER.safetensors` or `.pth`, or one of them; none: the hub, or its cache."""
    offline: bool = False
    """Never ask the network for weights."""
    precision: Literal["card", "f32", "bf16", "f16"] = "card"
    """Arithmetic of the encoders; `card`: what the model card runs it in, on a CPU f32."""
    devices: tuple[str, ...] = ()
    """Devices that encode, each with its own encoders, such as `cuda:0`; none: all GPUs, or else the CPU."""
    threads: int = Field(default_factory=_cores, ge=1)
    """Reading threads; by default one for each core that this process may use."""

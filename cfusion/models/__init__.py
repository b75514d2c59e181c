"""CrossFusion, its variants and the baselines."""

from cfusion.models.attribution import (
    AttentionMap,
    attention_maps,
    input_times_gradient,
    tile_attention,
    visit_attention,
)
from cfusion.models.published import load_published_weights, published_state_dict
from cfusion.models.registry import MODELS, build_model

__all__ = [
    "MODELS", "AttentionMap", "attention_maps", "build_model", "input_times_gradient", "load_published_weights",
    "published_state_dict", "tile_attention", "visit_attention",
]  # fmt: skip

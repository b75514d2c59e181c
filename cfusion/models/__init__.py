"""CrossFusion, its variants and the baselines."""

from cfusion.models.published import load_published_weights, published_state_dict
from cfusion.models.registry import MODELS, build_model

__all__ = ["MODELS", "build_model", "load_published_weights", "published_state_dict"]

"""The published recipe trains the published model."""

import cfusion
from cfusion.config import Config, ModelConfig
from cfusion.models import build_model


def test_the_published_recipe_has_the_published_dropouts():
    for model in ({"name": "crossfusion", "options": {"dropout": 0.1}}, ModelConfig(options={"dropout": 0.1})):
        config = Config.model_validate({"train": {"recipe": "published"}, "model": model})
        assert config.model.options == {"published": True, "dropout": 0.1}
        built = build_model(config.model.name, backbone_dim=12, embed_dim=16, num_heads=2, **config.model.options)
        assert built.final.pre[0].attention.dropout == 0.2
    assert cfusion.load_config(None, ["train.recipe=published"]).model.options == {"published": True}
    assert cfusion.load_config(None, []).model.options == {}

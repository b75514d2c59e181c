"""Encoders of installed packages."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from slide_factory import tissue_picture, write_slide

from cfusion.data.store import FeatureStore
from cfusion.errors import ConfigError
from preprocess.encoders import encoder_names, load_encoder
from preprocess.extraction import preprocess_slides
from preprocess.settings import PreprocessConfig

SOURCE = """import numpy as np


class MeanColour:
    dim = 3

    def __init__(self, config, device):
        self.identity = {"weights": "none", "transform": "none", "precision": "f32"}

    def encode(self, tiles):
        return tiles.mean(axis=(1, 2)).astype(np.float32)
"""


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "site"
    info = folder / "mean_colour-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mean-colour\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[cfusion.encoders]\nmean-colour = mean_colour_encoder:MeanColour\n")
    (folder / "mean_colour_encoder.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("mean_colour_encoder", None)


def test_it_embeds_slides_and_the_store_names_its_package(site, tmp_path):
    slide = write_slide(tmp_path / "a.svs", tissue_picture(700, 600))
    config = PreprocessConfig(slides=slide, store=tmp_path / "store", encoders=("mean-colour",), devices=("cpu",))
    assert encoder_names()[-1] == "mean-colour"
    assert [o.status for o in preprocess_slides(config).outcomes] == ["done"]
    read = FeatureStore.open(tmp_path / "store", "mean-colour").read("a")
    assert read.features["x20"].shape == (len(read.coords["x20"]), 3)
    assert read.attrs["version"] == "mean-colour 0.3"
    assert read.attrs["code_sha256"] == hashlib.sha256(SOURCE.encode()).hexdigest()
    tiles = np.zeros((4, 256, 256, 3), np.uint8)
    assert load_encoder("mean-colour", config).encode(tiles).shape == (4, 3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def encode", "deff encode", r"mean_colour_encoder.py:10: does not import \(SyntaxError"),
        ("class MeanColour", "class Mean", r"defines no MeanColour"),
        ("self.identity", "self.card", r"the factory failed \(AttributeError"),
        ('"weights": "none", ', "", "its identity has no text for weights"),
        ("np.float32", "np.float64", r"returned float64 \[2, 3\]; expected float32 \[2, 3\]"),
        ("dim = 3", "dim = 4", r"returned float32 \[2, 3\]; expected float32 \[2, 4\]"),
        ("tiles.mean(axis=(1, 2))", "np.full((len(tiles), 3), np.nan)", "returned values that are not finite"),
        (
            "tiles.mean(axis=(1, 2))",
            "tiles.average()",
            r"encoder.py:11: failed on two synthetic tiles \(AttributeError",
        ),
    ],
)
def test_what_it_does_wrong_is_said_before_a_slide_is_read(site, old, new, message):
    assert old in SOURCE
    (site / "mean_colour_encoder.py").write_text(SOURCE.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_encoder("mean-colour", PreprocessConfig())


def test_a_name_that_no_package_offers(site):
    with pytest.raises(ConfigError, match=r"encoder 'mean' is unknown. Known: stain-texture, .*, mean-colour; or"):
        load_encoder("mean", PreprocessConfig())

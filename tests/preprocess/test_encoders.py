"""Published encoders: true architectures, widths, transforms, weights under their published names, honest refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from slide_factory import tissue_picture, write_slide

from cfusion.config import PreprocessConfig
from cfusion.data.store import FeatureStore
from cfusion.errors import ConfigError, DataError, MissingExtraError
from preprocess.encoders import encoder_names, load_encoder, load_slots, networks
from preprocess.encoders.cards import CARDS
from preprocess.encoders.networks import AttentionPooled, NetworkEncoder, build_network, card_of
from preprocess.encoders.weights import find_weights, read_weights, to_network_names
from preprocess.extraction import preprocess_slides

PUBLISHED_WIDTHS = {
    "resnet50": 1024, "resnet50-2048": 2048, "uni": 1024, "uni2-h": 1536, "conch": 512, "conch-v1.5": 768,
    "quiltnet": 512, "prov-gigapath": 1536, "virchow": 2560, "virchow2": 2560, "h-optimus-0": 1536,
    "h-optimus-1": 1536, "phikon-v2": 1024, "hibou-b": 768, "hibou-l": 1024,
}  # fmt: skip
"""Widths as the model cards print them."""

PUBLISHED_MILLIONS = {
    "uni": 303, "uni2-h": 681, "prov-gigapath": 1135, "virchow": 631, "virchow2": 631, "h-optimus-0": 1135,
    "phikon-v2": 303, "hibou-b": 86, "hibou-l": 303, "conch": 88,
}  # fmt: skip
"""Parameters as the model cards or papers print them, in millions; of CONCH the image tower without its captioner."""


@pytest.fixture(scope="session")
def timm():
    try:
        return networks.import_timm()
    except MissingExtraError as error:
        pytest.skip(str(error))


def on_meta(name: str) -> NetworkEncoder:
    """An encoder whose network has shapes but no memory."""
    with torch.device("meta"):
        network = build_network(CARDS[name])
    return NetworkEncoder(name, CARDS[name], network, "", "meta", "f32")


def test_every_encoder_of_the_list_is_there():
    assert set(encoder_names()) == {"stain-texture", *PUBLISHED_WIDTHS}
    assert {name: card.dim for name, card in CARDS.items()} == PUBLISHED_WIDTHS
    assert all(card.source.startswith("https://huggingface.co/") and card.licence for card in CARDS.values())


@pytest.mark.parametrize("name", PUBLISHED_WIDTHS)
def test_true_architectures_have_the_published_width(timm, name: str):
    encoder = on_meta(name)
    card = CARDS[name]
    tiles = torch.empty((2, 3, 256, 256), dtype=torch.uint8, device="meta")
    seen = encoder.transformed(tiles)
    assert seen.shape == (2, 3, card.image_px, card.image_px)
    assert encoder.pooled(seen).shape == (2, PUBLISHED_WIDTHS[name])
    if name in PUBLISHED_MILLIONS:
        count = sum(p.numel() for p in encoder._network.parameters()) / 1e6
        assert count == pytest.approx(PUBLISHED_MILLIONS[name], rel=0.01)


@pytest.mark.parametrize("name", ["uni", "conch", "prov-gigapath", "h-optimus-0", "quiltnet"])
def test_transforms_are_those_of_pil(name: str):
    card = CARDS[name]
    encoder = NetworkEncoder(name, card, torch.nn.Identity(), "", "cpu", "f32")
    tile = tissue_picture(256, 256, share=2.0)
    mean, std = (np.array(v) for v in card.colours)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    image = Image.fromarray(tile).resize((card.resize_px, card.resize_px), filters[card.filter])
    margin = (card.resize_px - card.image_px) // 2
    expected = np.asarray(image.crop((margin, margin, margin + card.image_px, margin + card.image_px))) / 255.0
    found = encoder.transformed(torch.from_numpy(tile)[None].permute(0, 3, 1, 2))[0].permute(1, 2, 0).numpy()
    # PIL's weights have 8 binary places: one grey level.
    assert np.abs((found * std + mean - expected) * 255).max() <= 1.01


def test_token_and_mean_pooling_leaves_the_registers_out():
    encoder = NetworkEncoder("virchow2", CARDS["virchow2"], torch.nn.Identity(), "", "cpu", "f32")
    tokens = torch.zeros(1, 5 + 256, 1280)
    tokens[:, 0], tokens[:, 1:5], tokens[:, 5:] = 1, 100, 2
    assert encoder.pooled(tokens).tolist() == [[1.0] * 1280 + [2.0] * 1280]


def tiny_dinov2(registers: int):
    """A small DINOv2 of Hugging Face's, and the same network in timm, with the names of the former's weights."""
    transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    shape = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        "mlp_ratio": 4, "layerscale_value": 0.5,
    }  # fmt: skip
    torch.manual_seed(0)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**shape, num_register_tokens=registers)
        return transformers.Dinov2WithRegistersModel(config).eval()
    return transformers.Dinov2Model(transformers.Dinov2Config(**shape)).eval()


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_weights_give_the_same_embeddings_under_our_names(timm, tmp_path: Path, registers: int):
    reference = tiny_dinov2(registers)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    options = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1.0}
    if registers:
        options |= {"reg_tokens": registers, "no_embed_class": True}
    ours = timm.models.vision_transformer.VisionTransformer(num_classes=0, **options).eval()
    reference.save_pretrained(tmp_path)
    weights = to_network_names(read_weights(tmp_path / "model.safetensors"), "dinov2")
    assert set(ours.state_dict()) <= set(weights)
    ours.load_state_dict(weights, strict=False)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = reference(pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(ours(pixels), expected, atol=1e-5, rtol=1e-4)


def test_weights_that_lack_entries_are_refused(timm, tmp_path: Path):
    card = card_of("timm:vit_tiny_patch16_224")
    network = build_network(card)
    weights = dict(network.state_dict())
    weights.pop("blocks.3.attn.qkv.weight")
    weights["norm.weight"] = torch.zeros(5)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"w.safetensors: is no checkpoint .* it has no blocks.3.attn.qkv.weight .1 w"):
        networks.load_weights(network, card, tmp_path / "w.safetensors")


def test_one_small_vit_end_to_end(timm, tmp_path: Path):
    name = "timm:vit_tiny_patch16_224"
    torch.manual_seed(0)
    network = build_network(card_of(name))
    save_file(network.state_dict(), tmp_path / "timm_vit_tiny_patch16_224.safetensors")
    slide = write_slide(tmp_path / "a.svs", tissue_picture(700, 600))
    config = PreprocessConfig(
        slides=slide, store=tmp_path / "store", encoders=("stain-texture", name), weights=tmp_path, offline=True,
        batch_size=5, devices=("cpu",),
    )  # fmt: skip
    assert [o.status for o in preprocess_slides(config).outcomes] == ["done"]
    store = FeatureStore.open(tmp_path / "store", "timm_vit_tiny_patch16_224")
    read = store.read("a")
    assert read.features["x20"].shape == (len(read.coords["x20"]), 192)
    assert read.attrs["precision"] == "f32"
    assert len(read.attrs["weights"]) == 64
    both = FeatureStore.open(tmp_path / "store", "stain-texture").read("a")
    np.testing.assert_array_equal(both.coords["x20"], read.coords["x20"])
    # The embeddings are those of the network on the tiles, batches apart.
    encoder = load_encoder(name, config)
    tiles = np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)
    together = encoder.encode(tiles, 0.5)
    alone = np.concatenate([encoder.encode(tile[None], 0.5) for tile in tiles])
    np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "f32"])
def test_precision_is_taken_and_told(timm, tmp_path: Path, precision: str):
    network = build_network(card_of("timm:vit_tiny_patch16_224"))
    save_file(network.state_dict(), tmp_path / "timm_vit_tiny_patch16_224.safetensors")
    config = PreprocessConfig(weights=tmp_path, precision=precision)
    encoder = load_encoder("timm:vit_tiny_patch16_224", config)
    found = encoder.encode(np.zeros((1, 256, 256, 3), np.uint8), 0.5)
    assert found.dtype == np.float32
    assert encoder.identity["precision"] == precision


def test_attention_pooling_is_that_of_one_query():
    class Trunk(torch.nn.Module):
        num_features = 16

        def forward_features(self, pixels):
            return pixels

    torch.manual_seed(0)
    pool = AttentionPooled(Trunk(), 8, heads=2).eval()
    torch.nn.init.normal_(pool.query)
    tokens = torch.randn(3, 10, 16)
    shuffled = pool(tokens[:, torch.randperm(10)])
    torch.testing.assert_close(pool(tokens), shuffled)
    assert pool(tokens).shape == (3, 8)
    published = ("attn_pool_contrast.query", "ln_contrast.weight", "trunk.norm.bias")
    names = set(to_network_names({f"visual.{name}": torch.zeros(1) for name in published}, "conch"))
    assert names == {"query", "ln_out.weight", "trunk.norm.bias"}
    assert {"query", "ln_out.weight"} <= set(pool.state_dict())


def test_names_that_are_not_known_offer_those_that_are():
    with pytest.raises(ConfigError, match=r"encoder 'uni3' is not known. Known: stain-texture, .*timm:NAME"):
        load_encoder("uni3", PreprocessConfig())
    with pytest.raises(ConfigError, match="expected one or more different names"):
        load_slots(PreprocessConfig(encoders=("stain-texture", "stain-texture")))


def test_a_name_timm_does_not_know(timm):
    with pytest.raises(ConfigError, match=r"encoder 'timm:no_such_net': timm cannot build it"):
        card_of("timm:no_such_net")


def test_weights_that_are_not_here_tell_licence_gate_and_remedy(tmp_path: Path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(
        DataError, match=r"uni: its weights are not in the hub's cache .licence: CC-BY-NC-ND-4.0"
    ) as told:
        find_weights("uni", CARDS["uni"], tmp_path, offline=True)
    assert "https://huggingface.co/MahmoodLab/UNI" in told.value.remedy
    assert f"{tmp_path}/uni.bin" in told.value.remedy


def test_timm_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(networks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"timm, which is not installed. Install .*cfusion\[encoders\]"):
        networks.import_timm()


def test_nothing_but_tensors_is_unpickled(tmp_path: Path):
    torch.save({"state_dict": {"module.a": torch.ones(2)}}, tmp_path / "good.pth")
    assert set(read_weights(tmp_path / "good.pth")) == {"a"}
    torch.save({"a": Path("/")}, tmp_path / "code.pth")
    with pytest.raises(DataError, match=r"code.pth: is no readable checkpoint"):
        read_weights(tmp_path / "code.pth")
    torch.save({"a": 3}, tmp_path / "number.pth")
    with pytest.raises(DataError, match="holds something other than named tensors"):
        read_weights(tmp_path / "number.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="is no readable checkpoint"):
        read_weights(tmp_path / "broken.safetensors")

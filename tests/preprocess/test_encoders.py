"""Published encoders: true architectures, widths, transforms, weights under their published names, honest refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from slide_factory import tissue_picture, write_slide

from cfusion.data.store import FeatureStore
from cfusion.errors import ConfigError, DataError, MissingExtraError
from cfusion.files import write_json
from preprocess.encoders import encoder_names, load_encoder, load_slots, networks
from preprocess.encoders.cards import CARDS
from preprocess.encoders.networks import AttentionPooled, NetworkEncoder, build_network, card_of
from preprocess.encoders.weights import find_weights, read_weights, to_network_names
from preprocess.extraction import preprocess_slides
from preprocess.settings import PreprocessConfig

PUBLISHED_WIDTHS = {
    "resnet50": 1024, "resnet50-2048": 2048, "uni": 1024, "uni2-h": 1536, "conch": 512, "conch-v1.5": 768,
    "quiltnet": 512, "prov-gigapath": 1536, "virchow": 2560, "virchow2": 2560, "h-optimus-0": 1536,
    "h-optimus-1": 1536, "phikon-v2": 1024, "hibou-b": 768, "hibou-l": 1024, "h0-mini": 768, "midnight": 3072,
    "genbio-pathfm": 4608, "musk": 1024, "keep": 768, "gpfm": 1024, "efficientnet-lite0": 1280,
}  # fmt: skip
"""Widths as the model cards print them."""

PUBLISHED_MILLIONS = {
    "uni": 303, "uni2-h": 681, "prov-gigapath": 1135, "virchow": 631, "virchow2": 631, "h-optimus-0": 1135,
    "phikon-v2": 303, "hibou-b": 86, "hibou-l": 303, "conch": 88,
    "h0-mini": 86, "midnight": 1136, "genbio-pathfm": 1134, "musk": 303, "keep": 305,
    "gpfm": 304, "efficientnet-lite0": 3.37,
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


def test_every_listed_encoder_is_known():
    assert set(encoder_names()) == {"stain-texture", *PUBLISHED_WIDTHS}
    assert {name: card.dim for name, card in CARDS.items()} == PUBLISHED_WIDTHS
    assert all(
        card.source.startswith(("https://huggingface.co/", "https://pypi.org/")) and card.licence
        for card in CARDS.values()
    )


@pytest.mark.slow
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


PUBLISHED_COLOURS = {
    "conch": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "conch-v1.5": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "quiltnet": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "h-optimus-0": ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)),
    "h-optimus-1": ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)),
    "hibou-b": ((0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816)),
    "hibou-l": ((0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816)),
    "h0-mini": ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)),
    "genbio-pathfm": ((0.697, 0.575, 0.728), (0.188, 0.240, 0.187)),
    **dict.fromkeys(["midnight", "musk", "efficientnet-lite0"], ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
}
"""Means and deviations as the cards or their code have them; CONCH's code sets CLIP's. The others have ImageNet's."""


@pytest.mark.parametrize("name", PUBLISHED_WIDTHS)
def test_colours_are_those_of_the_card(name: str):
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert CARDS[name].colours == PUBLISHED_COLOURS.get(name, imagenet)


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


def tiny_dinov2(registers: int, gated: bool):
    """A small DINOv2 of Hugging Face's, with gated feed-forward layers as Hibou has them, or plain ones."""
    transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    shape = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        "mlp_ratio": 4, "layerscale_value": 0.5, "use_swiglu_ffn": gated,
    }  # fmt: skip
    torch.manual_seed(0)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**shape, num_register_tokens=registers)
        return transformers.Dinov2WithRegistersModel(config).eval()
    return transformers.Dinov2Model(transformers.Dinov2Config(**shape)).eval()


@pytest.mark.parametrize(("registers", "gated"), [(0, False), (4, False), (4, True)])
def test_dinov2_weights_give_the_same_embeddings_under_our_names(timm, tmp_path: Path, registers: int, gated: bool):
    reference = tiny_dinov2(registers, gated)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    options = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1.0}
    if registers:
        options |= {"reg_tokens": registers, "no_embed_class": True}
    if gated:
        # Two thirds of 4 × 32, rounded to a multiple of 8.
        options |= {"mlp_ratio": 2 * 88 / 32, "mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    ours = timm.models.vision_transformer.VisionTransformer(num_classes=0, **options).eval()
    reference.save_pretrained(tmp_path)
    weights = to_network_names(read_weights(tmp_path / "model.safetensors"), "dinov2")
    assert set(ours.state_dict()) <= set(weights)
    ours.load_state_dict(weights, strict=False)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = reference(pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(ours(pixels), expected, atol=1e-5, rtol=1e-4)


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint, those that are not read left out."""
    both = ("weight", "bias")
    if name.startswith("hibou"):
        d, depth, hidden = {"hibou-b": (768, 12, 2048), "hibou-l": (1024, 24, 2736)}[name]
        shapes = {
            "embeddings.cls_token": (1, 1, d), "embeddings.mask_token": (1, d),
            "embeddings.register_tokens": (1, 4, d), "embeddings.position_embeddings": (1, 257, d),
            "embeddings.patch_embeddings.projection.weight": (d, 3, 14, 14),
            "embeddings.patch_embeddings.projection.bias": (d,), "layernorm.weight": (d,), "layernorm.bias": (d,),
        }  # fmt: skip
        for i in range(depth):
            layer = f"encoder.layer.{i}"
            linear = {f"attention.attention.{p}": (d, d) for p in ("query", "key", "value")}
            linear |= {"attention.output.dense": (d, d), "mlp.weights_in": (2 * hidden, d)}
            linear |= {"mlp.weights_out": (d, hidden)}
            shapes |= {f"{layer}.{n}.weight": size for n, size in linear.items()}
            shapes |= {f"{layer}.{n}.bias": size[:1] for n, size in linear.items()}
            shapes |= {f"{layer}.norm{j}.{kind}": (d,) for j in (1, 2) for kind in both}
            shapes |= {f"{layer}.layer_scale{j}.lambda1": (d,) for j in (1, 2)}
        return shapes
    if name == "quiltnet":
        shapes = {
            "visual.class_embedding": (768,), "visual.positional_embedding": (50, 768),
            "visual.conv1.weight": (768, 3, 32, 32), "visual.proj": (768, 512), "logit_scale": (),
        }  # fmt: skip
        shapes |= {f"visual.{norm}.{kind}": (768,) for norm in ("ln_pre", "ln_post") for kind in both}
        for i in range(12):
            block = f"visual.transformer.resblocks.{i}"
            shapes |= {f"{block}.ln_{j}.{kind}": (768,) for j in (1, 2) for kind in both}
            shapes |= {f"{block}.attn.in_proj_weight": (2304, 768), f"{block}.attn.in_proj_bias": (2304,)}
            for layer, size in {
                "attn.out_proj": (768, 768),
                "mlp.c_fc": (3072, 768),
                "mlp.c_proj": (768, 3072),
            }.items():
                shapes |= {f"{block}.{layer}.weight": size, f"{block}.{layer}.bias": size[:1]}
        return shapes
    prefix, d, depth, dim, positions = {
        "conch": ("visual.", 768, 12, 512, 785),
        "conch-v1.5": ("", 1024, 24, 768, 197),
    }[name]
    shapes = {
        "trunk.cls_token": (1, 1, d), "trunk.pos_embed": (1, positions, d),
        "trunk.patch_embed.proj.weight": (d, 3, 16, 16), "trunk.patch_embed.proj.bias": (d,),
        "attn_pool_contrast.query": (1, dim),
    }  # fmt: skip
    norms = {"trunk.norm": d, "attn_pool_contrast.ln_k": d, "attn_pool_contrast.ln_q": dim, "ln_contrast": dim}
    for i in range(depth):
        block = f"trunk.blocks.{i}"
        norms |= {f"{block}.norm1": d, f"{block}.norm2": d}
        linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        shapes |= {f"{block}.{n}.weight": size for n, size in linear.items()}
        shapes |= {f"{block}.{n}.bias": size[:1] for n, size in linear.items()}
        if name == "conch-v1.5":
            shapes |= {f"{block}.ls1.gamma": (d,), f"{block}.ls2.gamma": (d,)}
    shapes |= {f"{norm}.{kind}": (width,) for norm, width in norms.items() for kind in both}
    pool = "attn_pool_contrast"
    if name == "conch-v1.5":
        shapes |= {f"{pool}.to_q.weight": (dim, dim), f"{pool}.to_kv.weight": (2 * dim, d)}
        shapes |= {f"{pool}.to_out.weight": (dim, dim)}
    else:
        shapes |= {f"{pool}.attn.{p}_proj_weight": (dim, dim if p == "q" else d) for p in "qkv"}
        shapes |= {f"{pool}.attn.in_proj_bias": (3 * dim,), "proj_contrast": (dim, dim)}
        shapes |= {f"{pool}.attn.out_proj.weight": (dim, dim), f"{pool}.attn.out_proj.bias": (dim,)}
    return {f"{prefix}{key}": size for key, size in shapes.items()}


@pytest.mark.parametrize("name", ["conch", "conch-v1.5", "quiltnet", "hibou-b", "hibou-l"])
def test_every_weight_of_a_published_checkpoint_finds_its_place(timm, name: str):
    card = CARDS[name]
    with torch.device("meta"):
        network = build_network(card)
        weights = {key: torch.empty(size) for key, size in published_shapes(name).items()}
    named = {key: tuple(value.shape) for key, value in to_network_names(weights, card.layout).items()}
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()}.items() <= named.items()


def test_the_pooling_of_conch_v1_5_is_the_published_one():
    """Queries, keys and values without biases, one matrix for the latter two, 8 heads; positions for 14² patches."""

    class Trunk(torch.nn.Module):
        num_features = 24

        def forward_features(self, pixels):
            return pixels

    torch.manual_seed(0)
    published = {
        "to_q.weight": torch.randn(16, 16), "to_kv.weight": torch.randn(32, 24), "to_out.weight": torch.randn(16, 16),
        "query": torch.randn(1, 16), "ln_q.weight": torch.rand(16), "ln_q.bias": torch.randn(16),
        "ln_k.weight": torch.rand(24), "ln_k.bias": torch.randn(24),
    }  # fmt: skip
    weights = {f"attn_pool_contrast.{key}": value for key, value in published.items()}
    weights |= {"ln_contrast.weight": torch.rand(16), "ln_contrast.bias": torch.randn(16)}
    weights["trunk.pos_embed"] = torch.randn(1, 197, 4)
    named = to_network_names(weights, "conch-v1.5")
    positions = named.pop("trunk.pos_embed")
    pool = AttentionPooled(Trunk(), 16).eval()
    pool.load_state_dict(named)
    tokens = torch.randn(3, 10, 24)
    norm = torch.nn.functional.layer_norm
    keys, values = (
        (norm(tokens, (24,), published["ln_k.weight"], published["ln_k.bias"]) @ published["to_kv.weight"].T)
        .unflatten(-1, (2, 8, 2)).unbind(2)
    )  # fmt: skip
    query = (
        norm(published["query"], (16,), published["ln_q.weight"], published["ln_q.bias"]) @ published["to_q.weight"].T
    )
    share = torch.einsum("hc,bnhc->bhn", query.unflatten(-1, (8, 2))[0], keys).div(2**0.5).softmax(-1)
    mixed = torch.einsum("bhn,bnhc->bhc", share, values).flatten(1) @ published["to_out.weight"].T
    expected = norm(mixed, (16,), weights["ln_contrast.weight"], weights["ln_contrast.bias"])
    torch.testing.assert_close(pool(tokens), expected)
    assert positions.shape == (1, 1 + 28 * 28, 4)
    torch.testing.assert_close(positions[:, 0], weights["trunk.pos_embed"][:, 0])
    # Bicubic (Keys' kernel, a = −3/4) at places that the added tenth of a patch has moved.
    line = torch.randn(14)
    stored = torch.cat([torch.zeros(1), line.repeat(14)]).view(1, 197, 1)
    row = to_network_names({"trunk.pos_embed": stored}, "conch-v1.5")["trunk.pos_embed"][0, 1:, 0].view(28, 28)[13]
    for i in range(4, 24):
        place = (i + 0.5) * 14 / 28.1 - 0.5
        far = np.abs(place - np.arange(14))
        near = 1.25 * far**3 - 2.25 * far**2 + 1
        kernel = np.where(far < 1, near, np.where(far < 2, -0.75 * (far**3 - 5 * far**2 + 8 * far - 4), 0))
        assert float(row[i]) == pytest.approx(float(kernel @ line.numpy()), abs=1e-5)


def test_weights_that_lack_entries_are_refused(timm, tmp_path: Path):
    card = card_of("timm:vit_tiny_patch16_224")
    network = build_network(card)
    weights = dict(network.state_dict())
    weights.pop("blocks.3.attn.qkv.weight")
    weights["norm.weight"] = torch.zeros(5)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"w.safetensors: not a checkpoint .* it has no blocks.3.attn.qkv.weight .1 w"):
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
    together = encoder.encode(tiles)
    separate = np.concatenate([encoder.encode(tile[None]) for tile in tiles])
    np.testing.assert_allclose(together, separate, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "f32"])
def test_precision_is_used_and_recorded(timm, tmp_path: Path, precision: str):
    network = build_network(card_of("timm:vit_tiny_patch16_224"))
    save_file(network.state_dict(), tmp_path / "timm_vit_tiny_patch16_224.safetensors")
    config = PreprocessConfig(weights=tmp_path, precision=precision)
    encoder = load_encoder("timm:vit_tiny_patch16_224", config)
    found = encoder.encode(np.zeros((1, 256, 256, 3), np.uint8))
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
    with pytest.raises(ConfigError, match=r"encoder 'uni3' is unknown. Known: stain-texture, .*timm:NAME"):
        load_encoder("uni3", PreprocessConfig())
    with pytest.raises(ConfigError, match="expected one or more names, each given once"):
        load_slots(PreprocessConfig(encoders=("stain-texture", "stain-texture")))


def test_a_name_timm_does_not_know(timm):
    with pytest.raises(ConfigError, match=r"encoder 'timm:no_such_net': timm cannot build it"):
        card_of("timm:no_such_net")


def test_the_error_for_missing_weights_names_licence_gate_and_remedy(tmp_path: Path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(
        DataError, match=r"uni: pytorch_model.bin is not in the hub's cache .licence: CC-BY-NC-ND-4.0"
    ) as caught:
        find_weights("uni", CARDS["uni"], tmp_path, offline=True)
    assert "https://huggingface.co/MahmoodLab/UNI" in caught.value.remedy
    assert f"{tmp_path}/uni.bin" in caught.value.remedy
    with pytest.raises(DataError, match=r"weights=.*none: no such file or folder"):
        find_weights("uni", CARDS["uni"], tmp_path / "none", offline=True)


def test_local_checkpoints_are_found_by_name_or_given_themselves(tmp_path: Path):
    own = tmp_path / "my.bin"
    for path in (own, tmp_path / "uni.pth", tmp_path / "hf_lab_net.safetensors"):
        path.touch()
    assert find_weights("uni", CARDS["uni"], own, offline=True) == own
    assert find_weights("uni", CARDS["uni"], tmp_path, offline=True) == tmp_path / "uni.pth"
    assert find_weights("hf:lab/net", CARDS["uni"], tmp_path, offline=True) == tmp_path / "hf_lab_net.safetensors"


def test_timm_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(networks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"timm, which is not installed. Install .*cfusion\[encoders\]"):
        networks.import_timm()


def test_a_device_without_memory_for_a_batch_says_so():
    class Hungry(torch.nn.Module):
        def forward(self, pixels):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    encoder = NetworkEncoder("uni", CARDS["uni"], Hungry(), "", "cpu", "f32")
    with pytest.raises(DataError, match=r"encoder uni: cpu has not enough memory for 3 tiles at once.*--batch-size"):
        encoder.encode(np.zeros((3, 256, 256, 3), np.uint8))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_an_encoder_of_the_hub_is_read_only_from_its_cache(timm, hub: Path, monkeypatch):
    def asks(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", asks)
    config = PreprocessConfig(offline=True)
    with pytest.raises(DataError, match=r"hf:lab/net: config.json is not in the hub's cache"):
        load_encoder("hf:lab/net", config)
    folder = hub / "models--lab--net"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    pretrained = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "crop_pct": 1.0}
    pretrained |= {"input_size": [3, 224, 224], "license": "mit"}
    write_json(snapshot / "config.json", {"architecture": "vit_tiny_patch16_224", "num_features": 192} | {
        "pretrained_cfg": pretrained, "model_args": {"reg_tokens": 2},
    })  # fmt: skip
    with pytest.raises(DataError, match=r"hf:lab/net: model.safetensors is not in the hub's cache .licence: mit"):
        load_encoder("hf:lab/net", config)
    network = timm.create_model("vit_tiny_patch16_224", reg_tokens=2, num_classes=0).eval()
    save_file(network.state_dict(), snapshot / "model.safetensors")
    encoder = load_encoder("hf:lab/net", config)
    assert (encoder.name, encoder.dim) == ("hf_lab_net", 192)
    assert "resize 224 bilinear, crop 224, mean (0.1, 0.2, 0.3)" in encoder.identity["transform"]
    tiles = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(pretrained[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = network((pixels - mean) / std).numpy()
    np.testing.assert_allclose(encoder.encode(tiles), expected, atol=1e-4)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path):
    torch.save({"state_dict": {"module.a": torch.ones(2)}}, tmp_path / "good.pth")
    assert set(read_weights(tmp_path / "good.pth")) == {"a"}
    torch.save({"a": Path("/")}, tmp_path / "code.pth")
    with pytest.raises(DataError, match=r"code.pth: not a readable checkpoint"):
        read_weights(tmp_path / "code.pth")
    torch.save({"a": 3}, tmp_path / "number.pth")
    with pytest.raises(DataError, match="contains something other than named tensors"):
        read_weights(tmp_path / "number.pth")
    data = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "damaged.pth").write_bytes(data.replace(np.ones(2, np.float32).tobytes(), bytes(8)))
    with pytest.raises(DataError, match=r"not a readable checkpoint \(its part good/data/0 is damaged: the checksum"):
        read_weights(tmp_path / "damaged.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a readable checkpoint"):
        read_weights(tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "mobilenetv4_conv_small.e2400_r224_in1k", "efficientvit_b0", "resnet18",
             "efficientnet_lite0", "convnext_atto", "tf_efficientnet_b1", "swin_tiny_patch4_window7_224"],
)  # fmt: skip
def test_a_model_of_timm_is_run_as_timm_runs_it(timm, name: str):
    """Width of the output and pixels of the transform, by timm itself."""
    card = card_of(f"timm:{name}")
    network = timm.create_model(name, pretrained=False, num_classes=0).eval()
    data = timm.data.resolve_data_config({}, model=network)
    with torch.inference_mode():
        assert network(torch.zeros(1, *data["input_size"])).shape == (1, card.dim)
    tile = tissue_picture(256, 256, share=2)
    right = timm.data.create_transform(**data, is_training=False)(Image.fromarray(tile))
    encoder = NetworkEncoder(name, card, torch.nn.Identity(), "", "cpu", "f32")
    found = encoder.transformed(torch.from_numpy(tile)[None].permute(0, 3, 1, 2))[0]
    assert found.shape == right.shape
    # A grey level of 255 is the difference of two roundings.
    assert (found - right).abs().max() < 2.1 / 255 / min(data["std"])


def test_a_transform_that_is_not_ours_is_refused(timm):
    compose = timm.data.create_transform((3, 224, 224), interpolation="lanczos", is_training=False)
    with pytest.raises(ConfigError, match="expected a square resize, bilinear or bicubic"):
        networks._resized("timm:x", compose)

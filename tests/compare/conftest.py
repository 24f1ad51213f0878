"""Tiny random CLIP, DINO and LPIPS weights in the layouts of the published directories."""

import json

import pytest
import torch
import transformers
from safetensors.numpy import save_file as numpy_file
from safetensors.torch import save_file

from tests.compare.preference_weights import (
    CLIP_WORDS,
    hps_config,
    hps_tensors,
    reward_tensors,
    write_bert_vocabulary,
    write_clip_tokenizer,
)

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
VGG_ROWS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
VGG_WIDTHS = (4, 6, 8, 8, 10)


def randomised(model, seed):
    """The model with all weights drawn again, large enough that pictures differ in it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 0.3 if "weight" in name or "embed" in name else 0.1
            p.copy_(torch.randn(p.shape, generator=generator) * spread)
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    return model.eval()


def write_clip(directory):
    """A CLIPModel; tokenizer and processor files as beside openai/clip-vit-large-patch14."""
    directory.mkdir()
    write_clip_tokenizer(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps({
        "crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 32,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }))
    last = len(CLIP_WORDS) - 1
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.CLIPConfig(
        text_config={**shared, "hidden_size": 24, "vocab_size": len(CLIP_WORDS),
                     "max_position_embeddings": 77, "bos_token_id": last - 1,
                     "eos_token_id": last, "pad_token_id": last},
        vision_config={**shared, "hidden_size": 32, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    randomised(transformers.CLIPModel(config), 0).save_pretrained(directory)
    return directory


DINO_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DINOS = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(
        **DINO_SHAPE, intermediate_size=64, image_size=32, patch_size=8)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(
        **DINO_SHAPE, image_size=42, patch_size=7)),
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(
            **DINO_SHAPE, image_size=42, patch_size=7, num_register_tokens=3)),
    "dinov3_vit": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(
        **DINO_SHAPE, intermediate_size=64, image_size=32, patch_size=8, num_register_tokens=4)),
}
DINO_PROCESSORS = {
    "vit": {"feature_extractor_type": "ViTFeatureExtractor", "do_resize": True, "size": 32,
            "do_normalize": True, "resample": 3, **IMAGENET},
    "dinov2": {"image_processor_type": "BitImageProcessor", "do_resize": True,
               "size": {"shortest_edge": 48}, "resample": 3, "do_center_crop": True,
               "crop_size": {"height": 42, "width": 42}, "do_rescale": True,
               "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
               **IMAGENET},
    "dinov3_vit": {"image_processor_type": "DINOv3ViTImageProcessorFast", "do_resize": True,
                   "size": {"height": 32, "width": 32}, "resample": 2, "do_rescale": True,
                   "rescale_factor": 1 / 255, "do_normalize": True, **IMAGENET},
}
DINO_PROCESSORS["dinov2_with_registers"] = DINO_PROCESSORS["dinov2"]


def write_dino(directory, kind):
    randomised(DINOS[kind](), 1).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(DINO_PROCESSORS[kind]))
    return directory


def vgg_tensors():
    """Names of timm/vgg16.tv_in1k, its classifier included; of tiny width."""
    generator = torch.Generator().manual_seed(2)
    tensors, width = {"head.fc.weight": torch.zeros(3, 5)}, 3
    for row, out in zip(VGG_ROWS, VGG_WIDTHS, strict=True):
        for i in row:
            weight = torch.randn(out, width, 3, 3, generator=generator)
            tensors[f"features.{i}.weight"] = weight / (width * 9 / 2) ** 0.5
            tensors[f"features.{i}.bias"] = 0.1 * torch.randn(out, generator=generator)
            width = out
    return tensors


def head_tensors():
    """Names of vgg.pth of the package lpips; nowhere negative, as trained."""
    generator = torch.Generator().manual_seed(3)
    return {f"lin{i}.model.1.weight": torch.rand(1, out, 1, 1, generator=generator)
            for i, out in enumerate(VGG_WIDTHS)}


def write_lpips(directory):
    directory.mkdir()
    save_file(vgg_tensors(), directory / "model.safetensors")
    save_file(head_tensors(), directory / "lpips_vgg.safetensors")
    return directory


def write_hps(directory):
    """The tensors as HPS's makers publish them, config and tokenizer as of the CLIP it began as."""
    directory.mkdir()
    write_clip_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(hps_config()))
    numpy_file(hps_tensors(), directory / "model.safetensors")
    return directory


def write_reward(directory):
    directory.mkdir()
    write_bert_vocabulary(directory)
    numpy_file(reward_tensors(), directory / "model.safetensors")
    return directory


@pytest.fixture(scope="session")
def metric_weights(tmp_path_factory):
    """A folder with clip/, lpips/, hpsv2/, imagereward/ and one DINO per kind; nothing in it may be
    changed."""
    root = tmp_path_factory.mktemp("metric_weights")
    write_clip(root / "clip")
    write_lpips(root / "lpips")
    write_hps(root / "hpsv2")
    write_reward(root / "imagereward")
    for kind in DINOS:
        write_dino(root / kind, kind)
    return root

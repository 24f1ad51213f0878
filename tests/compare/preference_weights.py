"""Tiny HPS v2 and ImageReward weights, pictures and prompts, the same wherever they are made.

Shared by the tests and by preference_oracles.py, which runs in an environment of its own; NumPy's
RandomState gives the same numbers in every release.
"""

import json
import zlib

import numpy as np
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

LETTERS = list(bytes_to_unicode().values())
CLIP_WORDS = [*LETTERS, *(c + "</w>" for c in LETTERS), "th", "the</w>",
              "<|startoftext|>", "<|endoftext|>"]
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz,.",
              *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"), "the", "fox", "snow"]
PROMPTS = ["A red fox, in the snow", "the sea, " * 20]
HPS_SIZES = {"embed": 16, "vision": 32, "text": 24, "layers": 2, "heads": 2, "image": 28,
             "patch": 7, "mlp": 4}
REWARD_SIZES = {"vision": 128, "text": 128, "layers": 2, "image": 32, "patch": 16,
                "text_mlp": 64, "positions": 40, "words": len(BERT_WORDS) + 2}


def pictures():
    """Three RGB pictures: wide, high and square, with large forms and fine grain."""
    found = []
    for seed, (w, h) in enumerate([(61, 40), (37, 90), (56, 56)]):
        random = np.random.RandomState(seed)
        forms = Image.fromarray(random.randint(0, 256, (4, 5, 3), np.uint8)).resize((w, h), 0)
        grain = random.randint(-20, 21, (h, w, 3))
        found.append(Image.fromarray(np.clip(np.asarray(forms) + grain, 0, 255).astype(np.uint8)))
    return found


def drawn(name, *shape):
    """One tensor, float32, from its name: biases and norms small, others by their fan-in."""
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "bias" in name:
        return (0.1 * x).astype(np.float32)
    if len(shape) == 1 or "embed" in name.rpartition(".")[2] or "token" in name:
        scale, shift = (0.2, 1.0) if "weight" in name else (0.5, 0.0)
        return (scale * x + shift).astype(np.float32)
    return (1.5 * x / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def named(shapes):
    return {name: drawn(name, *shape) for name, shape in shapes.items()}


def linear(name, fan_out, fan_in):
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def hps_tensors():
    """As in the state_dict of HPS_v2.1_compressed.pt: open_clip's CLIP."""
    s, shapes = HPS_SIZES, {"text_projection": (HPS_SIZES["text"], HPS_SIZES["embed"])}
    shapes["visual.proj"] = (s["vision"], s["embed"])
    shapes["visual.class_embedding"] = (s["vision"],)
    shapes["visual.positional_embedding"] = (1 + (s["image"] // s["patch"]) ** 2, s["vision"])
    shapes["visual.conv1.weight"] = (s["vision"], 3, s["patch"], s["patch"])
    shapes["positional_embedding"] = (77, s["text"])
    shapes["token_embedding.weight"] = (len(CLIP_WORDS), s["text"])
    shapes |= norm("ln_final", s["text"])
    shapes |= norm("visual.ln_pre", s["vision"]) | norm("visual.ln_post", s["vision"])
    for tower, width in (("visual.", s["vision"]), ("", s["text"])):
        for i in range(s["layers"]):
            block = f"{tower}transformer.resblocks.{i}."
            shapes[f"{block}attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{block}attn.in_proj_bias"] = (3 * width,)
            shapes |= linear(f"{block}attn.out_proj", width, width)
            shapes |= norm(f"{block}ln_1", width) | norm(f"{block}ln_2", width)
            shapes |= linear(f"{block}mlp.c_fc", s["mlp"] * width, width)
            shapes |= linear(f"{block}mlp.c_proj", width, s["mlp"] * width)
    return named(shapes) | {"logit_scale": np.array(np.log(100.0), np.float32)}


def hps_config():
    """config.json beside them: transformers' CLIPConfig of these sizes."""
    s = HPS_SIZES
    shared = {"num_hidden_layers": s["layers"], "num_attention_heads": s["heads"],
              "hidden_act": "gelu"}
    last = len(CLIP_WORDS) - 1
    return {
        "model_type": "clip", "projection_dim": s["embed"],
        "text_config": {**shared, "hidden_size": s["text"], "intermediate_size": 4 * s["text"],
                        "vocab_size": len(CLIP_WORDS), "bos_token_id": last - 1,
                        "eos_token_id": last, "pad_token_id": last},
        "vision_config": {**shared, "hidden_size": s["vision"], "patch_size": s["patch"],
                          "intermediate_size": 4 * s["vision"], "image_size": s["image"]},
    }


def write_clip_tokenizer(directory):
    """As beside openai/clip-vit-large-patch14."""
    (directory / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(CLIP_WORDS)}))
    (directory / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "unk_token": "<|endoftext|>", "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "model_max_length": 77, "tokenizer_class": "CLIPTokenizer",
    }))


def reward_tensors():
    """As in ImageReward.pt: BLIP's two towers, projections that the reward does not use, a head."""
    s, start = REWARD_SIZES, "blip.visual_encoder."
    w, t = s["vision"], s["text"]
    shapes = {f"{start}cls_token": (1, 1, w),
              f"{start}pos_embed": (1, 1 + (s["image"] // s["patch"]) ** 2, w),
              f"{start}patch_embed.proj.weight": (w, 3, s["patch"], s["patch"]),
              f"{start}patch_embed.proj.bias": (w,)}
    shapes |= norm(f"{start}norm", w)
    for i in range(s["layers"]):
        block = f"{start}blocks.{i}."
        shapes |= norm(f"{block}norm1", w) | norm(f"{block}norm2", w)
        shapes |= linear(f"{block}attn.qkv", 3 * w, w) | linear(f"{block}attn.proj", w, w)
        shapes |= linear(f"{block}mlp.fc1", 4 * w, w) | linear(f"{block}mlp.fc2", w, 4 * w)
    start = "blip.text_encoder."
    shapes[f"{start}embeddings.word_embeddings.weight"] = (s["words"], t)
    shapes[f"{start}embeddings.position_embeddings.weight"] = (s["positions"], t)
    shapes |= norm(f"{start}embeddings.LayerNorm", t)
    for i in range(s["layers"]):
        layer = f"{start}encoder.layer.{i}."
        for kind, seen in (("attention", t), ("crossattention", w)):
            shapes |= linear(f"{layer}{kind}.self.query", t, t)
            shapes |= linear(f"{layer}{kind}.self.key", t, seen)
            shapes |= linear(f"{layer}{kind}.self.value", t, seen)
            shapes |= linear(f"{layer}{kind}.output.dense", t, t)
            shapes |= norm(f"{layer}{kind}.output.LayerNorm", t)
        shapes |= linear(f"{layer}intermediate.dense", s["text_mlp"], t)
        shapes |= linear(f"{layer}output.dense", t, s["text_mlp"])
        shapes |= norm(f"{layer}output.LayerNorm", t)
    shapes |= linear("blip.vision_proj", 256, w) | linear("blip.text_proj", 256, t)
    for i, (fan_out, fan_in) in {0: (1024, t), 2: (128, 1024), 4: (64, 128), 6: (16, 64),
                                 7: (1, 16)}.items():
        shapes |= linear(f"mlp.layers.{i}", fan_out, fan_in)
    positions = {f"{start}embeddings.position_ids": np.arange(s["positions"])[None]}
    return named(shapes) | positions


def write_bert_vocabulary(directory):
    (directory / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")

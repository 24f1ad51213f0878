"""Writes preference_oracles.json: what the makers' own packages say of the tiny weights.

They do not run beside this project's packages, so this was run once in an environment of its own,
Python 3.11 with torch 2.13.0, torchvision 0.28.0, transformers 4.49.0, timm 0.6.13, hpsv2 1.2.0 and
image-reward 1.5 (with the file of words that hpsv2's wheel lacks, taken from open_clip_torch, and
without fairscale, of which one function is imported and not called):

    PYTHONPATH=. python tests/compare/preference_oracles.py
"""

import json
import tempfile
from pathlib import Path

import hpsv2.img_score as hps
import torch
import transformers
from hpsv2.src.open_clip.model import CLIP
from hpsv2.src.open_clip.transform import image_transform
from ImageReward import ImageReward as reward
from ImageReward.models.BLIP import blip_pretrain
from ImageReward.models.BLIP.vit import VisionTransformer

from tests.compare import preference_weights as tiny

MED = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
       "layer_norm_eps": 1e-12, "model_type": "bert", "pad_token_id": 0, "type_vocab_size": 2,
       "add_cross_attention": True, "initializer_range": 0.02}


def in_torch(tensors):
    return {name: torch.from_numpy(x) if x.shape else torch.tensor(x)
            for name, x in tensors.items()}


def hps_scores(folder):
    """[prompts, pictures] by hpsv2.img_score.score."""
    s = tiny.HPS_SIZES
    tiny.write_clip_tokenizer(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)

    def tokenize(texts):  # as its own does it, with fewer words
        rows = tokenizer(texts, truncation=True, max_length=77).input_ids
        return torch.tensor([row + [0] * (77 - len(row)) for row in rows])

    hps.get_tokenizer = lambda name: tokenize
    hps.model_dict["model"] = CLIP(
        s["embed"],
        {"image_size": s["image"], "patch_size": s["patch"], "width": s["vision"],
         "layers": s["layers"], "head_width": s["vision"] // s["heads"]},
        {"context_length": 77, "vocab_size": len(tiny.CLIP_WORDS), "width": s["text"],
         "heads": s["heads"], "layers": s["layers"]},
        output_dict=True,
    )
    hps.model_dict["preprocess_val"] = image_transform(
        s["image"], is_train=False, resize_longest_max=True
    )
    torch.save({"state_dict": in_torch(tiny.hps_tensors())}, folder / "hps.pt")
    return [[float(x) for x in hps.score(tiny.pictures(), prompt, cp=str(folder / "hps.pt"))]
            for prompt in tiny.PROMPTS]


def rewards(folder):
    """[prompts, pictures] by ImageReward.score."""
    s = tiny.REWARD_SIZES
    tiny.write_bert_vocabulary(folder)
    (folder / "med.json").write_text(json.dumps(MED | {
        "hidden_size": s["text"], "intermediate_size": s["text_mlp"],
        "num_attention_heads": s["text"] // 64, "num_hidden_layers": s["layers"],
        "max_position_embeddings": s["positions"], "vocab_size": s["words"],
    }))
    tower = VisionTransformer(img_size=s["image"], patch_size=s["patch"], embed_dim=s["vision"],
                              depth=s["layers"], num_heads=s["vision"] // 64, drop_path_rate=0.1)
    blip_pretrain.create_vit = lambda *_: (tower, s["vision"])
    blip_pretrain.init_tokenizer = lambda: transformers.BertTokenizer(str(folder / "vocab.txt"))
    model = reward.ImageReward(str(folder / "med.json"))
    model.mlp, model.preprocess = reward.MLP(s["text"]), reward._transform(s["image"])
    model.load_state_dict(in_torch(tiny.reward_tensors()))
    model.eval()
    return [[model.score(prompt, picture) for picture in tiny.pictures()]
            for prompt in tiny.PROMPTS]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {"hpsv2": hps_scores(Path(folder)), "imagereward": rewards(Path(folder))}
    text = json.dumps(found, indent=1) + "\n"
    Path(__file__).with_suffix(".json").write_text(text)
    print(text)

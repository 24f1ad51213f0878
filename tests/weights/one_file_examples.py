"""Parts of models as ComfyUI keeps them, made from diffusers' layout by rules written out here."""

import dataclasses
import functools
import re
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from dopsd_jax.core import trees
from dopsd_jax.weights import load_pipeline
from dopsd_jax.weights.one_file import PARTS

LEVELS = 4  # of the tiny VAEs


def tensors_of(folder):
    """Every tensor of a part of a model."""
    return {k: v for f in sorted(Path(folder).glob("*.safetensors"))
            for k, v in load_file(f).items()}


def small_files(model, out):
    """The same model without any weights."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    return out


def z_image_of_its_makers(tensors):
    found = {}
    for name, x in tensors.items():
        new = name.replace("all_x_embedder.2-1.", "x_embedder.")
        new = new.replace("all_final_layer.2-1.", "final_layer.")
        new = new.replace("attention.to_out.0.", "attention.out.")
        new = new.replace("attention.norm_q.", "attention.q_norm.")
        new = new.replace("attention.norm_k.", "attention.k_norm.")
        if new.endswith("attention.to_q.weight"):
            q, k, v = (tensors[name.replace("to_q", p)] for p in ("to_q", "to_k", "to_v"))
            found[new.replace("to_q", "qkv")] = np.concatenate([q, k, v])
        elif not new.endswith(("to_k.weight", "to_v.weight")):
            found[new] = x
    return found


def flux2_of_its_makers(tensors):
    plain = {
        "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
    }
    found = {f"{new}.weight": tensors[f"{old}.weight"] for old, new in plain.items()}
    scale, shift = np.split(tensors["norm_out.linear.weight"], 2)
    found["final_layer.adaLN_modulation.1.weight"] = np.concatenate([shift, scale])
    blocks = {m[1] for n in tensors if (m := re.match(r"transformer_blocks\.(\d+)\.", n))}
    for i in blocks:
        old, new = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, qkv, out, norm, ff in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "norm_", "ff"),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added_",
             "ff_context"),
        ):
            found[f"{new}.{stream}_attn.qkv.weight"] = np.concatenate(
                [tensors[f"{old}.attn.{p}.weight"] for p in qkv])
            for there, here in (
                (f"{stream}_attn.proj.weight", f"attn.{out}.weight"),
                (f"{stream}_attn.norm.query_norm.scale", f"attn.{norm}q.weight"),
                (f"{stream}_attn.norm.key_norm.scale", f"attn.{norm}k.weight"),
                (f"{stream}_mlp.0.weight", f"{ff}.linear_in.weight"),
                (f"{stream}_mlp.2.weight", f"{ff}.linear_out.weight"),
            ):
                found[f"{new}.{there}"] = tensors[f"{old}.{here}"]
    for i in {m[1] for n in tensors if (m := re.match(r"single_transformer_blocks\.(\d+)\.", n))}:
        for there, here in (
            ("linear1.weight", "attn.to_qkv_mlp_proj.weight"),
            ("linear2.weight", "attn.to_out.weight"),
            ("norm.query_norm.scale", "attn.norm_q.weight"),
            ("norm.key_norm.scale", "attn.norm_k.weight"),
        ):
            found[f"single_blocks.{i}.{there}"] = tensors[f"single_transformer_blocks.{i}.{here}"]
    return found


def vae_of_its_makers(tensors):
    found = {}
    for name, x in tensors.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        for kind, there in (("resnets", "block"), ("upsamplers.0", "upsample")):
            new = re.sub(rf"up_blocks\.(\d)\.{kind}",
                         lambda m, t=there: f"up.{LEVELS - 1 - int(m[1])}.{t}", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
        new = re.sub(r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1", new)
        new = new.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
        new = re.sub(r"^quant_conv", "encoder.quant_conv", new)
        new = re.sub(r"^post_quant_conv", "decoder.post_quant_conv", new)
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", new):
            x = x[:, :, None, None]
        found[new] = x
    return found


PREFIXES = {
    "none": dict.fromkeys(PARTS, ""),
    "ComfyUI's": {"transformer": "model.diffusion_model.", "vae": "vae.",
                  "text_encoder": "text_encoders.qwen3_4b.transformer."},
    "short": {"transformer": "diffusion_model.", "vae": "first_stage_model.", "text_encoder": ""},
}


@dataclasses.dataclass
class Example:
    """A model as a directory, the same without weights, and its parts in their makers' names."""

    whole: Path
    small: Path
    parts: dict[str, dict[str, np.ndarray]]

    @functools.cached_property
    def params(self):
        """Of the directory, of all parts."""
        return params_of(load_pipeline(self.whole))

    def files(self, out, prefix="none"):
        """A file for each part, as `load_pipeline` takes them."""
        out.mkdir(exist_ok=True)
        for part, tensors in self.parts.items():
            named = {PREFIXES[prefix][part] + n: x for n, x in tensors.items()}
            save_file(named, out / f"{part}.safetensors")
        return {f"{part}_file": str(out / f"{part}.safetensors") for part in PARTS}


def example(model, transformer, out):
    found = {part: tensors_of(model / part) for part in PARTS}
    return Example(model, small_files(model, out / "small"), {
        "transformer": transformer(found["transformer"]), "vae": vae_of_its_makers(found["vae"]),
        "text_encoder": found["text_encoder"],
    })


def params_of(pipe):
    return {"transformer": pipe.params, "vae": pipe.vae_params, "text_encoder": pipe.text_params}


def assert_same(one, two):
    one, two = trees.flatten(one), trees.flatten(two)
    assert one.keys() == two.keys() and one
    for name, x in one.items():
        assert x.dtype == two[name].dtype, name
        np.testing.assert_array_equal(np.asarray(x), np.asarray(two[name]), err_msg=name)

"""LoRA on a tiny Z-Image transformer, and the files in which others would write it."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.numpy import save_file

from dopsd_jax.core import trees
from dopsd_jax.models.z_image import ZImageConfig
from dopsd_jax.weights.lora_files import LoraSpec
from dopsd_jax.weights.z_image import Z_IMAGE

Z_IMAGE_MODULES = Z_IMAGE.modules(ZImageConfig())

TINY = dict(
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=64, n_layers=2,
    n_refiner_layers=1, n_heads=4, n_kv_heads=4, norm_eps=1e-5, qk_norm=True, cap_feat_dim=32,
    rope_theta=256.0, t_scale=1000.0, axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
)
LAYERS = {"layers": 2, "noise_refiner": 1, "context_refiner": 1}
# Linears of a block: torch name, tree path, (in, out). Written out, not taken from the code tested.
BLOCK = {
    "attention.to_q": ("attention/to_q", 64, 64),
    "attention.to_k": ("attention/to_k", 64, 64),
    "attention.to_v": ("attention/to_v", 64, 64),
    "attention.to_out.0": ("attention/to_out", 64, 64),
    "feed_forward.w1": ("feed_forward/w1", 64, 170),
    "feed_forward.w2": ("feed_forward/w2", 170, 64),
    "feed_forward.w3": ("feed_forward/w3", 64, 170),
}
REST = {
    "all_x_embedder.2-1": ("x_embedder", 16, 64),
    "all_final_layer.2-1.linear": ("final_linear", 64, 16),
    "all_final_layer.2-1.adaLN_modulation.1": ("final_modulation", 64, 64),
    "t_embedder.mlp.0": ("t_embedder/mlp_0", 256, 1024),
    "t_embedder.mlp.2": ("t_embedder/mlp_2", 1024, 64),
    "cap_embedder.1": ("cap_embedder", 32, 64),
}
SPEC = LoraSpec(rank=3, alpha=7.0, base_model="some/model")


def tiny_model():
    """A tiny torch transformer, every trivial tensor randomised."""
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(**TINY).eval()
    for name, p in model.named_parameters():
        if p.ndim == 1 or "pad_token" in name:
            torch.nn.init.normal_(p, float("norm" in name), 0.3)
    return model


def run(model):
    """Its output on two images of different size with captions of 5 and 37 tokens."""
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(4, 1, 12, 10, generator=g), torch.randn(4, 1, 8, 16, generator=g)]
    captions = [torch.randn(n, 32, generator=g) for n in (5, 37)]
    with torch.no_grad():
        out = model(x, torch.tensor([0.2, 0.7]), captions, return_dict=False)[0]
    return torch.cat([o.flatten() for o in out]).numpy()


def random_lora(where, rank=3, stacks=LAYERS, seed=0):
    """Random a and b on the Linears `where` = {torch name: (tree path, in, out)} of `stacks`."""
    rng = np.random.default_rng(seed)
    flat = {}
    for stack, layers in stacks.items():
        for path, size_in, size_out in where.values():
            flat[f"{stack}/{path}/a"] = rng.standard_normal((layers, size_in, rank), np.float32)
            flat[f"{stack}/{path}/b"] = rng.standard_normal((layers, rank, size_out), np.float32)
    return trees.unflatten({k: v * np.float32(0.2) for k, v in flat.items()})


def every_linear(rank=3):
    """A LoRA on all Linears of the network, those outside the stacks too."""
    rng = np.random.default_rng(1)
    flat = trees.flatten(random_lora(BLOCK, rank))
    sites = {path: ((), i, o) for path, i, o in REST.values()}
    sites |= {f"{s}/adaLN_modulation": ((LAYERS[s],), 64, 256) for s in ("layers", "noise_refiner")}
    for path, (stack, size_in, size_out) in sites.items():
        flat[f"{path}/a"] = 0.2 * rng.standard_normal((*stack, size_in, rank), np.float32)
        flat[f"{path}/b"] = 0.2 * rng.standard_normal((*stack, rank, size_out), np.float32)
    return trees.unflatten(flat)


def torch_sites(lora):
    """{torch module name: (a [in, r], b [r, out])}, by the lists above."""
    flat, sites = trees.flatten(lora), {}
    for stack, layers in LAYERS.items():
        block = {**BLOCK, "adaLN_modulation.0": ("adaLN_modulation",)}
        for module, (path, *_) in block.items():
            if f"{stack}/{path}/a" in flat:
                for i in range(layers):
                    sites[f"{stack}.{i}.{module}"] = tuple(
                        flat[f"{stack}/{path}/{leaf}"][i] for leaf in "ab"
                    )
    for module, (path, *_) in REST.items():
        if f"{path}/a" in flat:
            sites[module] = (flat[f"{path}/a"], flat[f"{path}/b"])
    return sites


def shapes_of(lora):
    """The params tree a LoRA fits: `kernel` where it has a and b."""
    flat = trees.flatten(lora)
    return trees.unflatten({
        name[:-1] + "kernel": jax.ShapeDtypeStruct(
            (*a.shape[:-1], flat[name[:-1] + "b"].shape[-1]), jnp.bfloat16
        )
        for name, a in flat.items() if name.endswith("/a")
    })


def torch_file(path, lora, template, down="lora_A", up="lora_B", alpha=None, dtype=np.float32,
               metadata=None, kohya=False):
    """A LoRA file in somebody else's names; `alpha` is a number or a function of the module."""
    tensors = {}
    for module, (a, b) in torch_sites(lora).items():
        key = template.format(module.replace(".", "_") if kohya else module)
        tensors[f"{key}.{down}.weight"] = np.ascontiguousarray(a.T).astype(dtype)
        tensors[f"{key}.{up}.weight"] = np.ascontiguousarray(b.T).astype(dtype)
        if alpha is not None:
            value = alpha(module) if callable(alpha) else alpha
            tensors[f"{key}.alpha"] = np.full((), value, np.float32)
    save_file(tensors, path, metadata)
    return path

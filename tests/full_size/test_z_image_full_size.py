"""A random Z-Image transformer of the published size, 12 GB in bfloat16: here and in diffusers.

    pytest -m slow tests/full_size/test_z_image_full_size.py -s

Needs 13 GB of disk under pytest's temporary directory, 16 GB of free memory and about 20 minutes of
2 CPU cores. The model is written shard by shard; each side then runs in a process of its own, one
after the other, once with float32 and once with bfloat16 activations over the same bfloat16
weights. torch with float32 activations is the truth that the other three are compared with.
"""

import json
import shutil
import sys

import full_size
import numpy as np
import pytest

CONFIG = dict(
    all_patch_size=[2], all_f_patch_size=[1], in_channels=16, dim=3840, n_layers=30,
    n_refiner_layers=2, n_heads=30, n_kv_heads=30, norm_eps=1e-5, qk_norm=True, cap_feat_dim=2560,
    rope_theta=256.0, t_scale=1000.0, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512],
)
PARAMETERS = 6_154_908_736
MEMORY_LIMIT = 24 * 10**9
LARGEST_TENSOR = 3840 * 10240 * 2
T, CAPTION = 0.4, 40


def inputs():
    """Latents [16, 16, 16] channels last and a caption [40, 2560], both exact in bfloat16."""
    return full_size.bfloat16_numbers((16, 16, 16), (CAPTION, 2560))


def scale(name, shape):
    """Linears keep the scale of their input; norms, biases and pads are not trivial."""
    if "norm" in name or name == "cap_embedder.0.weight":
        return 1, 0.1
    return 0, shape[1] ** -0.5 if len(shape) == 2 and "pad_token" not in name else 0.1


def write(directory, out):
    from diffusers import ZImageTransformer2DModel

    full_size.write(directory, lambda: ZImageTransformer2DModel(**CONFIG), scale, PARAMETERS)


def run_torch(directory, out):
    import torch
    from diffusers import ZImageTransformer2DModel

    def forward(model, dtype):
        x, text = (torch.from_numpy(v).to(dtype) for v in inputs())
        u = model([x.permute(2, 0, 1)[:, None]], torch.tensor([T]), [text], return_dict=False)
        return u[0][0][:, 0].permute(1, 2, 0).float().numpy()

    stacks = ("layers", "noise_refiner", "context_refiner")
    return full_size.run_torch(directory, out, ZImageTransformer2DModel, stacks, forward)


def run_ours(directory, out):
    import jax.numpy as jnp

    from dopsd_jax.models.z_image import ZImageConfig, ZImageTransformer
    from dopsd_jax.weights.z_image_names import z_image_table

    config = ZImageConfig.from_json(json.loads((directory / "config.json").read_text()))
    x, caption = inputs()
    text = np.zeros((1, 64, caption.shape[1]), np.float32)
    text[0, :CAPTION] = caption
    mask = np.arange(64)[None] < CAPTION
    args = (jnp.asarray(x)[None], jnp.asarray([T], jnp.float32), jnp.asarray(text), mask)
    return full_size.run_ours(
        directory, out, lambda dtype: ZImageTransformer(config, dtype), z_image_table(config), args
    )


@pytest.fixture
def scratch(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path / "transformer", ignore_errors=True)  # 12 GB


@pytest.mark.slow
def test_full_size_transformer_loads_and_equals_diffusers(scratch):
    full_size.run_all_and_compare(
        __file__, scratch, parameters=PARAMETERS, largest_tensor=LARGEST_TENSOR,
        memory_limit=MEMORY_LIMIT,
    )


if __name__ == "__main__":
    full_size.main({"write": write, "torch": run_torch, "ours": run_ours}, *sys.argv[1:])

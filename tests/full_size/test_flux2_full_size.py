"""A random FLUX.2-klein-4B transformer of the published size, 8 GB: here and in diffusers.

    pytest -m slow tests/full_size/test_flux2_full_size.py -s

As test_z_image_full_size.py, with a reference image beside the latents. Needs 8 GB of disk under
pytest's temporary directory and 12 GB of free memory.
"""

import json
import shutil
import sys

import full_size
import pytest

CONFIG = dict(
    patch_size=1, in_channels=128, num_layers=5, num_single_layers=20, attention_head_dim=128,
    num_attention_heads=24, joint_attention_dim=7680, timestep_guidance_channels=256,
    mlp_ratio=3.0, axes_dims_rope=[32, 32, 32, 32], rope_theta=2000, eps=1e-6,
    guidance_embeds=False,
)
PARAMETERS = 3_875_544_576
MEMORY_LIMIT = 12 * 10**9
LARGEST_TENSOR = 3072 * (3 * 3072 + 2 * 9216) * 2
SIGMA, TEXT = 0.25, 40  # exact in bfloat16, and so is 1000 sigma: torch rounds both


def inputs():
    """Latents [8, 8, 128], a reference [6, 4, 128] and text [40, 7680], exact in bfloat16."""
    return full_size.bfloat16_numbers((8, 8, 128), (6, 4, 128), (TEXT, 7680))


def scale(name, shape):
    """Linears keep the scale of their input; gates stay small; norms are not trivial."""
    if len(shape) == 1:
        return 1, 0.1
    return 0, shape[1] ** -0.5 * (0.3 if "modulation" in name else 1)


def write(directory, out):
    from diffusers import Flux2Transformer2DModel

    full_size.write(directory, lambda: Flux2Transformer2DModel(**CONFIG), scale, PARAMETERS)


def run_torch(directory, out):
    import torch
    from diffusers import Flux2Transformer2DModel

    def forward(model, dtype):
        x, reference, text = (torch.from_numpy(v).to(dtype) for v in inputs())
        one = torch.arange(1)

        def ids(t, image):
            rows, columns, _ = image.shape
            return torch.cartesian_prod(torch.tensor([t]), torch.arange(rows),
                                        torch.arange(columns), one)

        u = model(
            hidden_states=torch.cat([x.reshape(1, -1, 128), reference.reshape(1, -1, 128)], 1),
            encoder_hidden_states=text[None], timestep=torch.tensor([SIGMA]).to(dtype),
            img_ids=torch.cat([ids(0, x), ids(10, reference)]),
            txt_ids=torch.cartesian_prod(one, one, one, torch.arange(TEXT)), return_dict=False,
        )[0]
        return u[0, :64].reshape(8, 8, 128).float().numpy()

    stacks = ("transformer_blocks", "single_transformer_blocks")
    return full_size.run_torch(directory, out, Flux2Transformer2DModel, stacks, forward)


def run_ours(directory, out):
    import jax.numpy as jnp

    from dopsd_jax.models.denoiser import reference_tokens
    from dopsd_jax.models.flux2 import Flux2Config, Flux2Transformer
    from dopsd_jax.weights.flux2_names import flux2_table

    config = Flux2Config.from_json(json.loads((directory / "config.json").read_text()))
    x, reference, text = (jnp.asarray(v)[None] for v in inputs())
    args = (x, jnp.asarray([SIGMA], jnp.float32), text, *reference_tokens([reference]))
    return full_size.run_ours(
        directory, out, lambda dtype: Flux2Transformer(config, dtype), flux2_table(config), args
    )


@pytest.fixture
def scratch(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path / "transformer", ignore_errors=True)  # 8 GB


@pytest.mark.slow
def test_full_size_transformer_loads_and_equals_diffusers(scratch):
    full_size.run_all_and_compare(
        __file__, scratch, parameters=PARAMETERS, largest_tensor=LARGEST_TENSOR,
        memory_limit=MEMORY_LIMIT,
    )


if __name__ == "__main__":
    full_size.main({"write": write, "torch": run_torch, "ours": run_ours}, *sys.argv[1:])

"""The method on Z-Image beside a plain torch loop of it: diffusers' transformer, AdamW, and as
adapters peft's LoRA and DoRA, and lycoris' LoKr.

There t = 1 - sigma runs from 0 to 1 and the output points from noise to data. The weights travel
through save_pretrained and our loader.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from method_oracle import UPDATES, Case, OurRun, TorchRun, compare, to_tree

from dopsd_jax.core import trees
from dopsd_jax.method import lora
from dopsd_jax.method.flow import sigmas_shifted
from dopsd_jax.models.denoiser import Context
from dopsd_jax.models.z_image import ZImageConfig, ZImageTransformer
from dopsd_jax.models.z_image_denoiser import ZImageDenoiser
from dopsd_jax.weights.load import load_tree, weight_files
from dopsd_jax.weights.shapes import transformer_shapes
from dopsd_jax.weights.z_image_names import Z_IMAGE_TARGETS, z_image_table

TINY = dict(
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=64, n_layers=2,
    n_refiner_layers=1, n_heads=4, n_kv_heads=4, norm_eps=1e-5, qk_norm=True, cap_feat_dim=32,
    rope_theta=256.0, t_scale=1000.0, axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
)
PUBLISHED_TARGETS = [
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
]
OTHER_TARGETS = ["attention.to_q", "feed_forward.w1"]  # fewer compile faster
STUDENT_LENGTHS, TEACHER_LENGTHS = (5, 37), (45, 70)

CASES = {
    "x0, EMA, clipped, warm-up": Case("x0", "ema", 4, 0.01, 3, 0.01),
    "velocity, frozen teacher": Case("velocity", "frozen", 3, 1e3, 0, 0.1),
    # Where b starts at zero, Adam's first update is a gradient's sign; the larger eps keeps the
    # rounding of gradients near zero out of it.
    "x0, live teacher, b from zero": Case("x0", "live", 2, 1e3, 0, 0.1, zero_b=True, eps=1e-3),
    "x0, an anchor and a row that keeps": Case(
        "x0", "ema", 3, 0.01, 3, 0.01, anchor=0.5, kept=(False, True)
    ),
    "x0, untuned teacher": Case("x0", "untuned", 2, 1e3, 0, 0.1),
    "DoRA": Case("x0", "ema", 2, 1e3, 0, 0.01, kind="dora"),
    "LoKr": Case("x0", "ema", 2, 1e3, 0, 0.01, kind="lokr"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with tiny random weights, no tensor of them trivial."""
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(**TINY)
    for name, p in model.named_parameters():
        if p.ndim == 1 or "pad_token" in name:
            torch.nn.init.normal_(p, float("norm" in name), 0.3)
    directory = tmp_path_factory.mktemp("z_image")
    model.save_pretrained(directory)
    return directory


def make_data():
    """Noise and ragged captions of every update, channels last, padded for ours."""
    rng = np.random.default_rng(1)

    def captions(lengths):
        return [rng.standard_normal((n, 32), np.float32) for n in lengths]

    return [
        {
            "noise": rng.standard_normal((2, 8, 12, 4), np.float32),
            "student": captions(STUDENT_LENGTHS), "teacher": captions(TEACHER_LENGTHS),
        }
        for _ in range(UPDATES)
    ]


class ZImageRun(TorchRun):
    end = 1.0

    def times(self):
        return 1 - torch.from_numpy(sigmas_shifted(self.case.num_steps, 3.0))

    def start(self, noise):
        return noise.permute(0, 3, 1, 2)

    def out(self, x, t, captions):
        out = self.model(
            list(x[:, :, None]), t.expand(len(x)), [torch.from_numpy(c) for c in captions],
            return_dict=False,
        )[0]
        return torch.stack(out)[:, :, 0]


def context(captions, role):
    """Captions padded to one length per role, with garbage behind their ends."""
    length = {"student": 64, "teacher": 96}[role]
    text = np.full((len(captions), length, 32), 3.0, np.float32)
    mask = np.zeros((len(captions), length), bool)
    for row, c in enumerate(captions):
        text[row, : len(c)], mask[row, : len(c)] = c, True
    return Context(jnp.asarray(text), jnp.asarray(mask))


@pytest.mark.parametrize("name", CASES)
def test_five_updates_equal_plain_torch(base, name):
    case = CASES[name]
    targets = PUBLISHED_TARGETS if case.kind == "lora" else OTHER_TARGETS
    theirs = ZImageRun(ZImageTransformer2DModel.from_pretrained(base), targets, case)
    start = jax.tree.map(np.copy, to_tree(theirs.student))
    config = ZImageConfig.from_json(ZImageTransformer2DModel.load_config(base))
    denoiser = ZImageDenoiser(ZImageTransformer(config))
    shapes = transformer_shapes(denoiser.network)
    params = load_tree(weight_files(base), z_image_table(config), shapes)
    # The published list of names and our preset must select the same linear layers.
    matched = lora.match_targets(shapes, Z_IMAGE_TARGETS["published"])
    if case.kind == "lora":
        assert {n.removesuffix("/kernel") for n in matched} == {
            n.rsplit("/", 1)[0] for n in trees.flatten(start)
        }
    ours = OurRun(denoiser.velocity, params, case, start, sigmas_shifted(case.num_steps, 3.0),
                  context)
    # Seven linears or two, three stacks; a LoKr's second factor is whole in the first of the two.
    leaves = {"lora": 2 * 7, "dora": 3 * 2, "lokr": 2 + 3}[case.kind]
    compare(name, case, theirs, ours, start, make_data(), leaves * 3)

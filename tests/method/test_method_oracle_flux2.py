"""The recipes edit and edit_ref on FLUX.2 beside a plain torch loop: diffusers, peft, AdamW.

There t = sigma runs from 1 to 0 and the output is the velocity. What the roles see comes from
`contexts.Recipe`, and the tokens of torch's side are put together here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from method_oracle import UPDATES, Case, OurRun, TorchRun, compare, to_tree

from dopsd_jax.core import trees
from dopsd_jax.method import lora
from dopsd_jax.method.contexts import RECIPES, with_latents
from dopsd_jax.method.flow import sigmas_reference, sigmas_shifted
from dopsd_jax.models.denoiser import Context
from dopsd_jax.models.flux2 import Flux2Config, Flux2Transformer
from dopsd_jax.models.flux2_denoiser import Flux2Denoiser
from dopsd_jax.weights.flux2 import empirical_shift
from dopsd_jax.weights.flux2_names import FLUX2_TARGETS, flux2_table
from dopsd_jax.weights.load import load_tree, weight_files
from dopsd_jax.weights.shapes import transformer_shapes

TINY = dict(
    patch_size=1, in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16,
    num_attention_heads=3, joint_attention_dim=24, timestep_guidance_channels=256, mlp_ratio=3.0,
    axes_dims_rope=(4, 4, 4, 4), rope_theta=2000, eps=1e-6, guidance_embeds=False,
)
# As the published scripts name them; the last four exist in FLUX.1 alone and match nothing.
PUBLISHED_TARGETS = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
    "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
    "ff_context.net.2",
]
ALL_TARGETS = [
    *PUBLISHED_TARGETS[:8], "ff.linear_in", "ff.linear_out", "ff_context.linear_in",
    "ff_context.linear_out", "attn.to_qkv_mlp_proj",
    "single_transformer_blocks.0.attn.to_out", "single_transformer_blocks.1.attn.to_out",
]
h, w = 4, 6

CASES = {
    "edit, x0, EMA, clipped, warm-up": (
        "edit", "published", "shifted", Case("x0", "ema", 4, 0.01, 3, 0.01)),
    "edit, all targets, live teacher, b from zero": (
        "edit", "all", "shifted", Case("x0", "live", 2, 1e3, 0, 0.1, zero_b=True, eps=1e-3)),
    "edit_ref, x0, EMA, published schedule": (
        "edit_ref", "published", "reference", Case("x0", "ema", 4, 1e3, 0, 0.01)),
    "edit_ref, velocity, frozen teacher": (
        "edit_ref", "published", "shifted", Case("velocity", "frozen", 3, 1e3, 0, 0.1)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with tiny random weights, no tensor of them trivial."""
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(**TINY)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1.0, 0.3)
        elif "modulation" not in name:  # references and words are seen by attention alone
            torch.nn.init.normal_(p, 0.0, 1.5 / p.shape[1] ** 0.5)
    directory = tmp_path_factory.mktemp("flux2")
    model.save_pretrained(directory)
    return directory


def make_data(recipe):
    """Noise, texts and reference latents of every update: two references and a target."""
    rng = np.random.default_rng(1)
    references = 2 if recipe == "edit_ref" else 0

    def draw(*shape):
        return rng.standard_normal((2, *shape), np.float32)

    made = []
    for _ in range(UPDATES):
        images = [draw(h, w, 8) for _ in range(references + 1)]
        student = (draw(7, 24), images[:-1])
        teacher = (draw(7, 24), images)
        made.append({"noise": draw(h, w, 8), "student": student, "teacher": teacher})
    return made


class Flux2Run(TorchRun):
    end = 0.0

    def __init__(self, *args, sigmas):
        super().__init__(*args)
        self.sigmas = sigmas

    def times(self):
        return torch.from_numpy(self.sigmas)

    def start(self, noise):
        return noise.reshape(2, h * w, 8)

    def out(self, x, t, context):
        text, images = context
        tokens = [x, *(torch.from_numpy(z).reshape(2, h * w, 8) for z in images)]
        one = torch.arange(1)

        def ids(place):
            return torch.cartesian_prod(torch.tensor([10 * place]), torch.arange(h),
                                        torch.arange(w), one)

        return self.model(
            hidden_states=torch.cat(tokens, 1), encoder_hidden_states=torch.from_numpy(text),
            timestep=t.expand(2), img_ids=torch.cat([ids(i) for i in range(len(tokens))]),
            txt_ids=torch.cartesian_prod(one, one, one, torch.arange(text.shape[1])),
            return_dict=False,
        )[0][:, : h * w]


@pytest.mark.parametrize("name", CASES)
def test_five_updates_equal_plain_torch(base, name):
    recipe, preset, schedule, case = CASES[name]
    shift = empirical_shift(case.num_steps, h * w)
    sigmas = {"shifted": sigmas_shifted, "reference": sigmas_reference}[schedule](
        case.num_steps, shift
    )
    targets = {"published": PUBLISHED_TARGETS, "all": ALL_TARGETS}[preset]
    theirs = Flux2Run(Flux2Transformer2DModel.from_pretrained(base), targets, case, sigmas=sigmas)
    start = jax.tree.map(np.copy, to_tree(theirs.student))
    config = Flux2Config.from_json(Flux2Transformer2DModel.load_config(base))
    denoiser = Flux2Denoiser(Flux2Transformer(config))
    shapes = transformer_shapes(denoiser.network)
    params = load_tree(weight_files(base), flux2_table(config), shapes)
    # The published list of names and our preset must select the same linear layers.
    matched = lora.match_targets(shapes, FLUX2_TARGETS[preset])
    assert {n.removesuffix("/kernel") for n in matched} == {
        n.rsplit("/", 1)[0] for n in trees.flatten(start)
    }

    def context(seen, role):
        text, images = seen
        ctx = Context(jnp.asarray(text), jnp.ones(text.shape[:2], bool))
        references = len(images) - (role == "teacher")
        shown = RECIPES[recipe].shown(role, references)
        assert shown == tuple(range(len(images)))
        return with_latents(ctx, [images[i] for i in shown]) if shown else ctx

    ours = OurRun(denoiser.velocity, params, case, start, sigmas, context)
    leaves = 2 * {"published": 8, "all": 14}[preset]
    compare(name, case, theirs, ours, start, make_data(recipe), leaves)

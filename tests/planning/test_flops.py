"""FLOPs by formula beside XLA's own count, on toys without loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopsd_jax.core import trees
from dopsd_jax.method import lora
from dopsd_jax.method.train_step import Batch, Method, dopsd
from dopsd_jax.models.denoiser import Context
from dopsd_jax.models.flux2 import Flux2Config, Flux2Transformer
from dopsd_jax.models.flux2_denoiser import Flux2Denoiser
from dopsd_jax.models.z_image import ZImageConfig, ZImageTransformer
from dopsd_jax.models.z_image_denoiser import ZImageDenoiser
from dopsd_jax.planning import flops
from dopsd_jax.weights.shapes import transformer_shapes
from dopsd_jax.weights.z_image_names import Z_IMAGE_TARGETS

# Wide enough that products are nearly all there is to count.
Z_IMAGE = ZImageDenoiser(ZImageTransformer(ZImageConfig(
    in_channels=16, dim=384, n_layers=2, n_refiner_layers=1, n_heads=4, cap_feat_dim=256,
    axes_dims=(32, 32, 32), axes_lens=(512, 64, 64),
), remat="none"))
FLUX2 = Flux2Denoiser(Flux2Transformer(
    Flux2Config(2, 2, 3, 256, in_channels=32), remat="none"
))
SIDE = {"z_image": 16, "flux2": 8}
CASES = {"z_image": Z_IMAGE, "flux2": FLUX2}
TARGETS = {"z_image": Z_IMAGE_TARGETS["published"], "flux2": (r".*_blocks/attn/.*/kernel",)}


def context(denoiser, length):
    return Context(jax.ShapeDtypeStruct((1, length, denoiser.text_width), jnp.float32),
                   jax.ShapeDtypeStruct((1, length), bool))


@pytest.mark.parametrize("name", CASES)
def test_the_forward_pass_is_counted_as_xla_counts_it(name):
    denoiser, side = CASES[name], SIDE[name]
    params = transformer_shapes(denoiser.network)
    x = jax.ShapeDtypeStruct((1, side, side, denoiser.network.config.in_channels), jnp.float32)
    counted = jax.jit(denoiser.velocity).lower(
        {"params": params}, x, jax.ShapeDtypeStruct((), jnp.float32), context(denoiser, 64)
    ).cost_analysis()["flops"]
    ours = flops.forward(denoiser, params, None, image=64, text=64)
    assert ours.lora == 0
    assert ours.total == pytest.approx(counted, rel=0.03)
    assert ours.total < counted  # what is no product is left out


@pytest.mark.parametrize("trainable, anchor", [("lora", 0.0), ("full", 0.0), ("lora", 1.0)])
def test_a_step_is_counted_as_xla_counts_it(trainable, anchor):
    method = Method(trainable=trainable, anchor=anchor)
    params = transformer_shapes(Z_IMAGE.network)
    low_rank = None
    if trainable == "lora":
        low_rank = jax.eval_shape(
            lambda: lora.init(jax.random.key(0), params, Z_IMAGE_TARGETS["published"], 16)
        )
    trained, base = (low_rank, {"params": params}) if low_rank is not None else (params, None)
    noise = jax.ShapeDtypeStruct((1, 16, 16, 16), jnp.float32)
    batch = Batch(noise, context(Z_IMAGE, 64), context(Z_IMAGE, 96), np.float32([1, 0]))
    counted = jax.jit(dopsd(method, Z_IMAGE.velocity)).lower(
        trained, trained, base, batch
    ).cost_analysis()["flops"]
    student, teacher = (
        flops.forward(Z_IMAGE, params, low_rank, image=64, text=n) for n in (64, 96)
    )
    retained = flops.forward(Z_IMAGE, params, None, image=64, text=64) if anchor else None
    step = flops.train_step(student, teacher, 1, trainable, "none", retained)
    assert ("retained forward" in step.parts) == bool(anchor)
    # Nothing needs the gradient of the first layers' inputs, which a formula per layer counts.
    assert step.useful == step.computed == pytest.approx(counted, rel=0.08)


def test_steps_multiply_and_what_is_done_twice_is_no_use():
    student, teacher = flops.Count(100.0, 10.0, 30.0), flops.Count(200.0, 20.0, 60.0)
    step = flops.train_step(student, teacher, 4, "lora", "full")
    assert step.parts == {
        "teacher forward": 1120, "student forward": 560, "student backward": 4 * (120 + 60),
        "recomputed": 560,
    }
    assert step.useful == step.computed - 560
    assert step.attention == 4 * (3.5 * 30 + 30 + 60)
    full = flops.train_step(student, None, 4, "full", "none")
    assert full.parts["student backward"] == 4 * (110 + 100 + 60)
    assert full.parts["teacher forward"] == full.parts["recomputed"] == 0


def test_matmuls_computes_again_what_a_norm_of_z_image_takes():
    count = flops.Count(36.0, 0.0, 0.0, Z_IMAGE.passes(64, 64).matmuls_again)
    full, matmuls, linears = (
        flops.train_step(count, None, 1, "lora", remat).parts["recomputed"]
        for remat in ("full", "matmuls", "linears")
    )
    kernels = {
        name.split("/")[-2]: x.size for name, x in
        trees.flatten(transformer_shapes(ZImageTransformer(ZImageConfig()))["layers"]).items()
        if name.endswith("kernel") and "adaLN" not in name
    }
    again = kernels["to_out"] + kernels["w2"]
    assert full == 36 and linears == 0
    assert matmuls == pytest.approx(36 * again / sum(kernels.values()))


def test_a_layer_of_which_nothing_is_known_is_named():
    params = transformer_shapes(Z_IMAGE.network)
    params["strange"] = {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    with pytest.raises(ValueError, match=r"pass through \['strange/kernel'\]"):
        flops.forward(Z_IMAGE, params, None, image=64, text=64)

"""What stands for comparison: flow matching against torch, and its runs by the train command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from dopsd_jax import train as train_lib
from dopsd_jax.core import trees
from dopsd_jax.core.checkpoints import Checkpoints
from dopsd_jax.core.metrics import read_metrics
from dopsd_jax.encode import encode
from dopsd_jax.method import baselines
from dopsd_jax.method.train_step import Batch, Method, sft
from dopsd_jax.models.z_image import ZImageConfig
from dopsd_jax.run import loras
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.pipeline import load_pipeline
from dopsd_jax.weights.z_image import Z_IMAGE

Z_IMAGE_MODULES = Z_IMAGE.modules(ZImageConfig())


def linear(variables, x, sigma, ctx):
    """A velocity with few, known numbers."""
    p = variables["params"]
    return x @ p["kernel"] + sigma[:, None, None, None] * p["bias"]


@pytest.mark.parametrize("parts", [1, 2])
def test_sft_is_flow_matching_as_torch_computes_it(parts):
    rng = np.random.default_rng(0)
    noise, latents = rng.standard_normal((2, 4, 3, 3, 2)).astype(np.float32)
    sigma = np.float32([0.2, 0.5, 0.9, 1.0])
    params = {"kernel": rng.standard_normal((2, 2)).astype(np.float32),
              "bias": rng.standard_normal(2).astype(np.float32)}
    method = Method(trainable="full", accumulation=parts)
    batch = Batch(jnp.asarray(noise), None, None, jnp.zeros(3), jnp.asarray(latents),
                  jnp.asarray(sigma))
    grads, metrics = jax.jit(sft(method, linear))(params, params, None, batch)

    k, b = (torch.tensor(params[n], requires_grad=True) for n in ("kernel", "bias"))
    x0, x1 = torch.tensor(latents), torch.tensor(noise)
    s = torch.tensor(sigma)[:, None, None, None]
    loss = torch.nn.functional.mse_loss(((1 - s) * x0 + s * x1) @ k + s * b, x1 - x0)
    loss.backward()
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
    np.testing.assert_allclose(grads["kernel"], k.grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads["bias"], b.grad, rtol=1e-4, atol=1e-6)


def test_noise_levels_are_uniform_before_the_shift_and_a_function_of_the_step():
    key = jax.random.key(3)
    sigma = np.asarray(baselines.draw_sigma(key, 5, 4000, 3.0))
    assert sigma.min() > 0 and sigma.max() <= 1
    u = sigma / (3 - 2 * sigma)  # the shift undone
    np.testing.assert_allclose(np.quantile(u, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)
    np.testing.assert_array_equal(sigma, baselines.draw_sigma(key, 5, 4000, 3.0))
    assert np.any(sigma != baselines.draw_sigma(key, 6, 4000, 3.0))


def student(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    tree = checkpoints.restore_part(("student",), 2)["student"]
    checkpoints.close()
    return trees.flatten(tree)


def test_sft_trains_without_a_vlm_and_its_pictures_have_no_teacher(short_run, tmp_path):
    short_run.objective, short_run.vlm = "sft", ""
    train_lib.train(short_run, tmp_path / "run")
    assert any(np.any(x) for n, x in student(tmp_path / "run").items() if n.endswith("/b"))
    rows = read_metrics(tmp_path / "run")
    assert [r["step"] for r in rows] == [1, 2] and "step_loss" not in rows[0]
    width = Image.open(tmp_path / "run" / "samples" / "step_000002.png").width
    assert width == 3 * (64 + 4) + 4  # target, base, student
    assert train_lib.train(short_run, tmp_path / "run") is None


def test_a_cache_holds_the_latents_that_a_run_reads(short_run, tmp_path):
    short_run.objective, short_run.vlm = "sft", ""
    train_lib.train(short_run, tmp_path / "plain")
    short_run.cache = str(tmp_path / "cache")
    made, total = encode(short_run)
    assert made == total == 4  # two captions, two images
    train_lib.train(short_run, tmp_path / "cached")
    for name, want in student(tmp_path / "plain").items():
        np.testing.assert_array_equal(student(tmp_path / "cached")[name], want, err_msg=name)


@pytest.mark.parametrize("states", ["teacher", "noised"])
def test_off_policy_runs_learn_something_else(short_run, tmp_path, states):
    short_run.sample_every = 0
    train_lib.train(short_run, tmp_path / "on")
    short_run.states = states
    train_lib.train(short_run, tmp_path / "off")
    on, off = student(tmp_path / "on"), student(tmp_path / "off")
    assert any(np.any(on[n] != off[n]) for n in on)
    assert all(np.isfinite(x).all() for x in off.values())


def test_a_base_lora_is_in_the_weights_while_training(short_run, tiny, tmp_path):
    """The first loss is the one of a model whose kernels hold the LoRA."""
    pipe = load_pipeline(tiny.pipeline, dtype="float32", parts=("transformer",))
    short_run.objective, short_run.vlm, short_run.sample_every = "sft", "", 0
    train_lib.train(short_run, tmp_path / "first")
    tree, scale = loras.read_lora(tmp_path / "first", pipe)
    tree = jax.tree.map(lambda x: 50 * np.asarray(x), tree)  # far enough to be seen
    file = tmp_path / "adapter.safetensors"
    rank = short_run.lora.rank
    lora_files.save_diffusers(
        file, tree, lora_files.LoraSpec(rank, scale * rank, ""), Z_IMAGE_MODULES
    )
    short_run.base_lora = str(file)
    train_lib.train(short_run, tmp_path / "second")
    first, second = (read_metrics(tmp_path / n)[0]["loss"] for n in ("first", "second"))
    assert abs(first - second) > 1e-3 * first
    short_run.base_lora = str(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="base_lora: expected a LoRA file or a run's"):
        train_lib.train(short_run, tmp_path / "third")
    short_run.base_lora, short_run.trainable = str(file), "full"
    with pytest.raises(ValueError, match="base_lora: expected nothing with trainable = full"):
        train_lib.train(short_run, tmp_path / "third")

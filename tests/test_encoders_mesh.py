"""Encoders whose weights are split over four CPU devices beside the same ones on one."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from dopsd_jax.core import sharding
from dopsd_jax.method import contexts
from dopsd_jax.weights.pipeline import load_pipeline, load_vision_language
from tests.commands import ROOT, environment


def features(directory, vlm, mesh):
    """What student and teacher see of a caption and an image, and how the weights lie."""
    pipe = load_pipeline(directory, dtype="float32", parts=("text_encoder",), encoder_mesh=mesh)
    found = [contexts.text_context(pipe, ["a cat"], length=64 if vlm else 512)]
    weights = [pipe.text_params]
    if vlm:
        vl = load_vision_language(vlm, pipe, dtype="float32")
        image = np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)
        found.append(contexts.vlm_context(pipe, vl, ["a cat"], image, length=672))
        weights.append(vl.params)
    split = [np.mean(["fsdp" in x.sharding.spec for x in jax.tree.leaves(w)]) if mesh else 0.0
             for w in weights]
    bytes_here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(weights))
    return [np.asarray(ctx.text) for ctx in found], split, bytes_here


def in_child(directory, vlm):
    jax.config.update("jax_default_matmul_precision", "highest")
    sharding.MIN_SHARDED_SIZE = 1
    alone, _, whole = features(directory, vlm, None)
    spread, split, part = features(directory, vlm, sharding.own_mesh())
    errors = [float(np.abs(a - b).max() / np.abs(a).max())
              for a, b in zip(alone, spread, strict=True)]
    print(json.dumps({"errors": errors, "split": split, "part": part / whole}))


@pytest.mark.parametrize("family", ["z_image", "flux2"])
def test_split_encoders_say_the_same(family, tiny, tiny_flux2):
    directory, vlm = (tiny.pipeline, tiny.vlm) if family == "z_image" else (tiny_flux2, "")
    done = subprocess.run(
        [sys.executable, __file__, str(directory), str(vlm)], cwd=ROOT, capture_output=True,
        text=True, check=False, env=environment(
            JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=4"
        ),
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert max(got["errors"]) < 2e-6, got
    assert min(got["split"]) > 0.3 and got["part"] < 0.6, got  # norms and biases stay whole


if __name__ == "__main__":
    in_child(*sys.argv[1:])

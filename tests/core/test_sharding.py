"""Rules of placement: every array of every network has one, and what it says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dopsd_jax.core import sharding, trees
from dopsd_jax.method import lora
from dopsd_jax.method.moments import blocks
from dopsd_jax.method.train_step import init_state, make_optimizer
from dopsd_jax.models.flux2 import Flux2Config, Flux2Transformer
from dopsd_jax.models.flux2_vae import Flux2Vae, Flux2VaeConfig
from dopsd_jax.models.qwen3_vl import VisionTower
from dopsd_jax.models.z_image import ZImageConfig, ZImageTransformer
from dopsd_jax.weights.pipeline import load_pipeline, read_vl_config
from dopsd_jax.weights.shapes import text_shapes, transformer_shapes, vae_shapes, vision_shapes
from dopsd_jax.weights.z_image_names import Z_IMAGE_TARGETS

Z_IMAGE = ZImageTransformer(ZImageConfig.turbo(), jnp.bfloat16)


def mesh(data=1, fsdp=16, tensor=1):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def specs(mesh, shapes):
    return {k: v.spec for k, v in trees.flatten(sharding.shard(mesh, shapes)).items()}


# Where the arrays of both families and their encoders lay when one table of regexes knew all of
# them: by the end of a name, the first that matches.
RECORDED = (
    (r"(to_q|to_k|to_v|add_[qkv]_proj|w1|w3|[qkv]_proj|gate_proj|up_proj|linear_fc1)/kernel",
     ("fsdp", "tensor")),
    (r"(to_out|to_add_out|w2|o_proj|down_proj|linear_fc2)/kernel", ("tensor", "fsdp")),
    (r"kernel|embed_tokens|a", ("fsdp", None)),
    (r"b", (None, "fsdp")),
    (r"scale|bias|bn_mean|bn_var|\w+_pad_token|pos_embed|step|rng|count", ()),
)


def networks():
    pipe = load_pipeline("mini", parts=())
    yield transformer_shapes(Z_IMAGE)
    for config in (Flux2Config.klein_4b(), Flux2Config.klein_9b()):
        yield transformer_shapes(Flux2Transformer(config, jnp.bfloat16))
    yield text_shapes(pipe.text_encoder)
    yield vae_shapes(pipe.vae)
    yield vae_shapes(Flux2Vae(Flux2VaeConfig((8, 16), 1, 4, 4, 1e-4)))
    yield vision_shapes(VisionTower(read_vl_config("mini").vision))


def test_the_rules_account_for_every_parameter_of_every_network():
    for shapes in networks():
        assert trees.flatten(sharding.shard(mesh(), shapes)).keys() == trees.flatten(shapes).keys()


@pytest.mark.parametrize("least", [1, sharding.MIN_SHARDED_SIZE])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8), (1, 3, 2), (8, 1, 1)])
def test_every_array_lies_where_it_lay(tiny, tiny_flux2, monkeypatch, sizes, least):
    """Of both families, tiny and as published, with a LoRA on every linear."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", least)
    tinies = (load_pipeline(path, parts=()) for path in (tiny.pipeline, tiny_flux2))
    shapes = [*networks(), *(transformer_shapes(pipe.denoiser.network) for pipe in tinies)]
    low_rank = [
        jax.eval_shape(lambda x=x: lora.init(jax.random.key(0), x, [".*/to_.*/kernel"], 8))
        for x in (shapes[0], shapes[1], *shapes[-2:])
    ]
    arrays = [pair for tree in (*shapes, *low_rank) for pair in trees.flatten(tree).items()]
    found = [sharding.spec_of(name, x.shape, mesh(*sizes)) for name, x in arrays]

    def recorded(name):
        return next(a for p, a in RECORDED if re.search(rf"(^|/)({p})$", name))

    monkeypatch.setattr(sharding, "_axes_of", recorded)
    assert found == [sharding.spec_of(name, x.shape, mesh(*sizes)) for name, x in arrays]


def test_linears_are_split_and_vectors_are_not():
    found = specs(mesh(), transformer_shapes(Z_IMAGE))
    assert found["layers/attention/to_q/kernel"] == P(None, "fsdp", None)
    assert found["layers/feed_forward/w2/kernel"] == P(None, None, "fsdp")
    assert found["layers/attention_norm1/scale"] == found["x_pad_token"] == P()
    assert found["layers/adaLN_modulation/bias"] == P()  # large as a stack, small as a layer
    both = specs(mesh(2, 2, 4), transformer_shapes(Z_IMAGE))
    assert both["layers/attention/to_q/kernel"] == P(None, "fsdp", "tensor")
    assert both["layers/feed_forward/w2/kernel"] == P(None, "tensor", "fsdp")


def test_an_axis_that_does_not_divide_gives_way_to_the_other():
    found = specs(mesh(fsdp=256), transformer_shapes(Z_IMAGE))
    assert found["x_embedder/kernel"] == P(None, "fsdp")  # [64, 3840]
    odd = {"kernel": jax.ShapeDtypeStruct((1023, 1023), jnp.float32)}
    assert specs(mesh(), odd)["kernel"] == P()


def test_trained_trees_moments_and_averages_lie_like_their_parameters():
    optimizer = make_optimizer(
        learning_rate=1e-4, warmup_steps=0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0,
        max_grad_norm=1.0,
    )
    shapes = transformer_shapes(Z_IMAGE)

    def state(trained):
        return init_state(trained, optimizer, jnp.zeros(2, jnp.uint32))

    targets = Z_IMAGE_TARGETS["published"]
    low_rank = jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes, targets, 64))
    for trained in (shapes, low_rank):
        placed = sharding.shard(mesh(), jax.eval_shape(state, trained))
        want = sharding.shard(mesh(), trained)
        assert want == placed.student == placed.teacher
        adam = placed.opt_state[1][0]
        assert adam.mu == adam.nu == want
        assert placed.step.spec == adam.count.spec == P()
    per_chip = sum(
        np.prod(NamedSharding(mesh(), s.spec).shard_shape(x.shape)) for s, x in
        zip(jax.tree.leaves(want), jax.tree.leaves(trained), strict=True)
    )
    assert per_chip == trees.count(trained) / 16


@pytest.mark.parametrize("chips", [4, 16])
def test_a_smaller_rank_needs_no_more_of_a_chip(chips):
    shapes = transformer_shapes(Z_IMAGE)

    def per_chip(rank):
        targets = Z_IMAGE_TARGETS["published"]
        made = jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes, targets, rank))
        placed = sharding.shard(mesh(fsdp=chips), made)
        return sum(
            np.prod(where.shard_shape(x.shape)) for where, x in
            zip(jax.tree.leaves(placed), jax.tree.leaves(made), strict=True)
        )

    found = [per_chip(rank) for rank in (4, 8, 16, 32, 64)]
    assert found == sorted(found)
    assert found[-3] == found[-1] / 4  # all of rank 16 is split, as all of rank 64 is


def test_quantised_moments_lie_like_their_parameters():
    optimizer = make_optimizer(
        learning_rate=1e-4, warmup_steps=0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0,
        max_grad_norm=1.0, moments_dtype="int8",
    )
    shapes = transformer_shapes(Z_IMAGE)
    targets = Z_IMAGE_TARGETS["published"]
    for trained in (shapes, jax.eval_shape(
        lambda: lora.init(jax.random.key(0), shapes, targets, 64)
    )):
        want = trees.flatten(sharding.shard(mesh(), trained))
        adam = sharding.shard(mesh(), jax.eval_shape(optimizer.init, trained))[1][0]
        for moment in (adam.mu, adam.nu):
            parts = trees.flatten(moment)
            for name, x in trees.flatten(trained).items():  # no block lies on two chips
                per_chip = NamedSharding(mesh(), want[name].spec).shard_shape(x.shape)
                for axis, size in (
                    blocks(x.shape, sharding.fsdp_axis(name, len(x.shape))) or {}
                ).items():
                    assert per_chip[axis] % size == 0, name
            assert {n: getattr(x, "qvalue", x) for n, x in parts.items()} == want
        if trained is shapes:  # scales are split, too, where they are not small
            w1 = trees.flatten(adam.mu)["layers/feed_forward/w1/kernel"]
            assert w1.scale.spec == P(None, "fsdp", None)


def test_an_array_without_a_rule_is_named():
    shapes = {"layers": {"rotation": jax.ShapeDtypeStruct((3, 4), jnp.float32),
                         "to_q": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)},
                         "kernels": jax.ShapeDtypeStruct((5,), jnp.float32)}}
    with pytest.raises(ValueError, match=r"no sharding rule accounts for: layers/kernels \(5,\), "
                                         r"layers/rotation \(3, 4\); add one to RULES"):
        sharding.shard(mesh(), shapes)

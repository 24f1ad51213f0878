"""LoRA trees: targets, init, scale, merge, EMA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopsd_jax.core import trees
from dopsd_jax.method import lora
from dopsd_jax.models.flux2 import Flux2Config, Flux2Transformer
from dopsd_jax.models.z_image import ZImageConfig, ZImageTransformer
from dopsd_jax.weights.flux2_names import FLUX2_TARGETS
from dopsd_jax.weights.shapes import transformer_shapes
from dopsd_jax.weights.z_image_names import Z_IMAGE_TARGETS

TINY = ZImageConfig(
    in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, cap_feat_dim=16,
    axes_dims=(4, 6, 6), axes_lens=(128, 64, 64),
)


def network_args(config, shape=jax.ShapeDtypeStruct):
    return (
        shape((2, 8, 8, config.in_channels), jnp.float32), shape((2,), jnp.float32),
        shape((2, 32, config.cap_feat_dim), jnp.float32), shape((2, 32), jnp.bool_),
    )


def shapes_of(config):
    init = ZImageTransformer(config).init
    return jax.eval_shape(init, jax.random.key(0), *network_args(config))["params"]


def draw(tree, seed, std=0.3):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten(
        [jnp.asarray(std * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    )


@pytest.fixture(scope="module")
def network():
    """(variables -> output, params) of a tiny Z-Image."""
    rng = np.random.default_rng(0)
    x, t, text, mask = network_args(TINY, lambda s, d: jnp.asarray(rng.uniform(0, 1, s), d))
    net = ZImageTransformer(TINY)
    apply = jax.jit(lambda variables: net.apply(variables, x, t, text, mask))
    return apply, draw(shapes_of(TINY), 1)


def test_lora_that_was_just_initialised_changes_nothing(network):
    apply, params = network
    fresh = lora.init(jax.random.key(0), params, Z_IMAGE_TARGETS["published"], 4)
    got = apply({"params": params, "lora": lora.scaled(fresh, 2.0)})
    np.testing.assert_array_equal(got, apply({"params": params}))


def test_lora_beside_the_parameters_equals_lora_merged_into_them(network):
    apply, params = network
    fresh = lora.init(jax.random.key(0), params, Z_IMAGE_TARGETS["published"], 4)
    trained = draw(fresh, 2, 0.1)
    beside = apply({"params": params, "lora": lora.scaled(trained, 2.0)})
    merged = apply({"params": lora.merge(params, trained, 2.0)})
    base = apply({"params": params})
    scale = np.abs(base).max()
    assert np.abs(beside - merged).max() < 2e-5 * scale
    assert np.abs(beside - base).max() > 0.01 * scale


def test_every_leaf_of_every_layer_matters(network):
    """Zeroing `b` of one layer of one linear alone changes the output."""
    apply, params = network
    fresh = lora.init(jax.random.key(0), params, Z_IMAGE_TARGETS["published"], 4)
    trained = draw(fresh, 2, 0.1)
    whole = apply({"params": params, "lora": trained})
    flat = trees.flatten(trained)
    for name in [n for n in flat if n.endswith("/b")]:
        for layer in range(flat[name].shape[0]):
            without = flat | {name: flat[name].at[layer].set(0)}
            got = apply({"params": params, "lora": trees.unflatten(without)})
            assert np.abs(got - whole).max() > 0, (name, layer)


def test_merge_keeps_dtypes_and_leaves_the_rest_alone():
    params = {
        "fc": {"kernel": jnp.ones((3, 2), jnp.bfloat16), "bias": jnp.ones(2)},
        "layers": {"out": {"kernel": jnp.zeros((2, 3, 4))}},
    }
    adapters = {
        "fc": {"a": jnp.full((3, 1), 0.5), "b": jnp.full((1, 2), 0.25)},
        "layers": {"out": {"a": jnp.ones((2, 3, 1)), "b": jnp.array([[[1.0] * 4], [[2.0] * 4]])}},
    }
    merged = lora.merge(params, adapters, 2.0)
    assert merged["fc"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["fc"]["kernel"], np.full((3, 2), 1.25))
    assert merged["fc"]["bias"] is params["fc"]["bias"]
    np.testing.assert_array_equal(merged["layers"]["out"]["kernel"][:, 0, 0], [2, 4])
    assert jax.tree.structure(merged) == jax.tree.structure(params)


TURBO = (ZImageTransformer(ZImageConfig.turbo()), Z_IMAGE_TARGETS)
KLEIN_4B, KLEIN_9B = (
    (Flux2Transformer(config), FLUX2_TARGETS)
    for config in (Flux2Config.klein_4b(), Flux2Config.klein_9b())
)
# Per two-stream block of width D: 4 D -> 6 D and 3 D -> D; per one-stream block D -> 9 D, 4 D -> D.
DOUBLE_FF, SINGLE = 2 * (1 + 6 + 3 + 1), 1 + 9 + 4 + 1


@pytest.mark.parametrize("model,preset,linears,parameters", [
    # D-OPSD's own counts with peft at rank 64; in Z-Image both refiners are in it.
    (TURBO, "published", 238, 158_760_960),
    (TURBO, "attention", 136, 34 * 4 * 64 * 2 * 3840),
    (TURBO, "all", 238, 158_760_960),
    (KLEIN_4B, "published", 40, 15_728_640),
    (KLEIN_9B, "published", 64, 33_554_432),
    (KLEIN_4B, "attention", 40, 15_728_640),
    (KLEIN_4B, "all", 40 + 5 * 4 + 20 * 2,
     15_728_640 + 64 * 3072 * (5 * DOUBLE_FF + 20 * SINGLE)),
])
def test_presets_adapt_these_linears_of_the_full_network(model, preset, linears, parameters):
    network, presets = model
    assert set(presets) == set(lora.PRESETS)
    shapes = transformer_shapes(network)
    adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes, presets[preset], 64))
    assert lora.num_linears(adapters) == linears
    assert trees.count(adapters) == parameters


def test_targets_are_a_preset_or_patterns():
    assert lora.parse_targets("published", Z_IMAGE_TARGETS) == Z_IMAGE_TARGETS["published"]
    assert lora.parse_targets(" .*/to_q/kernel, .*/to_k/kernel ,", Z_IMAGE_TARGETS) == (
        ".*/to_q/kernel", ".*/to_k/kernel"
    )
    assert lora.parse_targets(["x"], Z_IMAGE_TARGETS) == ("x",)
    names = lora.match_targets(shapes_of(TINY), [r"layers/.*/to_q/kernel", r".*/to_q/kernel"])
    assert names == [
        f"{stack}/attention/to_q/kernel"
        for stack in ("context_refiner", "layers", "noise_refiner")
    ]


def test_all_wrong_targets_are_named_together():
    targets = ["ff.net.0.proj", r".*/attention/to_q/kernel", r".*/norm_q/scale", "(", "to_q"]
    with pytest.raises(ValueError) as e:
        lora.match_targets(shapes_of(TINY), targets)
    text = str(e.value)
    for part in (
        "'ff.net.0.proj' matches no parameter", "'to_q' matches no parameter",
        "'(' is no regular expression: missing )",
        "'.*/norm_q/scale' matches context_refiner/attention/norm_q/scale, which is not a linear "
        "layer's kernel",
        "Expected one of the presets ('published', 'attention', 'all')", "layers/feed_forward/w2",
    ):
        assert part in text, text
    assert "to_q/kernel' matches" not in text
    with pytest.raises(ValueError, match="no LoRA target given"):
        lora.match_targets(shapes_of(TINY), lora.parse_targets(" , ", Z_IMAGE_TARGETS))
    with pytest.raises(ValueError, match="LoRA rank: expected at least 1, got 0"):
        lora.init(jax.random.key(0), shapes_of(TINY), Z_IMAGE_TARGETS["published"], 0)


def test_init_is_gaussian_of_one_over_rank_and_a_function_of_the_key():
    shapes = {"x": {"kernel": jax.ShapeDtypeStruct((400, 30), jnp.bfloat16)},
              "y": {"kernel": jax.ShapeDtypeStruct((3, 400, 30), jnp.bfloat16)}}
    rank = 16
    first, again, other = (
        lora.init(jax.random.key(seed), shapes, [".*"], rank) for seed in (0, 0, 1)
    )
    flat = trees.flatten(first)
    assert {n: x.shape for n, x in flat.items()} == {
        "x/a": (400, rank), "x/b": (rank, 30), "y/a": (3, 400, rank), "y/b": (3, rank, 30)
    }
    assert {x.dtype for x in flat.values()} == {jnp.dtype("float32")}
    for name, x in flat.items():
        np.testing.assert_array_equal(x, trees.flatten(again)[name])
        if name.endswith("/b"):
            assert not np.any(x)
        else:
            assert np.std(x) == pytest.approx(1 / rank, rel=0.05)
            assert abs(np.mean(x)) < 0.05 / rank
            assert np.any(x != trees.flatten(other)[name])
    a = np.asarray(flat["y/a"])
    assert len({a[0, 0, 0], a[1, 0, 0], a[2, 0, 0], float(flat["x/a"][0, 0])}) == 4


def test_scale_goes_into_b_alone():
    tree = {"p": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    got = lora.scaled(tree, 2.0)
    np.testing.assert_array_equal(got["p"]["a"], 1)
    np.testing.assert_array_equal(got["p"]["b"], 2)


def test_ema_decay_one_freezes_and_zero_copies():
    teacher, student = ({"b": jnp.asarray(v)} for v in ([1.0, -2.0], [0.3, 7.0]))
    np.testing.assert_array_equal(lora.ema(teacher, student, 1.0)["b"], teacher["b"])
    np.testing.assert_array_equal(lora.ema(teacher, student, 0.0)["b"], student["b"])
    np.testing.assert_allclose(lora.ema(teacher, student, 0.75)["b"], [0.825, 0.25])


def test_ema_in_float32_follows_where_bfloat16_stalls():
    """With decay 0.9999 and 2,000 updates the published bfloat16 teacher all but stands still."""
    student, decay, updates = 1.0, 0.9999, 2000

    def run(start, dtype):
        def update(_, teacher):
            return lora.ema(teacher, {"b": jnp.full((1,), student, dtype)}, decay)

        teacher = {"b": jnp.full((1,), start, dtype)}
        return float(jax.jit(lambda t: jax.lax.fori_loop(0, updates, update, t))(teacher)["b"][0])

    exact = 1 - decay**updates  # 18% of the way from zero
    assert run(0.0, jnp.float32) == pytest.approx(exact, rel=1e-3)
    # b starts at zero and stalls where half a bfloat16 spacing exceeds the increment, at 1/32 (at
    # 4% in the published order of roundings); a starts beside the student and never moves.
    assert run(0.0, jnp.bfloat16) == 1 / 32
    assert run(0.9, jnp.bfloat16) == float(jnp.bfloat16(0.9))
    assert run(0.9, jnp.float32) == pytest.approx(1 - 0.1 * decay**updates, rel=1e-4)


def test_what_merging_loses_is_counted():
    """bfloat16 keeps 8 bits: a change below half a unit of the last one is lost."""
    kernel = jnp.full((4, 6), 1.0, jnp.bfloat16)
    a, b = np.zeros((4, 1), np.float32), np.zeros((1, 6), np.float32)
    a[:2], b[:] = [[1.0], [0.001]], 0.25  # the second row's change is too small, two have none
    adapter = {"x": {"a": a, "b": b}}
    for dtype, changed, error in (
        (jnp.bfloat16, 6 / 24, 0.001 / np.sqrt(1 + 0.001**2)), (jnp.float32, 12 / 24, 0.0),
    ):
        params = {"x": {"kernel": kernel.astype(dtype)}}
        found = lora.rounding(params, lora.merge(params, adapter, 1.0), adapter)
        np.testing.assert_allclose(found, (changed, error), atol=1e-6)

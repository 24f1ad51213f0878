"""DoRA and LoKr as trees: what they change, how strongly, together with others, and continued."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopsd_jax.core import trees
from dopsd_jax.method import dora, lokr, lora
from dopsd_jax.models import adapters

IN, OUT, LAYERS, RANK = 24, 36, 2, 3


def draw(tree, seed, std=0.3):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten(
        [jnp.asarray(std * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    )


PARAMS = draw({
    "one": {"kernel": jnp.zeros((IN, OUT))}, "stack": {"kernel": jnp.zeros((LAYERS, IN, OUT))},
}, 0)
NAMES = ["one/kernel", "stack/kernel"]
NORMS = dora.column_norms(PARAMS, ["one", "stack"])


def make(kind, seed=1, rank=RANK, factor=4):
    """A random adapter as it is trained."""
    if kind == "lokr":
        return draw(lokr.init(jax.random.key(0), PARAMS, NAMES, rank, factor), seed)
    tree = draw(lora.init(jax.random.key(0), PARAMS, NAMES, rank), seed)
    if kind == "lora":
        return tree
    lengths = jax.tree.map(jnp.add, NORMS, draw(NORMS, seed + 1))
    return dora.begun(tree, lengths)


def changes(tree):
    """What a tree that is ready for use adds to each kernel, by name."""
    flat = trees.flatten(PARAMS)
    return {path: np.asarray(adapters.delta(leaves, flat[f"{path}/kernel"]))
            for path, leaves in adapters.sites(tree).items()}


def assert_changes(got, want, atol=1e-5):
    assert got.keys() == want.keys()
    for path, x in want.items():
        np.testing.assert_allclose(got[path], x, atol=atol, err_msg=path)


KINDS = {"dora": {}, "lokr": {}, "lokr whole": {"rank": 30}, "lokr even": {"factor": -1}}


@pytest.mark.parametrize("name", KINDS)
def test_the_layer_does_what_the_merged_kernel_does(name):
    tree = make(name.split()[0], **KINDS[name])
    assert adapters.kind_of(tree) == name.split()[0]
    ready = dora.ready(tree, PARAMS)
    merged = trees.flatten(lora.merge(PARAMS, tree, 1.0))
    x = np.random.default_rng(5).standard_normal((7, IN)).astype(np.float32)
    for layer in range(LAYERS):
        leaves = {n: leaf[layer] for n, leaf in adapters.sites(ready)["stack"].items()}
        assert adapters.problem(leaves, PARAMS["one"]["kernel"]) == ""
        y = x @ PARAMS["stack"]["kernel"][layer]
        got = adapters.adapted(x, y, leaves)
        np.testing.assert_allclose(got, x @ merged["stack/kernel"][layer], atol=2e-5)
        assert np.abs(got - y).max() > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_products_are_counted_as_the_compiler_counts_them(name):
    leaves = adapters.sites(dora.ready(make(name.split()[0], **KINDS[name]), PARAMS))["one"]
    x, y = jnp.zeros((7, IN)), jnp.zeros((7, OUT))
    text = str(jax.make_jaxpr(adapters.adapted)(x, y, leaves))
    counted = jax.jit(adapters.adapted).lower(x, y, leaves).cost_analysis()["flops"]
    sums = 7 * OUT * (3 if "g" in leaves else 1)  # of the output, no products of matrices
    assert "dot_general" in text and counted - sums == 2 * 7 * adapters.products(leaves)


def test_the_tuned_norm_is_that_of_the_matrix_and_exact_where_nothing_is_added():
    tree = make("dora")
    leaves = adapters.sites(tree)["stack"]
    kernel, norm = PARAMS["stack"]["kernel"], NORMS["stack"]["norm"]
    got = dora._tuned_norm(kernel, norm, leaves["a"], leaves["b"])
    a, b, w = (np.asarray(x, np.float64) for x in (leaves["a"], leaves["b"], kernel))
    np.testing.assert_allclose(got, np.linalg.norm(w + a @ b, axis=-2), rtol=1e-5)
    same = dora._tuned_norm(kernel, norm, leaves["a"], 0 * leaves["b"])
    np.testing.assert_array_equal(same, norm)
    dead = dora.ready({"x": {"a": leaves["a"][0], "b": 0 * leaves["b"][0], "m": jnp.zeros(OUT)}},
                      {"x": {"kernel": 0 * kernel[0]}})
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(dead))


def test_no_gradient_passes_through_the_norm():
    """W (m - n) / n + a b m / n with n held: the derivative in b is a^T dy m / n."""
    tree, x = make("dora"), jnp.asarray(np.random.default_rng(2).standard_normal((5, IN)))

    def output(one):
        ready = dora.ready({"one": one}, PARAMS)["one"]
        return jnp.sum(adapters.adapted(x, x @ PARAMS["one"]["kernel"], ready) ** 2) / 2

    one = tree["one"]
    merged = lora.merge(PARAMS, tree, 1.0)["one"]["kernel"]
    n = np.linalg.norm(PARAMS["one"]["kernel"] + one["a"] @ one["b"], axis=0)
    grads, dy = jax.grad(output)(one), x @ merged
    np.testing.assert_allclose(grads["b"], (x @ one["a"]).T @ dy * one["m"] / n, rtol=1e-3,
                               atol=1e-4)
    want = ((x @ (PARAMS["one"]["kernel"] + one["a"] @ one["b"])) * dy).sum(0) / n
    np.testing.assert_allclose(grads["m"], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_what_was_just_initialised_changes_nothing_to_the_last_bit(kind, dtype):
    params = trees.cast_floats(PARAMS, dtype)
    norms = dora.column_norms(params, ["one", "stack"])
    fresh = lokr.init(jax.random.key(0), params, NAMES, RANK, 4) if kind == "lokr" else (
        dora.begun(lora.init(jax.random.key(0), params, NAMES, RANK), norms)
    )
    ready = jax.jit(lambda t: dora.ready(lora.scaled(t, 2.0), params, norms))(fresh)
    ready = fresh if kind == "lokr" else ready
    x = jnp.ones((3, IN), dtype)
    y = x @ params["one"]["kernel"]
    leaves = {n: leaf.astype(dtype) for n, leaf in adapters.sites(ready)["one"].items()}
    np.testing.assert_array_equal(adapters.adapted(x, y, leaves), y)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_a_strength_is_the_way_from_the_untuned_to_the_tuned_weights(kind):
    ready = dora.ready(make(kind), PARAMS)
    whole = changes(ready)
    assert_changes(changes(lora.weakened(ready, 0.25)),
                   {path: 0.25 * x for path, x in whole.items()})
    assert not any(x.any() for x in changes(lora.weakened(ready, 0.0)).values())


def test_loras_and_lokrs_add_up():
    parts = [make("lokr", 1), make("lora", 2), make("lokr", 3, factor=2), make("lora", 4, rank=2),
             make("lokr", 5, rank=30)]
    total = lora.combined([parts[0], lora.combined(parts[1:3]), *parts[3:]])
    assert adapters.kind_of(total) == "several" and lora.num_linears(total) == 1 + LAYERS
    want = {path: sum(changes(part)[path] for part in parts) for path in ("one", "stack")}
    assert_changes(changes(total), want)
    alone = lora.combined([make("lokr"), {"other": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}])
    assert set(adapters.sites(alone)["one"]) == {"w1", "w2_down", "w2_up"}


def test_a_dora_adds_up_with_nothing_at_its_layers():
    one = dora.ready(make("dora"), PARAMS)
    with pytest.raises(ValueError, match="a DoRA and another adapter at one, one of 2 such layers"):
        lora.combined([one, make("lokr")])
    beside = lora.combined([{"one": one["one"]}, {"stack": make("lora")["stack"]}])
    assert set(adapters.sites(beside)["one"]) == {"a", "b", "g"}


@pytest.mark.parametrize("kind, rank", [("dora", 4), ("lokr", 4), ("lokr", 30)])
def test_a_run_goes_on_from_what_another_has_learned(kind, rank):
    first = make(kind, rank=RANK if rank == 4 else rank)
    fresh = lokr.init(jax.random.key(7), PARAMS, NAMES, rank, 4) if kind == "lokr" else dora.begun(
        lora.init(jax.random.key(7), PARAMS, NAMES, rank), NORMS
    )
    going_on = lora.continued(lora.scaled(first, 3.0), fresh, 0.5)
    assert jax.tree.map(jnp.shape, going_on) == jax.tree.map(jnp.shape, fresh)
    want, got = (changes(dora.ready(lora.scaled(tree, scale), PARAMS))
                 for tree, scale in ((first, 3.0), (going_on, 0.5)))
    assert_changes(got, want)


@pytest.mark.parametrize("first, fresh, text", [
    (make("lora"), make("dora"), "expected a DoRA to go on from, as lora.kind says, got LoRA"),
    (make("lokr"), make("lora"), "expected a LoRA to go on from, as lora.kind says, got LoKr"),
    (make("lokr", factor=2), make("lokr"), r"one has w1 of \(2, 2\), this run \(4, 4\)"),
    (make("lokr", rank=30), make("lokr"), "one has w1, w2, this run w1, w2_down, w2_up; keep"),
    (make("lokr", rank=3), make("lokr", rank=2), "one has rank 3, lora.rank = 2"),
])
def test_what_does_not_continue_is_refused(first, fresh, text):
    with pytest.raises(ValueError, match=text):
        lora.continued(first, fresh, 1.0)


def test_leaves_that_do_not_fit_are_told():
    kernel = PARAMS["one"]["kernel"]
    whole = {"w1": np.zeros((4, 4)), "w2_down": np.zeros((6, 2)), "w2_up": np.zeros((2, 9))}
    assert adapters.problem(whole, kernel) == ""
    for changed, text in (
        ({"w2_up": np.zeros((2, 8))}, "w2_up: expected (2, 9), got (2, 8)"),
        ({"w1": np.zeros((5, 4))}, "w2_down: expected (0, 2), got (6, 2)"),
        ({"a": np.zeros((24, 2))}, "a: belongs to no whole adapter"),
        ({"0/w1": np.zeros((4, 4))}, "0/w2_down, 0/w2_up: missing beside w1, "),
    ):
        assert text in adapters.problem(whole | changed, kernel)
    assert "m: expected (36,), got (35,)" in adapters.problem(
        {"a": np.zeros((24, 2)), "b": np.zeros((2, 36)), "m": np.zeros(35)}, kernel
    )

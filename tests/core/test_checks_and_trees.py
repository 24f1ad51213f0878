"""Checks of shapes, values and paths, and trees by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopsd_jax.core import checks, cli, mirror, trees
from dopsd_jax.core.checks import check_shapes


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_letters_are_bound_across_arrays():
    sizes = check_shapes("f", x=(shape(2, 3, 4), "B N C"), m=(shape(2, 3), "B N"), n=(None, "Q"))
    assert sizes == {"B": 2, "N": 3, "C": 4}


def test_numbers_must_match_and_nothing_is_bound_for_them():
    assert check_shapes("f", x=(shape(2, 16), "B 16")) == {"B": 2}
    with pytest.raises(ValueError, match=r"f: x: expected \[B 16\] .*got shape \(2, 15\)"):
        check_shapes("f", x=(shape(2, 15), "B 16"))


def test_all_mismatches_are_named_together():
    with pytest.raises(ValueError) as e:
        check_shapes(
            "velocity", x=(shape(2, 8, 8), "B h w C"), text=(shape(2, 5), "B L"),
            mask=(shape(3, 6), "B L"), ok=(shape(5), "L"),
        )
    assert str(e.value) == (
        "velocity: x: expected [B h w C], got shape (2, 8, 8); "
        "mask: expected [B L] with B=2, got shape (3, 6)"
    )


def test_checks_run_while_tracing():
    @jax.jit
    def f(x, y):
        check_shapes("f", x=(x, "B"), y=(y, "B"))
        return x + y

    with pytest.raises(ValueError, match="y: expected"):
        f(jnp.ones(2), jnp.ones(1))
    f(jnp.ones(2), jnp.ones(2))


TREE = {"b": {"y": 1, "x": {"k": 2}}, "a": 3, "empty": {}}


def test_flatten_joins_names_in_sorted_order_and_unflatten_undoes_it():
    flat = trees.flatten(TREE)
    assert list(flat.items()) == [("a", 3), ("b/x/k", 2), ("b/y", 1)]
    assert trees.unflatten(flat) == {"b": {"y": 1, "x": {"k": 2}}, "a": 3}
    # The order is that of jax.tree, so that both walk the same leaves.
    assert list(flat.values()) == jax.tree.leaves(TREE)


def test_map_named_sees_every_name():
    got = trees.map_named(lambda n, x: f"{n}={x}", TREE)
    assert got == {"a": "a=3", "b": {"x": {"k": "b/x/k=2"}, "y": "b/y=1"}}


def test_counts_of_arrays_and_shapes_agree():
    shapes = {"w": shape(2, 3), "n": jax.ShapeDtypeStruct((), jnp.int32),
              "h": jax.ShapeDtypeStruct((5,), jnp.bfloat16)}
    arrays = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    for tree in (shapes, arrays):
        assert trees.count(tree) == 6 + 1 + 5
        assert trees.num_bytes(tree) == 24 + 4 + 10


def test_only_floats_are_cast():
    got = trees.cast_floats(
        {"f": jnp.ones(2), "h": jnp.ones(2, jnp.bfloat16), "i": jnp.ones(2, jnp.int32),
         "m": jnp.ones(2, bool)}, jnp.bfloat16,
    )
    assert {k: str(v.dtype) for k, v in got.items()} == {
        "f": "bfloat16", "h": "bfloat16", "i": "int32", "m": "bool"
    }


def test_bfloat16_averages_and_moments_move_by_less_than_their_resolution():
    x = {"a": jnp.full((100_000,), 1.0 + 2**-12, jnp.float32), "n": jnp.zeros((), jnp.int32)}
    like = {"a": jnp.zeros((1,), jnp.bfloat16), "n": jnp.zeros((), jnp.int32)}
    got = trees.round_like(x, like, jax.random.key(0))
    assert got["a"].dtype == jnp.bfloat16 and got["n"].dtype == jnp.int32
    values, counts = np.unique(np.asarray(got["a"], np.float32), return_counts=True)
    np.testing.assert_array_equal(values, [1.0, 1.0 + 2**-7])  # neighbours in bfloat16
    assert counts[1] / counts.sum() == pytest.approx(2**-5, rel=0.1)
    assert np.isposinf(np.asarray(trees.round_like(
        jnp.full((1,), jnp.inf), jnp.zeros((1,), jnp.bfloat16), jax.random.key(0)), np.float32))


def test_a_number_is_finite_and_one_that_a_float_holds():
    assert all(map(checks.is_number, (0, -1, 2.5, 10**300)))
    assert not any(map(checks.is_number, (True, "1", None, float("nan"), float("inf"), 10**400)))


def test_a_path_that_no_file_system_takes_is_told_before_it_is_looked_for():
    assert not any(map(checks.path_problem, ("", "a b/c", "x" * 255, "gs://bucket/run")))
    assert checks.path_problem("a/" + "x" * 256) == (
        "holds a name of 256 bytes, at most 255 are possible"
    )
    assert checks.path_problem("\u00e4" * 200).startswith("holds a name of 400 bytes")
    assert checks.path_problem("abc/" * 1000) == "is 4000 bytes long, at most 3000 are possible"
    assert checks.path_problem("a\0b") == "holds a null character"
    with pytest.raises(ValueError, match=r"^xxx.*of 5000 bytes.*choose another path$"):
        mirror.local_copy("x" * 5000)
    with pytest.raises(ValueError, match=r"^xxx.*holds a name of 5000 bytes"):
        cli.check_directory("x" * 5000)

"""DoRA: a LoRA whose tuned kernel has columns of trained lengths.

    W' = (W + a b) m / n      n = |W + a b|, of every column (output); m [.., out] is trained

No gradient passes through n, as the paper (arXiv 2402.09353, section 4.3) and PEFT have it. The
networks are given W' as W (1 + g) + a b', with g = (m - n) / n and b' = b (1 + g). So W' - W is
exactly 0 where m is n, and a strength s, as in ComfyUI, means W + s (W' - W). In a train step n is
the same for the whole rollout, and XLA computes it once, before.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from dopsd_jax.core import trees
from dopsd_jax.core.trees import Tree
from dopsd_jax.models import adapters, quantization

SMALLEST = 1e-30  # a column of zeros stays one


def column_norms(params: Tree, paths: Iterable[str]) -> Tree:
    """Lengths of the columns of untuned kernels: `norm` [.., out], float32, at each path."""
    flat = trees.flatten(params)

    def lengths(kernel):
        kernel = quantization.floats(kernel, jnp.float32)
        return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=-2))

    return trees.unflatten({f"{p}/norm": lengths(flat[f"{p}/kernel"]) for p in sorted(paths)})


def begun(lora: Tree, norms: Tree) -> Tree:
    """A LoRA that adds nothing as a DoRA that changes nothing: m is what n will be."""
    flat = trees.flatten(lora)
    for name, norm in trees.flatten(norms).items():
        # A true copy: what trains is donated to the step, the norms are not.
        flat[name.removesuffix("norm") + "m"] = jnp.array(norm, copy=True)
    return trees.unflatten(flat)


def paths(tree: Tree) -> tuple[str, ...]:
    """Of the layers that have an `m`, so that only `ready` makes them of use to the networks."""
    return tuple(path for path, leaves in adapters.sites(tree).items() if "m" in leaves)


def ready(tree: Tree, params: Tree, norms: Tree | None = None) -> Tree:
    """The tree as the networks take it: `g` in place of `m`.

    Args:
        tree: alpha / rank in its `b`. What has no `m` stays as it is.
        params: Of the network.
        norms: From `column_norms`, where they are at hand.
    """
    found, flat = adapters.sites(tree), trees.flatten(params)
    tuned = [path for path, leaves in found.items() if "m" in leaves]
    untuned = trees.flatten(column_norms(params, tuned) if norms is None else norms)
    for path in tuned:
        a, b, m = (jnp.asarray(found[path][name]) for name in adapters.DORA)
        n = _tuned_norm(flat[f"{path}/kernel"], untuned[f"{path}/norm"], a, b)
        n = jax.lax.stop_gradient(n)
        g = (m - n) / jnp.maximum(n, SMALLEST)
        found[path] = {"a": a, "b": b * (1 + g)[..., None, :], "g": g}
    return adapters.tree_of(found)


def _tuned_norm(
    kernel: quantization.Kernel, norm: jax.Array, a: jax.Array, b: jax.Array
) -> jax.Array:
    """|W + a b| by column, of |W|, without the matrix: |W|^2 + 2 <W, a b> + |a b|^2.

    It is `norm` itself, to the last bit, where b is 0.
    """
    wide = {"preferred_element_type": jnp.float32, "precision": "highest"}
    kernel = quantization.floats(kernel, kernel.dtype)
    crossed = jnp.einsum("...ir,...io->...ro", a.astype(kernel.dtype), kernel, **wide)
    inner = jnp.einsum("...ir,...is->...rs", a, a, precision="highest")
    inner = jnp.einsum("...rs,...so->...ro", inner, b, precision="highest")
    change = jnp.sum(b * (2 * crossed + inner), axis=-2)
    return jnp.where(change == 0, norm, jnp.sqrt(jnp.maximum(jnp.square(norm) + change, 0)))

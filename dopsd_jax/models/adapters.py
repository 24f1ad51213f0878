"""What an adapter changes in a linear layer y = x W, told by the leaves that stand at its path.

    a [in, r], b [r, out]                              LoRA: adds (x a) b
    g [out]                                            DoRA, ready for use: adds g y, see below
    w1 [i1, o1], w2 [i2, o2]                           LoKr: adds x (w1 kron w2), i1 i2 = in
    w1 [i1, o1], w2_down [i2, r], w2_up [r, o2]        LoKr with w2 = w2_down w2_up

All that stands at a path adds up, and several LoKrs stand in numbered folders, `0/w1`, `1/w1`.
A DoRA as it is trained and stored has `m [out]` beside `a` and `b`, the norms of the tuned kernel's
columns; method/dora.py makes `g` of it, for which the kernel is needed. Leaves of a stack of layers
have its axis in front.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dopsd_jax.core import trees
from dopsd_jax.core.trees import Tree

Leaves = Mapping[str, Any]

LORA, DORA, LOKR = ("a", "b"), ("a", "b", "m"), ("w1", "w2", "w2_down", "w2_up")
_NAME = re.compile(r"(.*?)/((?:[0-9]+/)?[^/]+)")


def sites(tree: Tree) -> dict[str, dict[str, Any]]:
    """{path of a linear layer: its leaves by name, such as "b" or "1/w2"}."""
    found: dict[str, dict[str, Any]] = {}
    for name, leaf in trees.flatten(tree).items():
        match = _NAME.fullmatch(name)
        path, part = match.groups() if match else ("", name)
        found.setdefault(path, {})[part] = leaf
    return found


def tree_of(found: Mapping[str, Leaves]) -> Tree:
    """The inverse of `sites`."""
    return trees.unflatten({
        f"{path}/{name}": leaf for path, leaves in found.items() for name, leaf in leaves.items()
    })


def lokrs(leaves: Leaves) -> list[dict[str, Any]]:
    """The LoKrs among the leaves of one linear layer, each by the names without a number."""
    numbered: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        number, _, part = name.rpartition("/")
        if part in LOKR:
            numbered.setdefault(number, {})[part] = leaf
    return list(numbered.values())


def kind_of(tree: Tree) -> str:
    """"lora", "dora" or "lokr"; "several" where they are mixed or a layer has several LoKrs."""
    kinds = set()
    for leaves in sites(tree).values():
        names = set(leaves)
        kinds.add(
            "lora" if names == set(LORA) else "dora" if names == set(DORA) else
            "lokr" if names in ({"w1", "w2"}, {"w1", "w2_down", "w2_up"}) else "several"
        )
    return kinds.pop() if len(kinds) == 1 else "dora" if kinds == {"lora", "dora"} else "several"


def problem(leaves: Leaves, kernel: Any) -> str:
    """What does not fit between the leaves of a linear layer and its kernel; "" if all does.

    Args:
        leaves: Arrays or shapes.
        kernel: Array or shape [.., in, out].
    """
    *stack, size_in, size_out = kernel.shape
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    expected: dict[str, tuple[int, ...]] = {}
    if {"a", "b"} <= shapes.keys():
        expected["a"] = (size_in, shapes["a"][-1])
        expected["b"] = (shapes["b"][-2], size_out)
        expected |= {name: (size_out,) for name in ("m", "g") if name in shapes}
    for name in shapes:
        folder = name.removesuffix("w1")
        if name == f"{folder}w1":
            expected |= _expected_lokr(folder, shapes, size_in, size_out)
    if missing := sorted(expected.keys() - shapes.keys()):
        return f"{', '.join(missing)}: missing beside {', '.join(shapes)}"
    for name, shape in shapes.items():
        if name not in expected:
            return f"{name}: belongs to no whole adapter; found {', '.join(shapes)}"
        if shape != (*stack, *expected[name]):
            return f"{name}: expected {(*stack, *expected[name])}, got {shape}"
    return ""


def _expected_lokr(
    folder: str, shapes: Mapping[str, tuple[int, ...]], size_in: int, size_out: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of one LoKr's leaves without a stack's axis, by those of its w1 and its rank."""
    first = shapes[f"{folder}w1"][-2:]
    second = tuple(
        whole // part if part and whole % part == 0 else 0
        for whole, part in zip((size_in, size_out), first, strict=True)
    )
    if f"{folder}w2" in shapes:
        return {f"{folder}w1": first, f"{folder}w2": second}
    rank = shapes.get(f"{folder}w2_down", (0,))[-1]
    return {
        f"{folder}w1": first, f"{folder}w2_down": (second[0], rank),
        f"{folder}w2_up": (rank, second[1]),
    }


def adapted(x: jax.Array, y: jax.Array, leaves: Leaves) -> jax.Array:
    """The output of a linear layer with its adapter.

    Args:
        x: [N, in].
        y: [N, out], x W.
        leaves: Of one layer, in the dtype of x.
    """
    total = y
    if "g" in leaves:
        total = total + leaves["g"] * y
    if "a" in leaves:
        total = total + (x @ leaves["a"]) @ leaves["b"]
    for term in lokrs(leaves):
        total = total + _kron_product(x, term)
    return total


def _kron_product(x: jax.Array, term: Leaves) -> jax.Array:
    """x (w1 kron w2) as small products: [N, i1 i2] -> [N, o1 o2]."""
    rows, (in_1, out_1) = x.shape[0], term["w1"].shape
    low_rank = "w2_up" in term
    h = x.reshape(rows * in_1, -1) @ term["w2_down" if low_rank else "w2"]
    # In between, where a rank is the smallest size that w2 has.
    h = jnp.einsum("nik,io->nok", h.reshape(rows, in_1, -1), term["w1"])
    if low_rank:
        h = h.reshape(rows * out_1, -1) @ term["w2_up"]
    return h.reshape(rows, -1)


def delta(leaves: Leaves, kernel: Any, scale: float = 1.0) -> jax.Array:
    """The change of a kernel [.., in, out] by its adapter, float32.

    Args:
        leaves: Ready for use, without `m`.
        kernel: Array.
        scale: By which it is multiplied.
    """
    parts = []
    if "a" in leaves:
        parts.append(jnp.einsum("...ir,...ro->...io", leaves["a"], leaves["b"]))
    if "g" in leaves:
        parts.append(kernel.astype(jnp.float32) * jnp.asarray(leaves["g"])[..., None, :])
    for term in lokrs(leaves):
        w2 = term["w2"] if "w2" in term else jnp.einsum(
            "...ir,...ro->...io", term["w2_down"], term["w2_up"]
        )
        parts.append(jnp.einsum("...io,...jp->...ijop", term["w1"], w2).reshape(kernel.shape))
    return scale * sum(parts[1:], parts[0])


def products(leaves: Leaves) -> float:
    """Multiplications of one layer, or of a stack of them, for one token."""
    def size(leaf) -> float:
        total = 1.0
        for side in leaf.shape:
            total *= side
        return total

    total = sum(size(leaves[n]) for n in ("a", "b") if n in leaves)
    for term in lokrs(leaves):
        in_1, out_1 = term["w1"].shape[-2:]
        first = term.get("w2_down", term.get("w2"))
        total += in_1 * size(first) + size(term["w1"]) * first.shape[-1]
        total += out_1 * size(term["w2_up"]) if "w2_up" in term else 0.0
    return total

"""LoRA as a tree beside the parameters: leaves `a [.., in, r]`, `b [.., r, out]`, float32.

The tree mirrors the parameter tree: `layers/attention/to_q/kernel` [L, in, out] is adapted by
`layers/attention/to_q/{a,b}`. Scanned layers keep their leading axis. DoRA and LoKr are such trees
with other leaves, see models/adapters.py; what is said of a LoRA here holds for them, unless a
function says that it does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.core import trees
from dopsd_jax.core.trees import Tree
from dopsd_jax.method import dora
from dopsd_jax.models import adapters

KINDS = ("lora", "dora", "lokr")
WORDS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "several": "several adapters at a layer"}
_RANKED = {"a": -1, "b": -2, "w2_down": -1, "w2_up": -2}  # leaf -> the axis of its rank

# What D-OPSD's target list matches in a family; its attention; every Linear of its blocks but those
# that modulate.
PRESETS = ("published", "attention", "all")


def parse_targets(
    targets: str | Sequence[str], presets: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    """A preset's name, or regexes separated by commas or given as a sequence.

    Args:
        targets: Of a config.
        presets: Regexes over parameter names of a family, by PRESETS.
    """
    if isinstance(targets, str):
        return presets.get(targets) or tuple(t.strip() for t in targets.split(",") if t.strip())
    return tuple(targets)


def match_targets(shapes: Tree, targets: Sequence[str]) -> list[str]:
    """Names of the parameters that the patterns select.

    Raises:
        ValueError: No pattern at all, a pattern that is no regex or matches nothing, or one that
            matches a parameter which is not the kernel of a linear layer; all together.
    """
    names = list(trees.flatten(shapes))
    kernels = [n for n in names if n.endswith("/kernel")]
    chosen: set[str] = set()
    problems = [] if targets else ["no LoRA target given"]
    for target in targets:
        try:
            found = {n for n in names if re.fullmatch(target, n)}
        except re.error as e:
            problems.append(f"{target!r} is no regular expression: {e}")
            continue
        if not found:
            problems.append(f"{target!r} matches no parameter")
        if wrong := sorted(found - set(kernels)):
            problems.append(f"{target!r} matches {wrong[0]}, which is not a linear layer's kernel")
        chosen |= found
    if problems:
        layers = sorted({re.sub(r"/kernel$", "", n) for n in kernels})
        raise ValueError(
            "LoRA targets: " + "; ".join(problems) + ". Expected one of the presets "
            f"{PRESETS} or regexes that match whole parameter names ending in /kernel; "
            f"linear layers here: {', '.join(layers)}"
        )
    return sorted(chosen)


def init(rng: jax.Array, shapes: Tree, targets: Sequence[str], rank: int) -> Tree:
    """A LoRA that changes nothing: a ~ N(0, 1 / rank^2), b = 0.

    Args:
        rng: PRNG key.
        shapes: Parameter tree (arrays or ShapeDtypeStruct).
        targets: Regexes, see `match_targets`.
        rank: r >= 1.

    Source: peft init_lora_weights="gaussian", as the published trainer uses it.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank: expected at least 1, got {rank}")
    flat = trees.flatten(shapes)
    lora = {}
    names = match_targets(shapes, targets)
    for key, name in zip(jax.random.split(rng, len(names)), names, strict=True):
        *stack, fan_in, fan_out = flat[name].shape
        path = name.removesuffix("/kernel")
        lora[f"{path}/a"] = jax.random.normal(key, (*stack, fan_in, rank), jnp.float32) / rank
        lora[f"{path}/b"] = jnp.zeros((*stack, rank, fan_out), jnp.float32)
    return trees.unflatten(lora)


def scaled(lora: Tree, scale: float) -> Tree:
    """The LoRA with alpha / rank multiplied into `b`, as the networks expect it.

    Of a LoKr it is in `w2_up`; where w2 is whole there is no rank to divide by, and LyCORIS knows
    no scale.
    """
    return trees.map_named(lambda n, x: x * scale if n.endswith(("/b", "/w2_up")) else x, lora)


def weakened(lora: Tree, strength: float) -> Tree:
    """`strength` times what it changes.

    Args:
        lora: As the networks take it, see `dora.ready`.
        strength: 0 changes nothing.
    """
    linear = ("/b", "/g", "/w2_up", "/w2")
    return trees.map_named(lambda n, x: x * strength if n.endswith(linear) else x, lora)


def pairs(lora: Tree) -> Iterator[tuple[str, jax.Array, jax.Array]]:
    """(path, a, b) of every linear with a LoRA."""
    flat = trees.flatten(lora)
    for name, a in flat.items():
        if name.endswith("/a"):
            path = name.removesuffix("/a")
            yield path, a, flat[f"{path}/b"]


def combined(loras: Sequence[Tree]) -> Tree:
    """One LoRA that adds what several add: their ranks stand side by side, nothing is merged.

    Args:
        loras: As the networks take them: alpha / rank, and a strength if any, already in `b` (see
            `scaled`). They may adapt different linears and have different ranks.

    Raises:
        ValueError: A layer that has a DoRA and anything else.
    """
    found = [adapters.sites(tree) for tree in loras]
    added = {
        path: [leaves[path] for leaves in found if path in leaves]
        for path in dict.fromkeys(path for leaves in found for path in leaves)
    }
    if wrong := [path for path, parts in added.items()
                 if len(parts) > 1 and any("g" in leaves for leaves in parts)]:
        raise ValueError(
            f"a DoRA and another adapter at {wrong[0]}, one of {len(wrong)} such layers: a DoRA "
            "sets how long the columns of a whole weight are, so it adds up with nothing; draw it "
            "alone, or write the model with it first (export --lora .. --full)"
        )
    return adapters.tree_of({
        path: parts[0] if len(parts) == 1 else _side_by_side(parts)
        for path, parts in added.items()
    })


def _side_by_side(parts: Sequence[adapters.Leaves]) -> dict[str, jax.Array]:
    """The leaves of several adapters of one linear."""
    made = {
        name: jnp.concatenate(
            [jnp.asarray(leaves[name]) for leaves in parts if name in leaves], axis=_RANKED[name]
        ) for name in adapters.LORA if any(name in leaves for leaves in parts)
    }
    terms = [term for leaves in parts for term in adapters.lokrs(leaves)]
    for number, term in enumerate(terms):
        folder = f"{number}/" if len(terms) > 1 else ""
        made |= {f"{folder}{name}": leaf for name, leaf in term.items()}
    return made


def continued(first: Tree, fresh: Tree, scale: float) -> Tree:
    """A LoRA to go on training from: an earlier one, and fresh directions up to the new rank.

    It adds to the weights what `first` adds, because one side of fresh directions is 0.

    Args:
        first: With alpha / rank, and a strength if any, already in its `b` (see `scaled`).
        fresh: From `init`, of the same kind.
        scale: alpha / rank of the new one, see `scaled`.

    Raises:
        ValueError: Another kind, linears of `first` that the new one does not adapt, more ranks
            than it has, or other factors.
    """
    kinds = [WORDS[adapters.kind_of(tree)] for tree in (fresh, first)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"expected a {kinds[0]} to go on from, as lora.kind says, got {kinds[1]}")
    made, problems = adapters.sites(fresh), []
    for path, leaves in adapters.sites(first).items():
        if path not in made:
            problems.append(f"{path} is not among lora.targets")
        elif wrong := _does_not_continue(leaves, made[path]):
            problems.append(f"{path} {wrong}")
        else:
            made[path] = {
                name: _with_ranks(name, jnp.array(leaf, copy=True), made[path][name], scale)
                for name, leaf in leaves.items()
            }
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            "expected a LoRA of the run's own targets with at most lora.rank: "
            + "; ".join(problems[:3]) + more
        )
    return adapters.tree_of(made)


def _does_not_continue(first: adapters.Leaves, fresh: adapters.Leaves) -> str:
    """Why a linear's adapter cannot go on from an earlier one; "" if it can."""
    if first.keys() != fresh.keys():
        return f"has {', '.join(first)}, this run {', '.join(fresh)}; keep lora.rank and factor"
    for name, axis in _RANKED.items():
        if name in first and first[name].shape[axis] > fresh[name].shape[axis]:
            return f"has rank {first[name].shape[axis]}, lora.rank = {fresh[name].shape[axis]}"
    for name in first.keys() - _RANKED.keys():
        if first[name].shape != fresh[name].shape:
            return f"has {name} of {first[name].shape}, this run {fresh[name].shape}"
    return ""


def _with_ranks(name: str, first: jax.Array, fresh: jax.Array, scale: float) -> jax.Array:
    if name not in _RANKED:
        return first
    axis = _RANKED[name]
    first = first / scale if axis == -2 else first
    rest = jax.lax.slice_in_dim(fresh, first.shape[axis], fresh.shape[axis], axis=axis % fresh.ndim)
    return jnp.concatenate([first, rest], axis)


def merge(params: Tree, lora: Tree, scale: float) -> Tree:
    """Parameters with the LoRA folded in, kernel + scale a b, computed in float32."""
    if adapters.kind_of(lora) != "lora":
        lora, scale = dora.ready(scaled(lora, scale), params), 1.0
    flat = dict(trees.flatten(params))
    for path, leaves in adapters.sites(lora).items():
        kernel = flat[f"{path}/kernel"]
        delta = adapters.delta(leaves, kernel, scale)
        flat[f"{path}/kernel"] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return trees.unflatten(flat)


def rounding(params: Tree, merged: Tree, lora: Tree) -> tuple[float, float]:
    """What merging a LoRA lost, because the weights' dtype resolves no smaller changes.

    Args:
        params, merged: Before, and as `merge` returned them, with scale 1.
        lora: As the networks take it.

    Returns:
        The share of the adapted kernels' elements that changed at all, and
        |merged - params - a b| / |a b|, Frobenius norms over all of them, summed in float64.
    """
    before, after = trees.flatten(params), trees.flatten(merged)
    changed = elements = 0
    lost = whole = 0.0
    for path, leaves in adapters.sites(lora).items():
        old, new = (np.asarray(x[f"{path}/kernel"], np.float32) for x in (before, after))
        delta = np.asarray(adapters.delta(leaves, old))
        changed += np.count_nonzero(new != old)
        elements += old.size
        lost += float(np.square(new - old - delta).sum(dtype=np.float64))
        whole += float(np.square(delta).sum(dtype=np.float64))
    return changed / max(elements, 1), math.sqrt(lost / whole) if whole else 0.0


def reduced(lora: Tree, rank: int) -> tuple[Tree, float]:
    """The best LoRA of a rank, linear by linear, and the relative error that it costs.

    Args:
        lora: No other kind; alpha / rank in its `b`. Ranks may differ from linear to linear.
        rank: At least 1. Where a linear has less, zeros fill up.

    Returns:
        The tree, float32 NumPy, and |difference of all a b| / |all a b|, Frobenius norms.
    """
    made = {}
    lost = whole = 0.0
    for path, *pair in pairs(lora):
        a, b = (np.asarray(x, np.float64) for x in pair)
        # a b = Qa (Ra Rb^T) Qb^T: the singular values are those of a small matrix.
        (qa, ra), (qb, rb) = np.linalg.qr(a), np.linalg.qr(np.swapaxes(b, -1, -2))
        u, s, vt = np.linalg.svd(ra @ np.swapaxes(rb, -1, -2))
        whole += float(np.square(s).sum())
        lost += float(np.square(s[..., rank:]).sum())
        kept = min(rank, s.shape[-1])
        root = np.sqrt(s[..., :kept])
        made[f"{path}/a"] = qa @ u[..., :kept] * root[..., None, :]
        made[f"{path}/b"] = root[..., :, None] * vt[..., :kept, :] @ np.swapaxes(qb, -1, -2)
    return padded(trees.unflatten(made), rank), math.sqrt(lost / whole) if whole else 0.0


def padded(lora: Tree, rank: int) -> Tree:
    """The same LoRA, float32 NumPy, with zeros up to a rank in every linear, as files need it.

    No other kind has one rank for all.
    """
    def fill(name: str, x) -> np.ndarray:
        axis = x.ndim - (1 if name.endswith("/a") else 2)
        widths = [(0, rank - n if i == axis else 0) for i, n in enumerate(x.shape)]
        return np.pad(np.asarray(x, np.float32), widths)

    return trees.map_named(fill, lora)


def max_rank(lora: Tree) -> int:
    """The largest rank of any linear; 1 where nothing has one."""
    flat = trees.flatten(lora)
    return max((x.shape[-1] for n, x in flat.items() if n.endswith(("/a", "/w2_down"))), default=1)


def ema(teacher: Tree, student: Tree, decay: float) -> Tree:
    """decay * teacher + (1 - decay) * student, in float32.

    float32 matters: with decay 0.9999 the increments of a bfloat16 teacher vanish below its
    resolution, and it all but stands still.
    """
    return jax.tree.map(
        lambda t, s: (decay * t.astype(jnp.float32) + (1 - decay) * s.astype(jnp.float32)).astype(
            t.dtype
        ),
        teacher, student,
    )


def num_linears(lora: Tree) -> int:
    """How many linear layers are adapted, each layer of a stack counted."""
    first = (next(leaf for name, leaf in leaves.items() if name.endswith(("a", "w1")))
             for leaves in adapters.sites(lora).values())
    stacks = [leaf.shape[:-2] for leaf in first]
    return sum(s[0] if s else 1 for s in stacks)

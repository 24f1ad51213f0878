"""Multi-head attention in one place: every network calls `attention`.

One entry, four ways to compute the same: the plain form for short sequences, and for long ones the
splash kernel on TPU, cuDNN's on GPU, and query by query chunk elsewhere. None of the last three
ever holds a whole [N, M] matrix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec

from dopsd_jax.core import sharding
from dopsd_jax.core.checks import check_shapes

PLAIN_LIMIT = 2**20  # N M, up to which the whole matrix is the fastest and small enough
QUERY_CHUNK = 512
BLOCK = 512  # of splash's tiles; shorter sequences take one tile, in steps of LANES
LANES = 128
NAME = "attention"  # of what a rematerialised layer may keep, see layers.REMAT_POLICIES


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None = None,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with float32 softmax; G = K / J query heads share a key head.

    Args:
        q: [B, N, K, d].
        k: [B, M, J, d], J divides K; query head i uses key head i // (K / J).
        v: [B, M, J, d].
        mask: bool, True = may attend; [B, M] over keys or [B, N, M]; None attends everywhere.
            A query that may attend nowhere returns the mean of v, never NaN.
        lengths: int32 [B] from 1 to M, in place of a mask: the first `lengths` keys may be
            attended. On GPU this saves reading a matrix of masks.

    Returns:
        [B, N, K, d] in v's dtype.
    """
    dims = check_shapes(
        "attention", q=(q, "B N K d"), k=(k, "B M J d"), v=(v, "B M J d"), lengths=(lengths, "B")
    )
    if dims["K"] % dims["J"]:
        raise ValueError(f"attention: {dims['J']} key heads do not divide {dims['K']} query heads")
    if lengths is not None:
        if mask is not None:
            raise ValueError("attention: expected a mask or lengths, got both")
        mask = jnp.arange(dims["M"]) < lengths[:, None]
    way = choose(dims["N"], dims["M"], dims["d"], v.dtype, mask, sharding.platform())
    if way == "cudnn" and lengths is not None:
        return checkpoint_name(cudnn_prefix(q, k, v, lengths), NAME)
    return checkpoint_name(KERNELS[way](q, k, v, mask), NAME)


def choose(N: int, M: int, d: int, dtype, mask: jax.Array | None, platform: str) -> str:
    """The key of KERNELS that fits: kernels have conditions, the other two have none."""
    if N * M <= PLAIN_LIMIT and platform != "tpu":
        return "plain"
    by_keys = mask is None or mask.ndim == 2  # splash takes no mask of pairs
    if platform == "tpu" and by_keys and min(N, M) >= LANES and d % LANES == 0 and d <= 256:
        return "splash"
    if platform in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2 and d % 8 == 0 and d <= 128:
        return "cudnn"
    return "plain" if N * M <= PLAIN_LIMIT else "chunked"


def plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`attention` by its formula: two batched matrix products around a softmax."""
    dims = check_shapes("attention", q=(q, "B N K d"), k=(k, "B M J d"))
    B, N, J, d, M = (dims[name] for name in "BNJdM")
    # Heads become batch rows and the G query heads of a key head its rows: plain batched matrix
    # products, which the CPU runs 1.6 times as fast as the five-axis einsum.
    q = q.reshape(B, N, J, -1, d).transpose(0, 2, 3, 1, 4).reshape(B * J, -1, d)
    k, v = (x.transpose(0, 2, 1, 3).reshape(B * J, M, d) for x in (k, v))
    logits = jnp.einsum("bnd,bmd->bnm", q, k, preferred_element_type=jnp.float32) * d**-0.5
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 2 else mask
        logits = logits.reshape(B, J, -1, N, M)
        # Finite, so that a fully masked row stays finite in forward and backward.
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
        logits = logits.reshape(B * J, -1, M)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bnm,bmd->bnd", weights, v)
    return out.reshape(B, J, -1, N, d).transpose(0, 3, 1, 2, 4).reshape(B, N, -1, d)


def chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, chunk: int = QUERY_CHUNK
) -> jax.Array:
    """`attention` with at most `chunk` queries at a time, over all keys; the same numbers.

    Each chunk is computed again for the gradient, so that no whole matrix waits for it either.
    """
    N = q.shape[1]
    if chunk >= N:
        return plain(q, k, v, mask)
    # Padding queries attend like the others and are cut off again. The loop runs over chunks,
    # never over B, so that a batch split over devices stays split.
    def split(x):
        x = jnp.pad(x, ((0, 0), (0, -N % chunk)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    if mask is None or mask.ndim == 2:
        parts, attend = split(q), lambda part: plain(part, k, v, mask)
    else:
        parts, attend = (split(q), split(mask)), lambda part: plain(part[0], k, v, part[1])
    out = jax.lax.map(jax.checkpoint(attend), parts).swapaxes(0, 1)
    return out.reshape(q.shape[0], -1, *out.shape[3:])[:, :N]


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, interpret: bool = False
) -> jax.Array:
    """`attention` by the splash kernel for TPU, each device on its own rows and heads.

    Args:
        q, k, v: As in `attention`; d a multiple of LANES.
        mask: bool [B, M] or None.
        interpret: Run the kernel's program step by step, on any device.
    """
    (B, N, K, d), M, J = q.shape, k.shape[1], k.shape[2]
    n, m = _tiled(N), _tiled(M)
    if mask is not None:
        q, mask = _mean_where_blind(q, mask[:, None])
        mask = mask[:, 0]
    elif m > M:
        mask = jnp.ones((B, M), bool)
    q = (q * d**-0.5).astype(q.dtype)
    q, k, v = (_pad(x, size).swapaxes(1, 2) for x, size in ((q, n), (k, m), (v, m)))
    operands, split = [q, k, v], [_heads_spec(B, K, J)] * 3
    if mask is not None:
        operands.append(_pad(mask, m).astype(jnp.int32))
        split.append(PartitionSpec(split[0][0]))

    def local(q, k, v, seen=None):
        kernel = _kernel(q.shape[1], n, m, interpret)
        if seen is None:
            return jax.vmap(kernel)(q, k, v)
        queries = jnp.ones((q.shape[0], n), jnp.int32)
        return jax.vmap(kernel)(q, k, v, splash_lib.SegmentIds(queries, seen))

    if not jax.sharding.get_abstract_mesh().empty:
        local = jax.shard_map(
            local, in_specs=tuple(split), out_specs=split[0], check_vma=False
        )
    return local(*operands).swapaxes(1, 2)[:, :N]


def _mean_where_blind(q: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries [B, N, K, d] that may attend nowhere become 0 and attend everywhere, alike.

    mask: bool [B, N or 1, M].
    """
    sees = jnp.any(mask, axis=-1, keepdims=True)
    return jnp.where(sees[..., None], q, 0), mask | ~sees


def _tiled(length: int) -> int:
    step = BLOCK if length > BLOCK else LANES
    return -(-length // step) * step


def _pad(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def _heads_spec(B: int, K: int, J: int) -> PartitionSpec:
    """How [B, heads, .., d] lies on the ambient mesh: whole where it does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return PartitionSpec(None)
    heads = "tensor" if K % mesh.shape["tensor"] == J % mesh.shape["tensor"] == 0 else None
    return PartitionSpec(sharding.rows_axes(B), heads)


def _kernel(heads: int, n: int, m: int, interpret: bool):
    """The splash kernel of full attention over [heads, n, d] and [.., m, d]."""
    q, kv = min(BLOCK, n), min(BLOCK, m)
    sizes = splash_lib.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv, block_q_dkv=q, block_kv_dkv=kv,
        block_kv_dkv_compute=kv, block_q_dq=q, block_kv_dq=kv,
    )
    mask = splash_mask.MultiHeadMask([splash_mask.FullMask((n, m))] * heads)
    return splash_lib.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name=NAME,
        interpret=interpret,
    )


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None,
    implementation: str = "cudnn",
) -> jax.Array:
    """`attention` by cuDNN's kernel for GPU, in two-byte floats.

    Args:
        q, k, v, mask: As in `attention`.
        implementation: Of jax.nn.dot_product_attention.
    """
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 2 else mask
        q, mask = _mean_where_blind(q, mask)
        mask = jnp.broadcast_to(mask[:, None], (q.shape[0], 1, q.shape[1], k.shape[1]))
    q = q.astype(v.dtype)
    return jax.nn.dot_product_attention(
        q, k.astype(v.dtype), v, mask=mask, implementation=implementation
    )


def cudnn_prefix(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, implementation: str = "cudnn"
) -> jax.Array:
    """`cudnn` over the first `lengths` keys of each row, which it skips to instead of masking.

    Args:
        q, k, v, lengths: As in `attention`.
        implementation: Of jax.nn.dot_product_attention.
    """
    return jax.nn.dot_product_attention(
        q.astype(v.dtype), k.astype(v.dtype), v, key_value_seq_lengths=lengths.astype(jnp.int32),
        implementation=implementation,
    )


KERNELS = {"plain": plain, "chunked": chunked, "splash": splash, "cudnn": cudnn}

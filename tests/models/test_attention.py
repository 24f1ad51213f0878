"""The ways to compute attention beside the plain form, forward and gradient, and which is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dopsd_jax.models import attention as lib

F32, BF16 = jnp.float32, jnp.bfloat16


def inputs(B, N, M, K, J, d, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), F32)
            for shape in ((B, N, K, d), (B, M, J, d), (B, M, J, d))]


def key_mask(B, M):
    """Ragged, with a hole, and one row that may attend nowhere."""
    lengths = np.linspace(1, M, B).astype(int)
    mask = np.arange(M) < lengths[:, None]
    mask[-1, M // 2] = False
    return jnp.asarray(mask).at[0].set(False)


def pair_mask(B, N, M):
    return jnp.asarray(np.random.default_rng(7).random((B, N, M)) < 0.5).at[0, 0].set(False)


def assert_same(way, q, k, v, mask, atol=2e-5):
    """Outputs, and gradients of a sum that weighs every output differently."""
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), F32)

    def both(f):
        def loss(q, k, v):
            out = f(q, k, v, mask)
            return jnp.sum(out * weights), out
        (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return [out, *grads]

    for name, got, want in zip(("out", "dq", "dk", "dv"), both(way), both(lib.plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=name)


def test_plain_equals_torch():
    q, k, v = inputs(3, 37, 41, 4, 2, 16)
    mask = key_mask(3, 41).at[0].set(True)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(np.asarray(x)).transpose(1, 2) for x in (q, k, v)),
        attn_mask=torch.tensor(np.asarray(mask))[:, None, None], enable_gqa=True,
    ).transpose(1, 2)
    np.testing.assert_allclose(lib.attention(q, k, v, mask=mask), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("chunk", [5, 12, 35])
@pytest.mark.parametrize("kind", [None, "keys", "pairs"])
def test_chunked_equals_plain(chunk, kind):
    q, k, v = inputs(3, 35, 29, 4, 2, 8)
    mask = {None: None, "keys": key_mask(3, 29), "pairs": pair_mask(3, 35, 29)}[kind]
    assert_same(lambda *a: lib.chunked(*a, chunk), q, k, v, mask)


def test_chunked_never_holds_the_whole_matrix_not_even_for_the_gradient():
    N, chunk = 2048, 64
    q = jax.ShapeDtypeStruct((1, N, 1, 8), F32)
    grad = jax.grad(lambda q, k, v: jnp.sum(lib.chunked(q, k, v, None, chunk)), (0, 1, 2))
    compiled = jax.jit(grad).lower(q, q, q).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < N * N * 4 / 4


@pytest.mark.parametrize(
    "N,M,K,J,masked",
    [(256, 256, 2, 2, False),  # whole tiles, nothing to mask
     (200, 200, 2, 2, False),  # padded to 256
     (130, 300, 4, 2, True),   # another number of keys, which heads share
     (600, 640, 1, 1, True)],  # several tiles
)
def test_splash_equals_plain(N, M, K, J, masked):
    q, k, v = inputs(2, N, M, K, J, 128)
    mask = key_mask(2, M) if masked else None
    assert_same(lambda *a: lib.splash(*a, interpret=True), q, k, v, mask)


@pytest.mark.parametrize("kind", [None, "keys", "pairs"])
def test_what_is_handed_to_cudnn_means_the_same(kind):
    """Through XLA's implementation of the same call: cuDNN itself needs a GPU."""
    q, k, v = inputs(3, 35, 29, 4, 2, 8)
    mask = {None: None, "keys": key_mask(3, 29), "pairs": pair_mask(3, 35, 29)}[kind]
    assert_same(lambda *a: lib.cudnn(*a, implementation="xla"), q, k, v, mask)


def first_keys(lengths, M):
    return jnp.arange(M) < lengths[:, None]


def test_lengths_mean_a_mask_of_the_first_keys():
    q, k, v = inputs(3, 35, 29, 4, 2, 8)
    lengths = jnp.asarray([1, 17, 29], jnp.int32)
    assert_same(
        lambda q, k, v, mask: lib.attention(q, k, v, lengths=lengths), q, k, v,
        first_keys(lengths, 29),
    )


def test_lengths_as_cudnn_gets_them_mean_the_same():
    """Through XLA's implementation of the same call: cuDNN itself needs a GPU."""
    q, k, v = inputs(3, 35, 29, 4, 2, 8)
    lengths = jnp.asarray([1, 17, 29], jnp.int32)
    assert_same(
        lambda q, k, v, mask: lib.cudnn_prefix(q, k, v, lengths, implementation="xla"), q, k, v,
        first_keys(lengths, 29),
    )


def test_lengths_go_to_cudnn_as_lengths(monkeypatch):
    taken = []
    monkeypatch.setattr(lib.sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(lib, "cudnn_prefix", lambda q, k, v, n: taken.append(n) or v)
    q = jax.ShapeDtypeStruct((1, 1152, 1, 64), BF16)
    jax.eval_shape(lambda q, n: lib.attention(q, q, q, lengths=n), q,
                   jax.ShapeDtypeStruct((1,), jnp.int32))
    assert [n.shape for n in taken] == [(1,)]


def test_a_mask_and_lengths_are_one_too_many():
    q, k, v = inputs(1, 3, 3, 1, 1, 8)
    with pytest.raises(ValueError, match="a mask or lengths, got both"):
        lib.attention(q, k, v, mask=jnp.ones((1, 3), bool), lengths=jnp.ones(1, jnp.int32))


@pytest.mark.parametrize(
    "platform,N,d,dtype,mask_ndim,way",
    [("cpu", 96, 16, F32, 2, "plain"), ("cpu", 4608, 128, BF16, 2, "chunked"),
     ("tpu", 4608, 128, BF16, 2, "splash"), ("tpu", 4608, 128, BF16, None, "splash"),
     ("tpu", 512, 128, BF16, 2, "splash"), ("tpu", 4608, 128, BF16, 3, "chunked"),
     ("tpu", 4608, 80, BF16, 2, "chunked"), ("tpu", 16384, 512, F32, None, "chunked"),
     ("tpu", 96, 16, F32, 2, "plain"), ("tpu", 96, 128, F32, 2, "plain"),
     ("gpu", 4608, 128, BF16, 2, "cudnn"), ("gpu", 4608, 128, F32, 2, "chunked"),
     ("gpu", 16384, 512, BF16, None, "chunked"), ("gpu", 96, 16, BF16, 2, "plain")],
)
def test_which_way_is_taken(platform, N, d, dtype, mask_ndim, way):
    mask = None if mask_ndim is None else jnp.zeros((1,) * mask_ndim, bool)
    assert lib.choose(N, N, d, dtype, mask, platform) == way

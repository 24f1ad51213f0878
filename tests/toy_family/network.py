"""A small transformer that shares no name with those of the package; one token per latent."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dopsd_jax.core import sharding
from dopsd_jax.models.attention import attention
from dopsd_jax.models.denoiser import Passes, latent_shape
from dopsd_jax.models.layers import Dense, ParamNames, RMSNorm, scan_layers, sinusoid

NAMES = ParamNames(
    columns=("ask", "seek", "give", "grow"), rows=("gather", "shrink"), whole=("anchor",),
    matmuls=("ask", "seek", "give", "grow"), last=("gather", "shrink", "pulse"),
)


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    in_channels: int = 4
    dim: int = 32
    depth: int = 3
    heads: int = 2
    words: int = 64

    @classmethod
    def from_json(cls, values: dict) -> ToyConfig:
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})


class Stratum(nn.Module):
    config: ToyConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, time, mask):
        c = self.config

        def linear(y, width, name):
            return Dense(width, use_bias=False, dtype=self.dtype, name=name)(y)

        h = RMSNorm(1e-5, self.dtype, name="calm")(x) * (1 + linear(time, c.dim, "pulse")[:, None])
        q, k, v = (
            linear(h, c.dim, name).reshape(*h.shape[:2], c.heads, -1)
            for name in ("ask", "seek", "give")
        )
        x = x + linear(attention(q, k, v, mask=mask).reshape(x.shape), c.dim, "gather")
        h = nn.gelu(linear(RMSNorm(1e-5, self.dtype, name="still")(x), 3 * c.dim, "grow"))
        return x + linear(h, c.dim, "shrink"), None


class ToyTransformer(nn.Module):
    config: ToyConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "full"

    @nn.compact
    def __call__(self, x, sigma, text, text_mask):
        c, (B, h, w, C) = self.config, x.shape
        time = Dense(c.dim, dtype=self.dtype, name="clock")(sinusoid(1000 * sigma, c.dim))
        image = Dense(c.dim, dtype=self.dtype, name="enter")(x.reshape(B, h * w, C))
        anchor = self.param("anchor", nn.initializers.normal(0.02), (1, c.dim))
        image = image + anchor.astype(self.dtype) + sinusoid(jnp.arange(h * w), c.dim)
        both = jnp.concatenate([image.astype(self.dtype),
                                Dense(c.dim, dtype=self.dtype, name="read")(text)], axis=1)
        mask = jnp.concatenate([jnp.ones((B, h * w), bool), text_mask], axis=1)
        strata = scan_layers(Stratum, c.depth, self.remat, NAMES, num_broadcast=2)
        both, _ = strata(c, self.dtype, name="strata")(both, time, mask)
        return Dense(C, dtype=self.dtype, name="leave")(both[:, : h * w]).reshape(x.shape)

    def smallest_inputs(self):
        c = self.config
        return (jnp.zeros((1, 1, 1, c.in_channels)), jnp.zeros(1), jnp.zeros((1, 1, c.words)),
                jnp.ones((1, 1), bool))

    def check_sizes(self, h: int, w: int, L: int) -> None:
        if h * w + L > 4096:
            raise ValueError("ToyTransformer: at most 4096 tokens")


@dataclasses.dataclass(frozen=True)
class ToyDenoiser:
    network: ToyTransformer
    pixels_per_latent: int = 8
    mesh: Mesh | None = None
    max_references = 0

    @property
    def pixel_multiple(self) -> int:
        return self.pixels_per_latent

    @property
    def text_width(self) -> int:
        return self.network.config.words

    def passes(self, image: int, text: int, references: int = 0) -> Passes:
        whole = image + text
        return Passes(
            ((r"clock|strata/pulse", 1), (r"enter|leave", image), (r"read", text),
             (r"strata/.*", whole)),
            {"strata": whole}, matmuls_again=0.4,
        )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return latent_shape(self, height, width)

    def velocity(self, variables, x, sigma, ctx) -> jax.Array:
        sigma = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), (x.shape[0],))
        with sharding.use_mesh(self.mesh):
            v = self.network.apply(
                variables, x.astype(self.network.dtype), sigma, ctx.text, ctx.text_mask
            )
        return v.astype(jnp.float32)

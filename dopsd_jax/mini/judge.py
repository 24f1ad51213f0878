"""The judge: a small classifier of styles and concepts, trained on real pictures of the world.

It never sees generated pictures. Its features are what Frechet distances are measured in, so all
figures of the mini model are relative to it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import save_file

from dopsd_jax.core import trees
from dopsd_jax.core.log import log
from dopsd_jax.method.train_step import Method, init_state, make_optimizer, make_train_step
from dopsd_jax.mini import data as data_lib
from dopsd_jax.mini.build import ALL_CONCEPTS, ALL_STYLES
from dopsd_jax.models.layers import Dense
from dopsd_jax.run import loop

FEATURES = 64
WIDTHS = (32, 64, 128, 160)
FILE = "judge.safetensors"
FILE_DTYPE = "float16"  # of its parameters


class Judge(nn.Module):
    """Pictures float32 [B, 64, 64, 3] in [-1, 1] -> features [B, 64], style and concept logits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        for i, width in enumerate(WIDTHS):
            stride = 2 if i < 3 else 1
            x = nn.Conv(width, (3, 3), strides=stride, padding=1, name=f"blocks_{i}_a")(x)
            x = nn.silu(nn.GroupNorm(8, name=f"norms_{i}")(x))
        x = nn.Conv(WIDTHS[-1], (3, 3), padding=1, name="blocks_4_a")(x)
        x = nn.silu(nn.GroupNorm(8, name="norms_4")(x))
        # What is anywhere in the picture, and what fills it.
        x = jnp.concatenate([jnp.max(x, (1, 2)), jnp.mean(x, (1, 2))], axis=-1)
        features = nn.silu(Dense(FEATURES, name="features")(x))
        return (features, Dense(len(ALL_STYLES), name="styles")(features),
                Dense(len(ALL_CONCEPTS), name="concepts")(features))


@flax.struct.dataclass
class JudgeBatch:
    """images [B, 64, 64, 3] float32, styles int32 [B], concepts float32 [B, 20]."""

    images: jax.Array
    styles: jax.Array
    concepts: jax.Array


@dataclasses.dataclass(frozen=True)
class Opinion:
    """The judge's classification of N pictures.

    Attributes:
        features: float32 [N, 64].
        styles: int [N], the likeliest style.
        concepts: float32 [N, 20], logits.
    """

    features: np.ndarray
    styles: np.ndarray
    concepts: np.ndarray

    def style_accuracy(self, styles: np.ndarray) -> np.ndarray:
        """bool [N]: the style is the one asked for."""
        return self.styles == styles

    def concept_accuracy(self, concepts: np.ndarray) -> np.ndarray:
        """bool [N]: the k concepts asked for are the judge's k likeliest."""
        count = concepts.sum(1, keepdims=True)
        rank = np.argsort(np.argsort(-self.concepts, axis=1), axis=1)
        return np.all((rank < count) == concepts, axis=1)


@jax.jit
def _judge(params, images):
    return Judge().apply({"params": params}, images)


def opinion(params: trees.Tree, pixels: np.ndarray, batch: int = 200) -> Opinion:
    """The judge's classification of pictures, uint8 [N, 64, 64, 3]."""
    parts = [
        [np.asarray(x) for x in _judge(params, data_lib.to_float(pixels[i : i + batch]))]
        for i in range(0, len(pixels), batch)
    ]
    features, styles, concepts = (np.concatenate(p) for p in zip(*parts, strict=True))
    return Opinion(features, styles.argmax(1), concepts)


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D], float64."""
    return features.mean(0, dtype=np.float64), np.cov(features.astype(np.float64), rowvar=False)


def frechet_distance(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two (mean, covariance)."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    # tr of the root of a product of two positive matrices, through a symmetric one.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))


def judge_objective(student, teacher, base, batch: JudgeBatch):
    """Cross-entropy of the style plus that of every concept's presence."""
    def loss(params):
        _, styles, concepts = Judge().apply({"params": params}, batch.images)
        style = -jnp.mean(
            jnp.take_along_axis(jax.nn.log_softmax(styles), batch.styles[:, None], axis=1)
        )
        present = jnp.mean(jnp.sum(
            jax.nn.softplus(concepts) - batch.concepts * concepts, axis=1
        ))
        return style + present, {"loss_style": style, "loss_concept": present}

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(student)
    return grads, {"loss": value} | metrics


def _shifted(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrored at random and moved by up to 4 pixels, the rim repeated."""
    out = np.empty_like(pixels)
    for i, picture in enumerate(pixels):
        dy, dx = rng.integers(0, 9, 2)
        padded = np.pad(picture, ((4, 4), (4, 4), (0, 0)), mode="edge")
        moved = padded[dy : dy + picture.shape[0], dx : dx + picture.shape[1]]
        out[i] = moved[:, ::-1] if rng.uniform() < 0.5 else moved
    return out


def prepare(config: ConfigDict, workdir: Path):
    """The task, and what to do with its last state: measure the judge and write it."""
    train, test = (data_lib.read_part(config.data, kind) for kind in ("judge", "judge_test"))
    scenes = data_lib.read_part(config.data, "scenes")
    blank = jnp.zeros((1, *train.pixels.shape[1:]))
    params = jax.jit(Judge().init)(jax.random.key(config.seed), blank)["params"]
    optimizer = make_optimizer(
        **config.optimizer.to_dict(), num_train_steps=config.num_train_steps, stacks=("blocks_.*",)
    )
    state = init_state(params, optimizer, jax.random.key_data(jax.random.key(config.seed + 1)))
    method = Method(
        trainable="full", teacher="ema", ema_decay=config.ema_decay, ema_warmup=True
    )
    step_fn = jax.jit(make_train_step(method, optimizer, judge_objective), donate_argnums=0)

    def make_batch(step: int, rng) -> JudgeBatch:
        draw = np.random.default_rng([config.seed, step])
        index = np.sort(draw.choice(len(train), config.batch_size, replace=False))
        return JudgeBatch(
            jnp.asarray(data_lib.to_float(_shifted(train.pixels[index], draw))),
            jnp.asarray(train.styles[index]),
            jnp.asarray(train.concepts[index].astype(np.float32)),
        )

    def measure(params) -> dict[str, float]:
        said = opinion(params, test.pixels)
        one = test.concepts.sum(1) == 1
        right = said.concept_accuracy(test.concepts)
        return {"style": float(said.style_accuracy(test.styles).mean()),
                "concept": float(right.mean()), "concept_of_one": float(right[one].mean())}

    def preview(step: int, state, metrics) -> None:
        log.info("step %d: accuracy on held-back pictures %s", step, measure(state.teacher))

    def finish(state) -> None:
        params = trees.cast_floats(trees.cast_floats(state.teacher, FILE_DTYPE), "float32")
        said = opinion(params, scenes.pixels[:4000])
        halves = [moments(half) for half in np.array_split(said.features, 2)]
        report = measure(params) | {"frechet_of_two_real_sets": frechet_distance(*halves)}
        write(workdir / FILE, params, {"trained": moments(said.features)} | {
            style: moments(opinion(params, test.pixels[test.styles == i]).features)
            for i, style in enumerate(ALL_STYLES)
        }, report)
        log.info("judge: %s", report)

    return loop.Task(state, lambda s, b: step_fn(s, None, b), make_batch, preview), finish


def write(path: Path, params: trees.Tree, references: dict, report: dict) -> None:
    """The judge, the moments of real pictures by name, and its report, in one file."""
    rounded = trees.flatten(trees.cast_floats(params, FILE_DTYPE))
    tensors = {f"params/{n}": np.asarray(x) for n, x in rounded.items()}
    for name, (mean, cov) in references.items():
        tensors |= {f"real/{name}/mean": mean.astype(np.float32),
                    f"real/{name}/cov": cov.astype(np.float32)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata={"report": json.dumps(report)})
    temporary.chmod(0o644)
    os.replace(temporary, path)


@functools.cache
def read(path: str | Path) -> tuple[trees.Tree, dict, dict]:
    """Parameters, moments {name: (mean, cov)} and report of a judge's file.

    Raises:
        ValueError: No such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no judge there; configs/mini/judge.py trains one")
    with safe_open(path, framework="numpy") as f:
        flat = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        report = json.loads(f.metadata()["report"])
    tree = trees.unflatten(flat)
    real = {name: (m["mean"].astype(np.float64), m["cov"].astype(np.float64))
            for name, m in tree["real"].items()}
    return trees.cast_floats(tree["params"], "float32"), real, report

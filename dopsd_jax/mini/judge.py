"""The judge: a small classifier of what a picture shows, trained on real pictures of the world.

It says the style, which things are there, how many objects, and where the first one is.
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
import optax
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import save_file

from dopsd_jax.core import trees
from dopsd_jax.core.files import new_sibling
from dopsd_jax.core.log import log
from dopsd_jax.method.train_step import Method, init_state, make_train_step
from dopsd_jax.mini import data as data_lib
from dopsd_jax.mini import ending
from dopsd_jax.mini import rows as rows_lib
from dopsd_jax.mini.labels import WORLD, Labels
from dopsd_jax.mini.styles import SIZE
from dopsd_jax.models.layers import Dense
from dopsd_jax.run import loop

FEATURES = 64
WIDTHS = (32, 64, 128, 192)
MOST = 3  # objects of a picture
ANSWERS = ("styles", "concepts", "counts", "middles")
FILE = "judge.safetensors"
FILE_DTYPE = "float16"  # of its parameters


class Judge(nn.Module):
    """Pictures float32 [B, 64, 64, 3] in [-1, 1] -> features [B, 64], and answers by name.

    `styles` and `concepts` are logits of labels, `counts` logits of 1 to MOST objects, `middles`
    where the only object is, (x, y) in [-1, 1].

    Attributes:
        answers: Their sizes by name.
        widths: Channels of the convolutions.
    """

    answers: tuple[tuple[str, int], ...]
    widths: tuple[int, ...] = WIDTHS

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        for i, width in enumerate(self.widths):
            stride = 2 if i < 3 else 1
            x = nn.Conv(width, (3, 3), strides=stride, padding=1, name=f"blocks_{i}_a")(x)
            x = nn.silu(nn.GroupNorm(8, name=f"norms_{i}")(x))
        x = nn.Conv(self.widths[-1], (3, 3), padding=1, name="blocks_4_a")(x)
        x = nn.silu(nn.GroupNorm(8, name="norms_4")(x))
        # What is anywhere in the picture, and what fills it.
        pooled = jnp.concatenate([jnp.max(x, (1, 2)), jnp.mean(x, (1, 2))], axis=-1)
        features = nn.silu(Dense(FEATURES, name="features")(pooled))
        # Where things are is lost in the pooled map, and must not count in the features.
        read = {name: pooled if name == "counts" else features for name, _ in self.answers}
        read["middles"] = x.reshape(len(x), -1)
        return features, {
            name: Dense(size, name=name)(read[name]) for name, size in self.answers
        }


@flax.struct.dataclass
class JudgeBatch:
    """images [B, 64, 64, 3] float32, styles int32 [B], concepts float32 [B, 48].

    counts int32 [B], number of objects; middles float32 [B, 2] in [-1, 1].
    """

    images: jax.Array
    styles: jax.Array
    concepts: jax.Array
    counts: jax.Array
    middles: jax.Array


@dataclasses.dataclass(frozen=True)
class Opinion:
    """The judge's classification of N pictures.

    Attributes:
        features: float32 [N, 64].
        styles: int [N], the likeliest style.
        concepts: float32 [N, labels' concepts], logits.
        counts: int [N], the likeliest number of objects.
        middles: float32 [N, 2], where the only object is, (x, y) in pixels.
    """

    features: np.ndarray
    styles: np.ndarray
    concepts: np.ndarray
    counts: np.ndarray | None = None
    middles: np.ndarray | None = None

    def style_accuracy(self, styles: np.ndarray) -> np.ndarray:
        """bool [N]: the style is the one asked for."""
        return self.styles == styles

    def concept_accuracy(self, concepts: np.ndarray) -> np.ndarray:
        """bool [N]: the k concepts asked for are the judge's k likeliest."""
        count = concepts.sum(1, keepdims=True)
        rank = np.argsort(np.argsort(-self.concepts, axis=1), axis=1)
        return np.all((rank < count) == concepts, axis=1)


def network_of(params: trees.Tree) -> Judge:
    """The network whose parameters these are."""
    blocks = sorted(name for name in params if name.startswith("blocks_"))
    return Judge(
        tuple((name, params[name]["bias"].shape[-1]) for name in ANSWERS if name in params),
        tuple(params[name]["kernel"].shape[-1] for name in blocks[:-1]),
    )


@functools.partial(jax.jit, static_argnums=0)
def _look(network: Judge, params, images):
    return network.apply({"params": params}, images)


def opinion(params: trees.Tree, pixels: np.ndarray, batch: int = 100) -> Opinion:
    """The judge's classification of pictures, uint8 [N, 64, 64, 3]."""
    network, parts = network_of(params), []
    for i in range(0, len(pixels), batch):
        rows = np.minimum(np.arange(i, i + batch), len(pixels) - 1)  # one program for all
        parts.append(jax.device_get(_look(network, params, data_lib.to_float(pixels[rows]))))
    features, said = jax.tree.map(lambda *x: np.concatenate(x)[: len(pixels)], *parts)
    more = {}
    if "counts" in said:
        more = {"counts": 1 + said["counts"].argmax(1), "middles": SIZE / 2 * (1 + said["middles"])}
    return Opinion(features, said["styles"].argmax(1), said["concepts"], **more)


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
    """Cross-entropies of the style, of every concept's presence and of the number of objects.

    And the squared error of where the object is, if there is only one.
    """
    network = network_of(student)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels

    def loss(params):
        _, said = network.apply({"params": params}, batch.images)
        concepts = said["concepts"]
        losses = {
            "style": jnp.mean(cross_entropy(said["styles"], batch.styles)),
            "concept": jnp.mean(
                jnp.sum(jax.nn.softplus(concepts) - batch.concepts * concepts, axis=1)
            ),
            "count": jnp.mean(cross_entropy(said["counts"], batch.counts - 1)),
            "middle": jnp.mean(
                (batch.counts == 1)[:, None] * jnp.square(said["middles"] - batch.middles)
            ),
        }
        return sum(losses.values()), {f"loss_{name}": value for name, value in losses.items()}

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(student)
    return grads, {"loss": value} | metrics


def shifted(pixels: jax.Array, middles: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pictures mirrored at random and moved by up to 4 pixels, and where the objects then are.

    Args:
        pixels: [B, H, W, 3]; its rim is repeated.
        middles: float32 [B, 2], (x, y) in pixels.
        key: PRNG key.
    """
    for_move, for_mirror = jax.random.split(key)
    B, H, W, _ = pixels.shape
    move = jax.random.randint(for_move, (B, 2), 0, 9)  # down, right
    padded = jnp.pad(pixels, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    moved = jax.vmap(lambda p, m: jax.lax.dynamic_slice(p, (*m, 0), (H, W, 3)))(padded, move)
    middles = middles + 4 - move[:, ::-1]
    mirrored = jax.random.bernoulli(for_mirror, shape=(B,))
    x = jnp.where(mirrored, W - middles[:, 0], middles[:, 0])
    moved = jnp.where(mirrored[:, None, None, None], moved[:, :, ::-1], moved)
    return moved, jnp.stack([x, middles[:, 1]], axis=1)


def prepare(config: ConfigDict, workdir: Path):
    """The task, and what to do with its last state: measure the judge and write it."""
    train, test = (data_lib.read_part(config.data, kind) for kind in ("judge", "judge_test"))
    scenes = data_lib.read_part(config.data, "scenes")
    blank = jnp.zeros((1, *train.pixels.shape[1:]))
    sizes = (len(WORLD.styles), len(WORLD.concepts), MOST, 2)
    network = Judge(tuple(zip(ANSWERS, sizes, strict=True)))
    params = jax.jit(network.init)(jax.random.key(config.seed), blank)["params"]
    optimizer = ending.optimizer_of(config, ("blocks_.*",))
    optimizer = ending.with_end(optimizer, config)
    state = init_state(params, optimizer, jax.random.key_data(jax.random.key(config.seed + 1)))
    method = Method(
        trainable="full", teacher="ema", ema_decay=config.ema_decay, ema_warmup=True
    )
    def draw_batch(train, key) -> JudgeBatch:
        for_index, for_shift = jax.random.split(key)
        index = jax.random.randint(for_index, (config.batch_size,), 0, len(train["pixels"]))
        drawn = {name: array[index] for name, array in train.items()}
        pixels, middles = shifted(drawn["pixels"], drawn["middles"], for_shift)
        return JudgeBatch(
            data_lib.to_float(pixels), drawn["styles"],
            drawn["concepts"].astype(jnp.float32), drawn["counts"], middles / (SIZE / 2) - 1,
        )

    step_fn = rows_lib.step_that_draws(
        make_train_step(method, optimizer, judge_objective), draw_batch
    )
    data = {name: jnp.asarray(getattr(train, name))
            for name in ("pixels", "styles", "concepts", "counts", "middles")}

    def measure(params) -> dict[str, float]:
        said = opinion(params, test.pixels)
        one = test.concepts.sum(1) == 1
        right = said.concept_accuracy(test.concepts)
        off = np.abs(said.middles - test.middles)[test.counts == 1]
        return {"style": float(said.style_accuracy(test.styles).mean()),
                "concept": float(right.mean()), "concept_of_one": float(right[one].mean()),
                "count": float((said.counts == test.counts).mean()),
                "middle_off_by": float(off.mean())}  # pixels

    def preview(step: int, state, metrics) -> None:
        log.info("step %d: accuracy on held-back pictures %s", step, measure(state.teacher))

    def finish(state) -> None:
        params = trees.cast_floats(trees.cast_floats(state.teacher, FILE_DTYPE), "float32")
        said = opinion(params, scenes.pixels[:4000])
        halves = [moments(half) for half in np.array_split(said.features, 2)]
        report = measure(params) | {"frechet_of_two_real_sets": frechet_distance(*halves)}
        write(workdir / FILE, params, WORLD, {"trained": moments(said.features)} | {
            style: moments(opinion(params, test.pixels[test.styles == i]).features)
            for i, style in enumerate(WORLD.styles)
        }, report)
        log.info("judge: %s", report)

    return loop.Task(
        state, lambda state, data: step_fn(state, None, data), lambda step, rng: data, preview
    ), finish


def write(
    path: Path, params: trees.Tree, labels: Labels, references: dict, report: dict
) -> None:
    """The judge, its labels, the moments of real pictures by name, and its report, in one file."""
    rounded = trees.flatten(trees.cast_floats(params, FILE_DTYPE))
    tensors = {f"params/{n}": np.asarray(x) for n, x in rounded.items()}
    for name, (mean, cov) in references.items():
        tensors |= {f"real/{name}/mean": mean.astype(np.float32),
                    f"real/{name}/cov": cov.astype(np.float32)}
    words = {"labels": json.dumps(dataclasses.asdict(labels)), "report": json.dumps(report)}
    with new_sibling(path) as temporary:
        save_file(tensors, temporary, metadata=words)
        temporary.chmod(0o644)
        os.replace(temporary, path)


@dataclasses.dataclass(frozen=True)
class JudgeFile:
    """What a judge's file holds.

    Attributes:
        params: Of the network.
        labels: The names of its answers.
        real: Moments (mean [64], covariance [64, 64]), float64, of the features of real pictures:
            of those like the training scenes ("trained"), and of every style.
        report: Its accuracies on held-back pictures.
    """

    params: trees.Tree
    labels: Labels
    real: dict[str, tuple[np.ndarray, np.ndarray]]
    report: dict[str, float]


@functools.cache
def read(path: str | Path) -> JudgeFile:
    """A judge's file.

    Raises:
        ValueError: No such file, or one that does not name its answers.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no judge there; configs/mini/judge.py trains one")
    with safe_open(path, framework="numpy") as f:
        flat = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        words = f.metadata() or {}
    if not {"labels", "report"} <= set(words):
        raise ValueError(f"{path}: expected metadata with labels and report, found {list(words)}")
    tree = trees.unflatten(flat)
    real = {name: (m["mean"].astype(np.float64), m["cov"].astype(np.float64))
            for name, m in tree["real"].items()}
    return JudgeFile(
        trees.cast_floats(tree["params"], "float32"), Labels.from_json(json.loads(words["labels"])),
        real, json.loads(words["report"]),
    )

"""What a tuned mini model draws, judged picture by picture, on noise that all runs share."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from dopsd_jax.core import trees
from dopsd_jax.core.files import write_whole
from dopsd_jax.data.images import read_image
from dopsd_jax.mini import drawing, judge, world
from dopsd_jax.mini.labels import Labels
from dopsd_jax.run import gauges
from dopsd_jax.weights.pipeline import Pipeline

NEW_SEEN, NEW_UNSEEN, OLD = "new style, tuned things", "new style, other things", "old prompts"
FIRST_SEED = 9_000_000  # of the noise; training and the gates start elsewhere
OTHER_NOISE = 5_000_000  # added to them: what two draws of one model differ by


@dataclasses.dataclass(frozen=True)
class CaseSet:
    """Prompts of one kind, each drawn from several noises: row = case * seeds + seed.

    Attributes:
        name: NEW_SEEN, NEW_UNSEEN or OLD.
        seeds: Noises per prompt.
        rows: Captions, what each must show and its noise, of every picture.
    """

    name: str
    seeds: int
    rows: drawing.Cases

    @property
    def cases(self) -> int:
        return len(self.rows) // self.seeds

    def by_case(self, values: np.ndarray) -> np.ndarray:
        """[pictures] -> [cases, seeds]."""
        return np.asarray(values).reshape(self.cases, self.seeds)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The judge's classification of the pictures of one CaseSet.

    Attributes:
        style, concept: bool [N], as asked for.
        sharpness: float32 [N].
        copying: float32 [N], cosine similarity to the nearest training picture's features.
        features: float32 [N, 64].
    """

    style: np.ndarray
    concept: np.ndarray
    sharpness: np.ndarray
    copying: np.ndarray
    features: np.ndarray


def repeated(cases: drawing.Cases, seeds: int, first: int) -> drawing.Cases:
    """Every case on so many noises, whose numbers count from `first`."""
    count = len(cases) * seeds
    return drawing.Cases(
        [c for c in cases.captions for _ in range(seeds)], np.repeat(cases.styles, seeds),
        np.repeat(cases.concepts, seeds, axis=0), first + np.arange(count),
    )


def of_style(
    labels: Labels, style: str, concepts: Sequence[str], called: str = ""
) -> drawing.Cases:
    """A prompt for each of the things, in one style, by its name or what it is called."""
    captions = [f"{world.with_article(c)}, {called or style} style" for c in concepts]
    return drawing.Cases(
        captions, np.full(len(concepts), labels.styles.index(style)),
        np.stack([labels.shown([c]) for c in concepts]), np.arange(len(concepts)),
    )


def case_sets(
    labels: Labels, style: str, tuned: Sequence[str], *, old: drawing.Cases, seeds: int
) -> dict[str, CaseSet]:
    """The three sets, by name.

    Args:
        labels: What the judge knows by name.
        style: The new one.
        tuned: Concepts of the training pictures.
        old: Prompts that have nothing to do with it.
        seeds: Noises per prompt.

    Raises:
        ValueError: A style or concept that is not among the labels.
    """
    unknown = sorted({style} - set(labels.styles)) + sorted(set(tuned) - set(labels.concepts))
    if unknown:
        raise ValueError(f"expected a style and things of the mini world, got {unknown}")
    others = [c for c in labels.trained_concepts if c not in tuned]
    sets, first = {}, FIRST_SEED
    for name, cases in (
        (NEW_SEEN, of_style(labels, style, tuned)),
        (NEW_UNSEEN, of_style(labels, style, others)),
        (OLD, old),
    ):
        rows = repeated(cases, seeds, first)
        sets[name] = CaseSet(name, seeds, rows)
        first += len(rows)
    return sets


def write_arrays(file: Path, tree: trees.Tree) -> None:
    """Writes NumPy arrays to a compressed file, which appears when it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez_compressed(content, **trees.flatten(tree))
    write_whole(epath.Path(file), content.getvalue())


def read_arrays(file: Path) -> trees.Tree:
    """What `write_arrays` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        return trees.unflatten({name: arrays[name] for name in arrays.files})


def training_pictures(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Pictures uint8 [N, 64, 64, 3] and concepts of a folder as `mini.build --style` writes it."""
    files = sorted(folder.glob("*.png"))
    if not files:
        raise ValueError(f"{folder}: expected pictures as mini.build --style writes, found none")
    pixels = np.stack([np.asarray(read_image(f)) for f in files])
    return pixels, [f.stem.replace("-", " ") for f in files]


class Bench:
    """Draws the sets with a model and has the pictures judged."""

    def __init__(self, pipe: Pipeline, sets: dict[str, CaseSet], judge_file: Path, folder: Path):
        self._pipe, self._sets = pipe, sets
        self._judge = judge.read(str(judge_file))
        self.real, self.report = self._judge.real, self._judge.report
        pictures, _ = training_pictures(folder)
        self._training = _unit(judge.opinion(self._judge.params, pictures).features)
        self._contexts = {
            name: drawing.text_contexts(pipe, s.rows.captions) for name, s in sets.items()
        }

    def draw(self, name: str, variables: trees.Tree, *, num_steps: int, guidance: float = 1.0,
             shift: int = 0) -> np.ndarray:
        """Pictures of one set, uint8 [N, 64, 64, 3]; `shift` is added to the seeds of the noise."""
        seeds = self._sets[name].rows.seeds + shift
        return drawing.draw(
            self._pipe, variables, self._contexts[name], seeds, num_steps=num_steps,
            guidance=guidance, batch=min(100, len(seeds)),
        )

    def judged(self, name: str, pixels: np.ndarray) -> Measured:
        """What the judge says of pictures of one set."""
        rows = self._sets[name].rows
        said = judge.opinion(self._judge.params, pixels)
        near = (_unit(said.features) @ self._training.T).max(1)
        return Measured(
            said.style_accuracy(rows.styles), said.concept_accuracy(rows.concepts),
            gauges.sharpness(pixels), near, said.features,
        )

    def measure(self, variables: trees.Tree, **how) -> dict[str, Measured]:
        """All sets of pictures, drawn by `draw`."""
        return {name: self.judged(name, self.draw(name, variables, **how)) for name in self._sets}


def _unit(features: np.ndarray) -> np.ndarray:
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-8)

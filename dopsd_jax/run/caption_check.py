"""Captions against the lengths of a config, by the tokenizers alone, before weights are read."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from ml_collections import ConfigDict

from dopsd_jax.core.checks import noted
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.datasets import Data
from dopsd_jax.data.files import DataError
from dopsd_jax.data.prompts import encode_prompts, load_tokenizer, smart_resize
from dopsd_jax.data.rows import Row
from dopsd_jax.method.contexts import RECIPES, STUDENT, TEACHER, vlm_ids
from dopsd_jax.run.config import needs_teacher, needs_vlm
from dopsd_jax.run.model import load_model
from dopsd_jax.run.rules import MAX_TOKENS
from dopsd_jax.weights.pipeline import Pipeline, read_vl_config
from dopsd_jax.weights.shipped import vlm_directory

MAX_LISTED = 20


class Captions:
    """The captions of a config's rows, as student and teacher read them; needs no weights.

    Args:
        config: Of the run.

    Attributes:
        limits: Role -> how many tokens it takes, for each role of the run.
    """

    def __init__(self, config: ConfigDict):
        self._config, self._pipe = config, load_model(config, parts=())
        self._recipe = RECIPES[config.recipe]
        self._count: dict[str, Count] = {STUDENT: _student(self._pipe)}
        self.limits = {STUDENT: config.text_tokens}
        if needs_teacher(config):
            self._count[TEACHER] = (_beside_image if needs_vlm(config) else _text)(
                config, self._pipe
            )
            self.limits[TEACHER] = config.teacher_tokens

    def tokens(self, role: str, row: Row, caption: str, bucket: Bucket) -> int | None:
        """How many tokens a role would read, template and image included.

        At most MAX_TOKENS are counted; None for a caption that it cannot read.
        """
        try:
            return self._count[role](row, caption, bucket, MAX_TOKENS, True)
        except ValueError:
            return None

    def problems(self, row: Row, bucket: Bucket) -> list[str]:
        """What a run refuses a row for: too many references, captions that are too long, or that
        the teacher cannot take."""
        most, problems = self._pipe.denoiser.max_references, []
        shown = max(len(self._recipe.shown(r, len(row.references))) for r in self._count)
        if shown > most:
            problems.append(f"{row.where}: {shown} references, this model takes at most {most}")
        keys = {STUDENT: "text_tokens", TEACHER: "teacher_tokens"}
        for key, caption in row.captions.items():
            for role, count in self._count.items():
                limit = self.limits[role]
                with noted(problems, f"{row.where}, {key}, {keys[role]} = {limit}"):
                    count(row, caption, bucket, limit, self._config.truncate_prompts)
        return problems


def check_captions(config: ConfigDict, data: Data) -> None:
    """Refuses captions that do not fit, and rows with more references than the model takes.

    Args:
        config: Of the run.
        data: All rows; the bucket of each says how many tokens the teacher's image takes.

    Raises:
        DataError: Every caption that is too long for the student, or with what stands beside it
            for the teacher, or that the teacher cannot take.
    """
    captions = Captions(config)
    problems = list(itertools.chain.from_iterable(
        captions.problems(row, data.bucket(i)) for i, row in enumerate(data.rows)
    ))
    if problems:
        rest = len(problems) - MAX_LISTED
        listed = problems[:MAX_LISTED] + ([f"and {rest} more"] if rest > 0 else [])
        raise DataError("captions that do not fit:\n  " + "\n  ".join(listed))


# (row, caption, bucket, length, truncate) -> tokens; ValueError for a caption that does not fit.
Count = Callable[[Row, str, Bucket, int, bool], int]


def _student(pipe: Pipeline) -> Count:
    """Counts the student's prompts."""
    def count(row: Row, caption: str, bucket: Bucket, length: int, truncate: bool) -> int:
        del row, bucket
        _, mask = encode_prompts(
            pipe.tokenizer, [caption], length, enable_thinking=pipe.text.enable_thinking,
            truncate=truncate,
        )
        return int(mask.sum())

    return count


def _text(config: ConfigDict, pipe: Pipeline) -> Count:
    """Counts the teacher's prompts that are read without an image."""
    recipe, student = RECIPES[config.recipe], _student(pipe)

    def count(row: Row, caption: str, bucket: Bucket, length: int, truncate: bool) -> int:
        prompt = recipe.teacher_prompt(caption, row.enhanced, config.teacher_words)
        return student(row, prompt, bucket, length, truncate)

    return count


def _beside_image(config: ConfigDict, pipe: Pipeline) -> Count:
    """Counts the teacher's prompts that stand beside an image of a bucket in one text."""
    recipe = RECIPES[config.recipe]
    vl_tokenizer = load_tokenizer(vlm_directory(config.vlm, weights=False))
    vision = read_vl_config(config.vlm).vision
    factor = vision.patch_size * vision.spatial_merge_size

    def count(row: Row, caption: str, bucket: Bucket, length: int, truncate: bool) -> int:
        prompt = recipe.teacher_prompt(caption, row.enhanced, config.teacher_words)
        height, width = smart_resize(
            bucket.height, bucket.width, config.vlm_min_pixels, config.vlm_max_pixels,
            factor=factor,
        )
        _, mask = vlm_ids(
            pipe.tokenizer, vl_tokenizer, [prompt], height * width // factor**2, length=length,
            double_template=config.double_template, truncate=truncate,
        )
        return int(mask.sum())

    return count

"""Captions against the lengths of a config, by the tokenizers alone, before weights are read."""

from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from dopsd_jax.core.checks import noted
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.datasets import Data
from dopsd_jax.data.files import DataError
from dopsd_jax.data.prompts import encode_prompts, load_tokenizer, smart_resize
from dopsd_jax.data.rows import Row
from dopsd_jax.method.contexts import RECIPES, vlm_ids
from dopsd_jax.run.config import needs_teacher, needs_vlm, roles
from dopsd_jax.weights.pipeline import Pipeline, load_pipeline, read_vl_config
from dopsd_jax.weights.shipped import vlm_directory

MAX_LISTED = 20


def check_captions(config: ConfigDict, data: Data) -> None:
    """Refuses captions that do not fit, and rows with more references than the model takes.

    Args:
        config: Of the run.
        data: All rows; the bucket of each says how many tokens the teacher's image takes.

    Raises:
        DataError: Every caption that is too long for the student, or with what stands beside it
            for the teacher, or that the teacher cannot take.
    """
    pipe = load_pipeline(config.model, parts=())
    recipe, most = RECIPES[config.recipe], pipe.denoiser.max_references
    teacher_fits = None
    if needs_teacher(config):
        teacher_fits = (_vlm_rule if needs_vlm(config) else _text_rule)(config, pipe)
    problems: list[str] = []
    for i, row in enumerate(data.rows):
        shown = max(len(recipe.shown(role, len(row.references))) for role in roles(config))
        if shown > most:
            problems.append(f"{row.where}: {shown} references, this model takes at most {most}")
        for key, caption in row.captions.items():
            where = f"{row.where}, {key}"
            with noted(problems, f"{where}, text_tokens = {config.text_tokens}"):
                encode_prompts(pipe.tokenizer, [caption], config.text_tokens,
                               enable_thinking=pipe.text.enable_thinking,
                               truncate=config.truncate_prompts)
            if teacher_fits is not None:
                with noted(problems, f"{where}, teacher_tokens = {config.teacher_tokens}"):
                    teacher_fits(row, caption, data.bucket(i))
    if problems:
        rest = len(problems) - MAX_LISTED
        listed = problems[:MAX_LISTED] + ([f"and {rest} more"] if rest > 0 else [])
        raise DataError("captions that do not fit:\n  " + "\n  ".join(listed))


Check = Callable[[Row, str, Bucket], None]  # raises ValueError for a caption that does not fit


def _text_rule(config: ConfigDict, pipe: Pipeline) -> Check:
    """The rule for prompts that are read without an image."""
    recipe = RECIPES[config.recipe]

    def check(row: Row, caption: str, bucket: Bucket) -> None:
        del bucket
        prompt = recipe.teacher_prompt(caption, row.enhanced, config.teacher_words)
        encode_prompts(
            pipe.tokenizer, [prompt], config.teacher_tokens,
            enable_thinking=pipe.text.enable_thinking, truncate=config.truncate_prompts,
        )

    return check


def _vlm_rule(config: ConfigDict, pipe: Pipeline) -> Check:
    """The rule for prompts that stand beside an image of a bucket in one text."""
    recipe = RECIPES[config.recipe]
    vl_tokenizer = load_tokenizer(vlm_directory(config.vlm, weights=False))
    vision = read_vl_config(config.vlm).vision
    factor = vision.patch_size * vision.spatial_merge_size

    def check(row: Row, caption: str, bucket: Bucket) -> None:
        prompt = recipe.teacher_prompt(caption, row.enhanced, config.teacher_words)
        height, width = smart_resize(
            bucket.height, bucket.width, config.vlm_min_pixels, config.vlm_max_pixels,
            factor=factor,
        )
        vlm_ids(
            pipe.tokenizer, vl_tokenizer, [prompt], height * width // factor**2,
            length=config.teacher_tokens, double_template=config.double_template,
            truncate=config.truncate_prompts,
        )

    return check

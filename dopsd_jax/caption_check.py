"""Captions against the lengths of a config, by the tokenizers alone, before weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict

from dopsd_jax.config_check import needs_teacher
from dopsd_jax.contexts import vlm_ids
from dopsd_jax.core.checks import noted
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.prompts import encode_prompts, load_tokenizer, smart_resize
from dopsd_jax.data.rows import DataError, Row
from dopsd_jax.weights.pipeline import load_pipeline, read_vl_config
from dopsd_jax.weights.shipped import vlm_directory

MAX_LISTED = 20


def check_captions(
    config: ConfigDict, rows: Sequence[Row], bucket_of: Mapping[int, Bucket]
) -> None:
    """Refuses captions that do not fit.

    Args:
        config: Of the run.
        rows: All rows.
        bucket_of: Row number -> bucket, which says how many tokens the teacher's image takes.

    Raises:
        DataError: Every caption that is too long for the student, or together with its image for
            the teacher, or that the teacher cannot take.
    """
    tokenizer = load_pipeline(config.model, parts=()).tokenizer
    teacher_fits = _teacher_rule(config, tokenizer) if needs_teacher(config) else None
    problems: list[str] = []
    for i, row in enumerate(rows):
        for key, caption in row.captions.items():
            where = f"{row.where}, {key}"
            with noted(problems, f"{where}, text_tokens = {config.text_tokens}"):
                encode_prompts(tokenizer, [caption], config.text_tokens, enable_thinking=True,
                               truncate=config.truncate_prompts)
            if teacher_fits is not None:
                with noted(problems, f"{where}, teacher_tokens = {config.teacher_tokens}"):
                    teacher_fits(caption, bucket_of[i])
    if problems:
        rest = len(problems) - MAX_LISTED
        listed = problems[:MAX_LISTED] + ([f"and {rest} more"] if rest > 0 else [])
        raise DataError("captions that do not fit:\n  " + "\n  ".join(listed))


def _teacher_rule(config: ConfigDict, tokenizer) -> Callable[[str, Bucket], None]:
    """What raises ValueError for a caption that does not fit beside an image of a bucket."""
    vl_tokenizer = load_tokenizer(vlm_directory(config.vlm))
    vision = read_vl_config(config.vlm).vision
    factor = vision.patch_size * vision.spatial_merge_size

    def check(caption: str, bucket: Bucket) -> None:
        height, width = smart_resize(
            bucket.height, bucket.width, config.vlm_min_pixels, config.vlm_max_pixels,
            factor=factor,
        )
        vlm_ids(
            tokenizer, vl_tokenizer, [caption], height * width // factor**2,
            length=config.teacher_tokens, double_template=config.double_template,
            truncate=config.truncate_prompts,
        )

    return check

"""Command: image-text rows -> contexts on disk, so that training loads no encoder.

    python -m dopsd_jax.encode --config configs/z_image_turbo_lora.py --config.model=DIR \
        --config.vlm=DIR --config.data=DATA --config.cache=CACHE

and then train with the same --config.cache. Only what is not in the cache yet is encoded: after a
change of data, prompts, settings or weights, run it again. Several datasets may share a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from dopsd_jax import contexts
from dopsd_jax import workdir as workdir_lib
from dopsd_jax.caption_check import check_captions
from dopsd_jax.config_check import check_config
from dopsd_jax.core import cli, distributed
from dopsd_jax.core.log import log
from dopsd_jax.data.batches import BatchRows
from dopsd_jax.data.cache import Cache, CacheError, CacheWriter, entry_key
from dopsd_jax.data.datasets import Data, read_data
from dopsd_jax.models.denoiser import Context
from dopsd_jax.weights.pipeline import (
    Pipeline,
    VisionLanguage,
    fingerprint,
    load_pipeline,
    load_vision_language,
)
from dopsd_jax.weights.shipped import pipeline_directory, vlm_directory

FLAGS = flags.FLAGS

# The settings that a context follows from, besides caption, image, bucket and weights.
STUDENT_KEYS = ("recipe", "text_tokens", "truncate_prompts", "dtype")
TEACHER_KEYS = (
    "recipe", "teacher_tokens", "truncate_prompts", "dtype", "vlm_rope_theta", "vlm_min_pixels",
    "vlm_max_pixels", "double_template",
)
FORMAT = 1  # raised when the encoders' code changes what they compute
LISTED = 10


@dataclass(frozen=True)
class Entry:
    """One context: its key, the caption, for the teacher the row of the image, and a name."""

    key: str
    caption: str
    row: int | None
    where: str


class Entries:
    """The contexts of a run, each named by all that it follows from."""

    def __init__(self, config: ConfigDict, data: Data):
        self._data, self._prompts = data, tuple(config.sample_prompts)
        model, vlm = pipeline_directory(config.model), vlm_directory(config.vlm)
        text = fingerprint(model, ("text_encoder", "tokenizer"))
        self._student = {
            "role": "student", "format": FORMAT, "weights": text,
            "settings": {k: config[k] for k in STUDENT_KEYS},
        }
        self._teacher = {
            "role": "teacher", "format": FORMAT, "weights": [text, fingerprint(vlm)],
            "settings": {k: config[k] for k in TEACHER_KEYS},
        }

    def student(self, caption: str, where: str = "") -> Entry:
        return Entry(entry_key(caption=caption, **self._student), caption, None, where)

    def teacher(self, row: int, caption: str, where: str = "") -> Entry:
        bucket = self._data.bucket_of[row]
        key = entry_key(
            caption=caption, image=self._data.image_digests[row],
            bucket=[bucket.width, bucket.height], **self._teacher,
        )
        return Entry(key, caption, row, where)

    def all(self) -> list[Entry]:
        """Those of every distinct caption, (image, caption) and sample prompt."""
        found: dict[str, Entry] = {}
        for i, row in enumerate(self._data.rows):
            for name, caption in row.captions.items():
                where = f"{row.where}, caption {name!r}"
                for entry in (self.student(caption, where), self.teacher(i, caption, where)):
                    found.setdefault(entry.key, entry)
        for prompt in self._prompts:
            entry = self.student(prompt, f"sample_prompts: {prompt!r}")
            found.setdefault(entry.key, entry)
        return list(found.values())


class Encoders:
    """The frozen networks: an Entry -> its context without padding, [tokens, D]."""

    def __init__(self, config: ConfigDict, pipe: Pipeline, vl: VisionLanguage, data: Data):
        self._config, self._pipe, self._vl, self._data = config, pipe, vl, data

    def __call__(self, entry: Entry) -> np.ndarray:
        """Raises ValueError for a caption or image that does not fit, with its name."""
        c = self._config
        try:
            if entry.row is None:
                ctx = contexts.text_context(
                    self._pipe, [entry.caption], length=c.text_tokens,
                    truncate=c.truncate_prompts,
                )
            else:
                ctx = contexts.vlm_context(
                    self._pipe, self._vl, [entry.caption], self._data.pixels(entry.row)[None],
                    length=c.teacher_tokens, rope_theta=c.vlm_rope_theta,
                    min_pixels=c.vlm_min_pixels, max_pixels=c.vlm_max_pixels,
                    double_template=c.double_template, truncate=c.truncate_prompts,
                )
        except ValueError as e:
            raise ValueError(f"{entry.where}: {e}") from e
        return contexts.without_padding(ctx)


def encode_all(
    entries: Sequence[Entry], encoders: Encoders, put: Callable[[str, np.ndarray], None]
) -> None:
    """Runs the encoders over every entry, telling how far it is."""
    began, shown = time.time(), 0.0
    for done, entry in enumerate(entries, 1):
        put(entry.key, encoders(entry))
        if done == len(entries) or time.time() - shown > 10:
            shown = time.time()
            log.info("contexts: %d of %d, %.0f s", done, len(entries), shown - began)


class Contexts:
    """Contexts of a run, out of host memory or a cache."""

    def __init__(self, config: ConfigDict, data: Data, entries: Entries,
                 features: Mapping[str, np.ndarray]):
        self._config, self._data, self._entries, self._features = config, data, entries, features

    def batch(self, batch: BatchRows) -> tuple[Context, Context]:
        """Contexts of student and teacher for the rows of a batch, as NumPy."""
        captions = [
            self._data.rows[r].captions[k]
            for r, k in zip(batch.rows, batch.caption_keys, strict=True)
        ]
        pairs = zip(batch.rows, captions, strict=True)
        return (
            self.prompts(captions),
            self._padded((self._entries.teacher(r, c) for r, c in pairs),
                         self._config.teacher_tokens),
        )

    def prompts(self, prompts: Sequence[str]) -> Context:
        """What the student sees of prompts that are captions or sample prompts, as NumPy."""
        return self._padded(map(self._entries.student, prompts), self._config.text_tokens)

    def _padded(self, entries: Iterable[Entry], length: int) -> Context:
        return contexts.padded([self._features[e.key] for e in entries], length)


def open_cache(directory: str, entries: Entries) -> Cache:
    """A cache that holds every context of a run.

    Raises:
        CacheError: No cache, a damaged one, or one without some of the contexts.
    """
    cache, wanted = Cache(directory), entries.all()
    missing = [e for e in wanted if e.key not in cache]
    if missing:
        lines = [f"{e.where}, {'student' if e.row is None else 'teacher'}" for e in missing]
        more = [f".. and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        raise CacheError(
            f"{directory}: {len(missing)} of {len(wanted)} contexts are not in this cache; run "
            "python -m dopsd_jax.encode with the same config:\n  "
            + "\n  ".join(lines[:LISTED] + more)
        )
    log.info("%s: all %d contexts are there; no encoder is loaded", directory, len(wanted))
    return cache


def encode(config: ConfigDict) -> tuple[int, int]:
    """Adds to config.cache what it does not hold yet; loads nothing if that is nothing.

    Several processes share the work.

    Returns:
        How many contexts this process made, and how many were its share.

    Raises:
        ValueError: Bad config, data or weights; a caption that does not fit.
    """
    if not config.cache:
        raise ValueError("cache: expected a folder or gs://.., got nothing (--config.cache=..)")
    check_config(config)
    data = read_data(config)
    check_captions(config, data.rows, data.bucket_of)
    wanted = Entries(config, data).all()
    # A process's share does not depend on what others have written meanwhile.
    wanted = wanted[jax.process_index() :: jax.process_count()]
    cache = Cache(config.cache, repair=True)
    missing = [e for e in wanted if e.key not in cache]
    log.info("%s: %d of %d contexts are there", config.cache, len(wanted) - len(missing),
             len(wanted))
    if missing:
        writer = CacheWriter(config.cache)
        pipe = load_pipeline(config.model, dtype=config.dtype, parts=("text_encoder",))
        vl = load_vision_language(config.vlm, pipe, dtype=config.dtype)
        try:
            encode_all(missing, Encoders(config, pipe, vl, data), writer.add)
        finally:
            writer.flush()  # what is done is done
    distributed.barrier("encoded")
    return len(missing), len(wanted)


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
    distributed.define_flags()


def main() -> None:
    if FLAGS.config is None:
        raise ValueError("--config is needed, such as --config configs/z_image_turbo_lora.py")
    distributed.initialize()
    workdir_lib.enable_compilation_cache()
    made, total = encode(FLAGS.config)
    print(f"{made} contexts made, {total - made} were there: {FLAGS.config.cache}")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)

"""Command: image-text rows -> contexts and latents on disk, so that training loads no encoder.

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
from dopsd_jax.config_check import check_config, needs_targets, needs_teacher
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
TARGET_KEYS = ("vae_dtype",)
FORMAT = 1  # raised when the encoders' code changes what they compute
LISTED = 10


@dataclass(frozen=True)
class Entry:
    """One array that the encoders make.

    Attributes:
        key: What it is kept under.
        role: "student" or "teacher", a context, or "target", latents.
        caption: Of a context.
        row: Of the image, for teacher and target.
        where: How a message names it.
    """

    key: str
    role: str
    where: str
    caption: str = ""
    row: int = -1


class Entries:
    """What the encoders make for a run, each named by all that it follows from."""

    def __init__(self, config: ConfigDict, data: Data):
        self._config, self._data, self._prompts = config, data, {
            key: tuple(config[key]) for key in ("sample_prompts", "gauge_prompts")
        }
        model = pipeline_directory(config.model)
        text = fingerprint(model, ("text_encoder", "tokenizer"))
        self._student = {
            "role": "student", "format": FORMAT, "weights": text,
            "settings": {k: config[k] for k in STUDENT_KEYS},
        }
        if needs_teacher(config):
            self._teacher = {
                "role": "teacher", "format": FORMAT,
                "weights": [text, fingerprint(vlm_directory(config.vlm))],
                "settings": {k: config[k] for k in TEACHER_KEYS},
            }
        self._target = {
            "role": "target", "format": FORMAT, "weights": fingerprint(model, ("vae",)),
            "settings": {k: config[k] for k in TARGET_KEYS},
        }

    def student(self, caption: str, where: str = "") -> Entry:
        key = entry_key(caption=caption, **self._student)
        return Entry(key, "student", where, caption)

    def teacher(self, row: int, caption: str, where: str = "") -> Entry:
        key = entry_key(caption=caption, **self._image(row), **self._teacher)
        return Entry(key, "teacher", where, caption, row)

    def target(self, row: int, where: str = "") -> Entry:
        return Entry(entry_key(**self._image(row), **self._target), "target", where, row=row)

    def _image(self, row: int) -> dict:
        bucket = self._data.bucket_of[row]
        return {"image": self._data.image_digests[row], "bucket": [bucket.width, bucket.height]}

    def all(self) -> list[Entry]:
        """Those of every distinct caption, (image, caption), image and sample prompt."""
        found: dict[str, Entry] = {}
        for i, row in enumerate(self._data.rows):
            made = [self.target(i, row.where)] if needs_targets(self._config) else []
            for name, caption in row.captions.items():
                where = f"{row.where}, caption {name!r}"
                made.append(self.student(caption, where))
                if needs_teacher(self._config):
                    made.append(self.teacher(i, caption, where))
            for entry in made:
                found.setdefault(entry.key, entry)
        for key, prompts in self._prompts.items():
            for prompt in prompts:
                entry = self.student(prompt, f"{key}: {prompt!r}")
                found.setdefault(entry.key, entry)
        return list(found.values())


class Encoders:
    """The frozen networks: an Entry -> its context without padding, [tokens, D], or latents."""

    def __init__(self, config: ConfigDict, pipe: Pipeline, vl: VisionLanguage | None, data: Data):
        self._config, self._pipe, self._vl, self._data = config, pipe, vl, data

    def __call__(self, entry: Entry) -> np.ndarray:
        """Raises ValueError for a caption or image that does not fit, with its name."""
        c = self._config
        try:
            if entry.role == "target":
                return contexts.image_latents(self._pipe, self._data.pixels(entry.row)[None])[0]
            if entry.role == "student":
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


def load_encoders(config: ConfigDict, pipe: Pipeline, data: Data) -> Encoders:
    """The encoders of a run, around a pipeline that has its text encoder (and VAE) loaded."""
    vl = None
    if needs_teacher(config):
        vl = load_vision_language(config.vlm, pipe, dtype=config.dtype)
        log.info("vision tower loaded; %d of %d language tensors replaced", vl.matched, vl.matched)
    return Encoders(config, pipe, vl, data)


def encode_all(
    entries: Sequence[Entry], encoders: Encoders, put: Callable[[str, np.ndarray], None]
) -> None:
    """Runs the encoders over every entry, telling how far it is."""
    began, shown = time.time(), 0.0
    for done, entry in enumerate(entries, 1):
        put(entry.key, encoders(entry))
        if done == len(entries) or time.time() - shown > 10:
            shown = time.time()
            log.info("encoded: %d of %d, %.0f s", done, len(entries), shown - began)


class Contexts:
    """Contexts of a run, out of host memory or a cache."""

    def __init__(self, config: ConfigDict, data: Data, entries: Entries,
                 features: Mapping[str, np.ndarray]):
        self._config, self._data, self._entries, self._features = config, data, entries, features

    def batch(self, batch: BatchRows) -> tuple[Context, Context | None, np.ndarray | None]:
        """Of a batch's rows, as NumPy: contexts of student and teacher, and target latents.

        None for what the objective does not need.
        """
        captions = [
            self._data.rows[r].captions[k]
            for r, k in zip(batch.rows, batch.caption_keys, strict=True)
        ]
        teacher = targets = None
        if needs_teacher(self._config):
            pairs = zip(batch.rows, captions, strict=True)
            teacher = self._padded((self._entries.teacher(r, c) for r, c in pairs),
                                   self._config.teacher_tokens)
        if needs_targets(self._config):
            targets = np.stack([self._features[self._entries.target(r).key] for r in batch.rows])
        return self.prompts(captions), teacher, targets

    def prompts(self, prompts: Sequence[str]) -> Context:
        """What the student sees of prompts that are captions or sample prompts, as NumPy."""
        return self._padded(map(self._entries.student, prompts), self._config.text_tokens)

    def _padded(self, entries: Iterable[Entry], length: int) -> Context:
        return contexts.padded([self._features[e.key] for e in entries], length)


def open_cache(directory: str, entries: Entries) -> Cache:
    """A cache that holds all that a run reads.

    Raises:
        CacheError: No cache, a damaged one, or one without some of it.
    """
    cache, wanted = Cache(directory), entries.all()
    missing = [e for e in wanted if e.key not in cache]
    if missing:
        lines = [f"{e.where}, {e.role}" for e in missing]
        more = [f".. and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        raise CacheError(
            f"{directory}: {len(missing)} of {len(wanted)} entries are not in this cache; run "
            "python -m dopsd_jax.encode with the same config:\n  "
            + "\n  ".join(lines[:LISTED] + more)
        )
    log.info("%s: all %d entries are there; no encoder is loaded", directory, len(wanted))
    return cache


def encode(config: ConfigDict) -> tuple[int, int]:
    """Adds to config.cache what it does not hold yet; loads nothing if that is nothing.

    Several processes share the work.

    Returns:
        How many entries this process made, and how many were its share.

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
    log.info("%s: %d of %d entries are there", config.cache, len(wanted) - len(missing),
             len(wanted))
    if missing:
        writer = CacheWriter(config.cache)
        pipe = load_pipeline(config.model, dtype=config.dtype, vae_dtype=config.vae_dtype,
                             parts=("text_encoder", *(["vae"] if needs_targets(config) else [])))
        try:
            encode_all(missing, load_encoders(config, pipe, data), writer.add)
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
    print(f"{made} entries made, {total - made} were there: {FLAGS.config.cache}")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)

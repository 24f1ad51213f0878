"""What the frozen encoders make of a run's rows: which arrays, by which networks, kept where.

An `Entry` names one array by all that it follows from. `Encoders` make it; a cache, host memory or
`Online` gives it; `BatchFeatures` puts the entries of a batch's rows together.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dopsd_jax.core.log import log
from dopsd_jax.data.batches import BatchRows
from dopsd_jax.data.cache import Cache, CacheError, entry_key
from dopsd_jax.data.datasets import Data
from dopsd_jax.data.keeping import all_prompts
from dopsd_jax.method import contexts
from dopsd_jax.method.contexts import RECIPES, TEACHER
from dopsd_jax.models.denoiser import Context
from dopsd_jax.models.quantization import AS_DTYPE
from dopsd_jax.run import keys, model
from dopsd_jax.run.config import (
    needs_targets,
    needs_teacher,
    needs_vlm,
    roles,
)
from dopsd_jax.weights.fingerprints import fingerprint
from dopsd_jax.weights.pipeline import (
    Pipeline,
    VisionLanguage,
    load_vision_language,
)
from dopsd_jax.weights.shipped import vlm_directory

FORMAT = 1  # raised when the encoders' code changes what they compute
LISTED = 10
ONLINE_BYTES = 1 << 30  # of host memory for what is encoded during a run


@dataclass(frozen=True)
class Entry:
    """One array that the encoders make.

    Attributes:
        key: Its name in a cache.
        role: "student" or "teacher", the text of a context, or "target" or "reference", latents.
        caption: Of a context, as the role sees it.
        row, image: Whose latents, or what the teacher's text shows; -1 is the row's target.
        where: Its name in messages.
    """

    key: str
    role: str
    where: str
    caption: str = ""
    row: int = -1
    image: int = -1


class Entries:
    """The arrays that the encoders make for a run, each named by all that it depends on."""

    def __init__(self, config: ConfigDict, data: Data):
        self._config, self._data, self._prompts = config, data, {
            key: tuple(config[key]) for key in ("sample_prompts", "gauge_prompts")
        } | {"keep_prompts": all_prompts(data.keep_prompts), "earlier_data": [
            caption for earlier in data.earlier
            for caption in earlier.captions(earlier.first_rows(config.sample_rows))
        ]}
        self._recipe = RECIPES[config.recipe]
        if config.sample_guidance:
            self._prompts["sample_negative"] = (config.sample_negative,)
        text = model.fingerprint(config, ("text_encoder", "tokenizer"))

        def settings(*affected: str) -> dict[str, Any]:
            """Besides caption, image, bucket and weights: what their encoders depend on."""
            found = {key: config[key] for key in keys.affecting(*affected)}
            if found.get("encoder_dtype") == AS_DTYPE:  # entries of before there was the key
                del found["encoder_dtype"]
            return found

        looks = needs_vlm(config)
        self._student = {
            "role": "student", "format": FORMAT, "weights": text,
            "settings": settings(keys.STUDENT),
        }
        self._teacher = {
            "role": "teacher", "format": FORMAT, "weights": [text],
            "settings": settings(keys.TEACHER, *([keys.VISION] if looks else [])),
        }
        if looks:
            self._teacher["weights"].append(fingerprint(vlm_directory(config.vlm)))
        self._latents = {
            "role": "target", "format": FORMAT, "weights": model.fingerprint(config, ("vae",)),
            "settings": settings(keys.LATENTS),
        }

    def student(self, caption: str, where: str = "") -> Entry:
        key = entry_key(caption=caption, **self._student)
        return Entry(key, "student", where, caption)

    def teacher(self, row: int, caption: str, where: str = "") -> Entry:
        """What the teacher reads for a caption of a row; with a VLM it shows the target."""
        prompt = self._recipe.teacher_prompt(
            caption, self._data.rows[row].enhanced, self._config.teacher_words
        )
        image = self._image(row, -1) if self._recipe.vlm else {}
        return Entry(
            entry_key(caption=prompt, **image, **self._teacher), "teacher", where, prompt, row
        )

    def target(self, row: int, where: str = "") -> Entry:
        return self._of_image(row, -1, where)

    def references(self, row: int, role: str) -> list[Entry]:
        """The latents of the reference images that a role sees of a row, in order."""
        images = self._data.rows[row].images
        shown = self._recipe.shown(role, len(images) - 1)
        # The target's latents are the same, whatever they serve for.
        return [self._of_image(row, -1 if i == len(images) - 1 else i, self._data.rows[row].where)
                for i in shown]

    def _of_image(self, row: int, image: int, where: str) -> Entry:
        key = entry_key(**self._image(row, image), **self._latents)
        return Entry(key, "target" if image == -1 else "reference", where, row=row, image=image)

    def _image(self, row: int, image: int) -> dict:
        bucket = self._data.bucket(row)
        return {"image": self._data.image_digest(row, image),
                "bucket": [bucket.width, bucket.height]}

    def all(self) -> list[Entry]:
        """The entries of every distinct caption, (image, caption), image and sample prompt."""
        found: dict[str, Entry] = {}
        for i, row in enumerate(self._data.rows):
            made = [self.target(i, row.where)] if needs_targets(self._config) else []
            for role in roles(self._config):
                made += self.references(i, role)
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
            if entry.role in ("target", "reference"):
                pixels = self._data.pixels(entry.row, entry.image)
                return contexts.image_latents(self._pipe, pixels[None])[0]
            if entry.role == "student" or self._vl is None:
                ctx = contexts.text_context(
                    self._pipe, [entry.caption], truncate=c.truncate_prompts,
                    length=c.text_tokens if entry.role == "student" else c.teacher_tokens,
                    allow_empty=not entry.caption,  # of sample_negative; others were checked
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
    if needs_vlm(config):
        vl = load_vision_language(
            config.vlm, pipe, dtype=config.dtype, encoder_dtype=config.encoder_dtype,
            cache_quantised=config.cache_quantised,
        )
        log.info("vision tower loaded; %d of %d language tensors replaced", vl.matched, vl.matched)
    return Encoders(config, pipe, vl, data)


def encode_all(
    entries: Sequence[Entry], encoders: Encoders, put: Callable[[str, np.ndarray], None]
) -> None:
    """Runs the encoders over every entry, and logs the progress."""
    began, shown = time.time(), 0.0
    for done, entry in enumerate(entries, 1):
        put(entry.key, encoders(entry))
        if done == len(entries) or time.time() - shown > 10:
            shown = time.time()
            log.info("encoded: %d of %d, %.0f s", done, len(entries), shown - began)


Features = Callable[[Entry], np.ndarray]


def cached(arrays: Mapping[str, np.ndarray]) -> Features:
    """Features that were made before, from host memory or a cache."""
    return lambda entry: arrays[entry.key]


class Online:
    """Makes an entry when it is asked for; keeps the latest in host memory."""

    def __init__(self, encoders: Encoders, kept_bytes: int = ONLINE_BYTES):
        self._encoders, self._kept_bytes, self._bytes = encoders, kept_bytes, 0
        self._made: dict[str, np.ndarray] = {}

    def __call__(self, entry: Entry) -> np.ndarray:
        """Raises ValueError for a caption or image that does not fit, with its name."""
        array = self._made.pop(entry.key, None)
        if array is None:
            array = self._encoders(entry)
            self._bytes += array.nbytes
        self._made[entry.key] = array  # the latest comes last
        while self._bytes > self._kept_bytes and len(self._made) > 1:
            self._bytes -= self._made.pop(next(iter(self._made))).nbytes
        return array


class BatchFeatures:
    """What student and teacher see of a run's rows."""

    def __init__(self, config: ConfigDict, data: Data, entries: Entries, features: Features):
        self._config, self._data, self._entries, self._features = config, data, entries, features

    def batch(self, batch: BatchRows) -> tuple[Context, Context | None, np.ndarray | None]:
        """Contexts of student and teacher and target latents of a batch's rows, as NumPy.

        None for what the objective does not need. Of a row that keeps, the student sees the prompt,
        and what the teacher would see is that of the row of data beside it.
        """
        rows = [self._data.rows[r] for r in batch.rows]
        captions = [row.captions[k] for row, k in zip(rows, batch.caption_keys, strict=True)]
        of_rows = list(zip(batch.rows, captions, [row.where for row in rows], strict=True))
        prompts = [(kept or caption, where) for kept, (_, caption, where) in zip(
            batch.kept or [""] * len(rows), of_rows, strict=True
        )]
        student = self._padded(itertools.starmap(self._entries.student, prompts),
                               self._config.text_tokens)
        student = self._with_references(student, batch, contexts.STUDENT)
        teacher = targets = None
        if needs_teacher(self._config):
            teacher = self._padded((self._entries.teacher(*entry) for entry in of_rows),
                                   self._config.teacher_tokens)
            teacher = self._with_references(teacher, batch, TEACHER)
        if needs_targets(self._config):
            targets = np.stack([
                self._features(self._entries.target(r, where)) for r, _, where in of_rows
            ])
        return student, teacher, targets

    def _with_references(self, ctx: Context, batch: BatchRows, role: str) -> Context:
        """All rows of a bucket have as many references, of one size."""
        shown = zip(*(self._entries.references(r, role) for r in batch.rows), strict=True)
        latents = [np.stack([self._features(e) for e in entries]) for entries in shown]
        if not latents:
            return ctx
        return jax.tree.map(np.asarray, contexts.with_latents(ctx, latents))

    def prompts(self, prompts: Sequence[str]) -> Context:
        """What the student sees of captions or sample prompts alone, as NumPy."""
        return self._padded(map(self._entries.student, prompts), self._config.text_tokens)

    def _padded(self, entries: Iterable[Entry], length: int) -> Context:
        return contexts.padded([self._features(e) for e in entries], length)


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

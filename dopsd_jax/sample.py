"""Command and function: prompts (+ LoRA) -> images.

    python -m dopsd_jax.sample --model DIR --prompt "a red fox" --num_steps 8 --seed 0 --out DIR
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from dopsd_jax.core import cli
from dopsd_jax.core.checks import is_whole, noted
from dopsd_jax.core.log import log
from dopsd_jax.data.images import read_image, reference_image
from dopsd_jax.data.prompts import encode_prompts, prompt_problems
from dopsd_jax.method import flow, sampling
from dopsd_jax.method.contexts import text_context, with_references
from dopsd_jax.method.guidance import advise, check_guidance, scale_of, with_guidance
from dopsd_jax.models.denoiser import Context
from dopsd_jax.run import loras, model
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.pipeline import DTYPES, Pipeline

MAX_SEED = 2**31
References = Sequence[Sequence[Image.Image | np.ndarray]]
Encoded = tuple[Context, Context | None]  # of prompts, and of what guidance leads away from
ENCODERS, DRAWING = ("text_encoder",), ("transformer", "vae")  # parts, one after the other


def check_request(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    num_steps: int,
    height: int,
    width: int,
    seed: int = 0,
    guidance: float = 0.0,
    negative: str = "",
    num_references: Sequence[int] = (),
) -> None:
    """Refuses what `generate` cannot draw; needs no weights (`load_pipeline(.., parts=())`).

    Args:
        pipe, prompts, num_steps, height, width, seed, guidance, negative: As for `generate`.
        num_references: References of each prompt; () is none.

    Raises:
        ValueError: Everything that is wrong, together.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not len(prompts):
        raise ValueError(f"prompts: expected a non-empty list of strings, got {prompts!r}")
    lengths = _text_lengths(pipe)
    problems = []
    for name, texts in (("", prompts), ("negative: ", [negative] if negative else [])):
        problems += [name + problem for problem in prompt_problems(
            pipe.tokenizer, texts, lengths[-1], enable_thinking=pipe.text.enable_thinking
        )]
    with noted(problems):
        check_guidance(pipe, guidance, negative)
    sides = {"height": height, "width": width}
    wrong = [f"{name}: expected a whole number of pixels, got {side!r}"
             for name, side in sides.items() if not is_whole(side)]
    with noted(problems):
        if wrong:
            raise ValueError("; ".join(wrong))
        h, w, _ = pipe.denoiser.latent_shape(height, width)
        pipe.denoiser.network.check_sizes(h, w, lengths[0])  # of the text all fit, or none
    with noted(problems):
        flow.sigmas_shifted(num_steps, pipe.shift or 1.0)
    if not is_whole(seed) or not 0 <= seed <= MAX_SEED:
        problems.append(f"seed: expected a whole number in [0, 2^31], got {seed!r:.40}")
    most = pipe.denoiser.max_references
    if num_references and len(num_references) != len(prompts):
        problems.append(
            f"references: expected one list for each of {len(prompts)} prompts, got "
            f"{len(num_references)} lists"
        )
    if max(num_references, default=0) > most:
        problems.append(
            f"references: this model takes {f'at most {most}' if most else 'none'}, got "
            f"{max(num_references)}"
        )
    if problems:
        raise ValueError("\n  ".join(problems))


def _check_noise(noise: Any, shape: tuple[int, ...]) -> jax.Array:
    """The given noise as float32 [B, h, w, C].

    Raises:
        ValueError: Other shapes, or what are no finite numbers.
    """
    try:
        noise = np.asarray(noise, np.float32)
    except (TypeError, ValueError) as e:
        raise ValueError(f"noise: expected an array of numbers, got {noise!r:.60}") from e
    if noise.shape != shape:
        want, got = (" ".join(map(str, s)) for s in (shape, noise.shape))
        raise ValueError(f"noise: expected [{want}], got [{got}]")
    if not np.isfinite(noise).all():
        raise ValueError("noise: holds NaN or infinity")
    return jnp.asarray(noise)


def read_references(pipe: Pipeline, references: References) -> list[list[np.ndarray]]:
    """References as the model looks at them, float32 [H, W, 3] in [-1, 1].

    Raises:
        ValueError: No list of images per prompt; every image that is none, too small or too long,
            together.
    """
    lists = (references, *references) if isinstance(references, list | tuple) else (references,)
    for rows in lists:
        if not isinstance(rows, list | tuple):
            raise ValueError(
                "references: expected a list of images for each prompt, as in [[image, ..], ..], "
                f"got {type(rows).__name__} in a list's place"
            )
    problems: list[str] = []
    read = []
    for i, images in enumerate(references):
        read.append([])
        for j, image in enumerate(images):
            with noted(problems, f"prompt {i}, reference {j}"):
                read[i].append(reference_image(image, pipe.denoiser.pixel_multiple))
    if problems:
        raise ValueError("\n  ".join(problems))
    return read


def picture_size(
    pipe: Pipeline, height: int | None, width: int | None, references: list[list[np.ndarray]]
) -> tuple[int, int]:
    """Height and width to draw: as asked for, else of the first reference, else the model's own.

    Raises:
        ValueError: A missing side, and first references of different sizes.
    """
    if height is not None and width is not None:
        return height, width
    first = {images[0].shape[:2] if images else (pipe.sample_size,) * 2 for images in references}
    if len(first) > 1:
        raise ValueError(
            "height, width: the prompts' first references differ in size "
            f"({', '.join(f'{h}x{w}' for h, w in sorted(first))}, height x width); say which to "
            "draw"
        )
    own = first.pop() if first else (pipe.sample_size,) * 2
    return own[0] if height is None else height, own[1] if width is None else width


def generate(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    num_steps: int = 8,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    noise: np.ndarray | None = None,
    lora: str | Path | tuple[Any, float] | list | None = None,
    references: References | None = None,
    guidance: float = 0.0,
    negative: str = "",
    encoded: Encoded | None = None,
) -> np.ndarray:
    """Draws one picture per prompt.

    Args:
        pipe: From `weights.load_pipeline`.
        prompts: B prompts.
        num_steps: Number of denoiser calls. (diffusers before 0.39 counted one more: its 9 is
            8 here.)
        height, width: Pixels, multiples of 16; None is the size of the first reference or, without
            one, the model's own, 1024 for Z-Image-Turbo and FLUX.2-klein.
        seed: Picture i starts from seed + i; 0 to 2^31.
        noise: float32 [B, h, w, C] standard normal in the normalised latent space, shaped as
            `pipe.denoiser.latent_shape` says; takes the place of the seed.
        lora: A LoRA file, a PEFT directory, a run's workdir, (path, strength), (tree, alpha /
            rank), or a list of such, which add up without being merged.
        references: For each prompt its reference images, PIL or uint8 [H, W, 3], each as large as
            it is up to an area of 1024 x 1024; for models that edit.
        guidance: Scale of classifier-free guidance, as guidance_scale of the model's pipeline in
            diffusers, for models that are not step-distilled; 0 is none. It doubles the time.
        negative: What guidance leads away from, in all pictures.
        encoded: What `encode` made of the prompts, where the text encoder is no longer in memory.

    Returns:
        uint8 [B, H, W, 3].

    Raises:
        ValueError: Empty prompts, sizes or noise that do not fit, a LoRA of another model, or
            pictures that are not finite.
    """
    images = read_references(pipe, [] if references is None else references)
    height, width = picture_size(pipe, height, width, images)
    check_request(pipe, prompts, num_steps=num_steps, height=height, width=width, seed=seed,
                  guidance=guidance, negative=negative,
                  num_references=[len(row) for row in images])
    advise(pipe, guidance)
    shape = pipe.denoiser.latent_shape(height, width)
    if noise is None:
        noise = sampling.draw_noise([seed + i for i in range(len(prompts))], shape)
    else:
        noise = _check_noise(noise, (len(prompts), *shape))
    variables = {"params": pipe.params}
    if lora is not None:
        variables["lora"] = jax.tree.map(jnp.asarray, loras.take_loras(lora, pipe))
    ctx, away = encoded or encode(pipe, prompts, guidance=guidance, negative=negative)
    sigmas = flow.sigmas_shifted(num_steps, pipe.shift_at(num_steps, height, width))
    pixels = np.empty((len(prompts), height, width, 3), np.uint8)
    for rows, part in _alike(pipe, ctx, images):
        if away is not None:
            part = with_guidance(part, away, scale_of(pipe, guidance))
        latents = sampling.sample(pipe.denoiser, variables, noise[rows], part, sigmas)
        pixels[rows] = sampling.decode(pipe, latents)
    return pixels


def encode(
    pipe: Pipeline, prompts: Sequence[str], *, guidance: float = 0.0, negative: str = ""
) -> Encoded:
    """What the denoiser sees of B prompts, for `generate`.

    It needs the text encoder alone, which can be given up before the transformer is loaded:
    `load_pipeline(.., parts=ENCODERS)`, and then `load_pipeline(.., parts=DRAWING)`.

    Returns:
        The contexts of B rows, and of guidance the one that it leads away from, else None.
    """
    length = _padded_length(pipe, [*prompts, negative])
    ctx = text_context(pipe, prompts, length=length)
    if not guidance:
        return ctx, None
    return ctx, text_context(pipe, [negative], length=length, allow_empty=True)


def _alike(
    pipe: Pipeline, ctx: Context, images: list[list[np.ndarray]]
) -> Iterator[tuple[np.ndarray, Context]]:
    """Rows whose references are alike in number and size, and their context, group by group."""
    groups: dict[tuple, list[int]] = {}
    for i in range(len(ctx.text)):
        key = tuple(image.shape for image in images[i]) if images else ()
        groups.setdefault(key, []).append(i)
    for key, members in groups.items():
        rows = np.array(members)
        part = Context(ctx.text[rows], ctx.text_mask[rows])
        stacked = [np.stack([images[i][r] for i in members]) for r in range(len(key))]
        yield rows, with_references(pipe, part, stacked) if stacked else part


def _text_lengths(pipe: Pipeline) -> tuple[int, ...]:
    """Of the model's padded text lengths those that this checkpoint has positions for.

    Where it has them for none, all are given: `check_sizes` then says what is missing.
    """
    h, w, _ = pipe.denoiser.latent_shape(*[pipe.denoiser.pixel_multiple] * 2)
    fitting = []
    for length in pipe.text.lengths:
        with contextlib.suppress(ValueError):
            pipe.denoiser.network.check_sizes(h, w, length)
            fitting.append(length)
    return tuple(fitting) or pipe.text.lengths


def _padded_length(pipe: Pipeline, prompts: Sequence[str]) -> int:
    """The first of the lengths that holds every prompt."""
    lengths = _text_lengths(pipe)
    _, mask = encode_prompts(
        pipe.tokenizer, prompts, lengths[-1], enable_thinking=pipe.text.enable_thinking,
        allow_empty=True,
    )
    longest = int(mask.sum(1).max())
    return next(length for length in lengths if length >= longest)


FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    flags.DEFINE_string("model", None, "Pipeline directory, name on the hub, or mini.",
                        required=True)
    model.define_flags()
    flags.DEFINE_multi_string("lora", None, "Workdir of a run, LoRA file, or PEFT directory, with "
                              ":STRENGTH behind it if not 1; several add up.")
    flags.DEFINE_multi_string("prompt", None, "Prompt; may be given several times.", required=True)
    flags.DEFINE_integer("num_steps", 8, "Number of denoiser calls.")
    flags.DEFINE_multi_string("reference", None, "Reference image of every prompt, for models "
                              "that edit; may be given several times.")
    default = "Pixels, a multiple of 16; default: the first reference's, or the model's own."
    flags.DEFINE_integer("height", None, default)
    flags.DEFINE_integer("width", None, default)
    flags.DEFINE_integer("seed", 0, "Picture i starts from seed + i.",
                         lower_bound=0, upper_bound=MAX_SEED)
    flags.DEFINE_float("guidance", 0.0, "Scale of classifier-free guidance, as guidance_scale in "
                       "diffusers, for models that are not step-distilled; 0: none.")
    flags.DEFINE_string("negative", "", "What guidance leads away from.")
    flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "Dtype of transformer and text encoder.")
    model.define_dtype_flags()
    flags.DEFINE_string("out", "samples", "Directory for the pictures.")


def main() -> None:
    out = Path(FLAGS.out)
    cli.check_directory(out)
    workdir_lib.enable_compilation_cache()
    # Whatever can be wrong is found before gigabytes of weights are read.
    chosen = {name: FLAGS[name].value for name in ("model", *model.FILES)}
    pipe = model.load_model(chosen, dtype=FLAGS.dtype, parts=())
    references = [[read_image(path) for path in FLAGS.reference or ()]] * len(FLAGS.prompt)
    images = read_references(pipe, references)
    sides = picture_size(pipe, FLAGS.height, FLAGS.width, images)
    how = dict(zip(("height", "width"), sides, strict=True), num_steps=FLAGS.num_steps,
               guidance=FLAGS.guidance, negative=FLAGS.negative)
    check_request(pipe, FLAGS.prompt, **how, num_references=[len(row) for row in images])
    lora = [loras.parse(text) for text in FLAGS.lora or ()] or None
    if lora:
        loras.take_loras(lora, pipe)
        told = loras.base_dtypes([n.path for n in lora])
        for name, kind in told.items():
            if kind != FLAGS.base_dtype:
                log.info("%s: was trained on weights in %s, drawn on --base_dtype %s", name, kind,
                         FLAGS.base_dtype)
    # The text encoder is as large as the transformer or larger: one after the other.
    kept = {"dtype": FLAGS.dtype, "cache_quantised": FLAGS.cache_quantised,
            **model.dtypes_given(FLAGS)}
    pipe = model.load_model(chosen, parts=ENCODERS, **kept)
    encoded = jax.device_get(encode(pipe, FLAGS.prompt, guidance=how["guidance"],
                                    negative=how["negative"]))
    del pipe
    pipe = model.load_model(chosen, parts=DRAWING, **kept)
    pixels = generate(pipe, FLAGS.prompt, **how, seed=FLAGS.seed, lora=lora, references=references,
                      encoded=encoded)
    out.mkdir(parents=True, exist_ok=True)
    for i, (prompt, image) in enumerate(zip(FLAGS.prompt, pixels, strict=True)):
        words = re.sub(r"\W+", "-", prompt).strip("-")[:60]
        path = out / f"{FLAGS.seed + i:04d}-{words}.png"
        Image.fromarray(image).save(path)
        made = {"prompt": prompt, "seed": FLAGS.seed + i, "num_steps": FLAGS.num_steps,
                **{name: value for name, value in chosen.items() if value},
                "lora": FLAGS.lora or [], "dtype": FLAGS.dtype, **model.dtypes_given(FLAGS),
                "guidance": FLAGS.guidance, "negative": FLAGS.negative,
                "references": FLAGS.reference or []}
        path.with_suffix(".json").write_text(json.dumps(made, indent=2, ensure_ascii=False))
        print(path)


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)

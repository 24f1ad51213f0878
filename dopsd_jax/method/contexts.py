"""What student and teacher may see: the recipes, and the small builders they are made of.

The student always sees the prompt through the text encoder. The teacher sees more:

    vlm          the target through Qwen3-VL, whose language weights are that same text encoder
    edit         the target as a reference image
    edit_ref     what the student sees, the references of the row, and the target as the last one
    text         a longer text about the target instead of the prompt
    subject_ref  other pictures of what the target shows, as reference images
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dopsd_jax.core import sharding
from dopsd_jax.data import prompts as prompts_lib
from dopsd_jax.data.drafts import Needs
from dopsd_jax.models.denoiser import Context, reference_tokens
from dopsd_jax.models.family import TextRules
from dopsd_jax.models.qwen3 import Qwen3
from dopsd_jax.models.qwen3_vl import VisionTower, multimodal_features
from dopsd_jax.models.vae import Vae
from dopsd_jax.weights.pipeline import Pipeline, VisionLanguage

STUDENT, TEACHER = "student", "teacher"
ONE_PAIR = Needs()
PUBLISHED = "published"  # of teacher_words: the recipe's own


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the roles see beside the prompt. References are images a network takes as tokens.

    Attributes:
        needs: What is read of every row.
        references: Roles that see the row's references.
        target: Whether the teacher sees the target, as the last reference.
        vlm: Whether the teacher sees the target through Qwen3-VL, in the text.
        words: Added to the teacher's prompt.
    """

    needs: Needs = ONE_PAIR
    references: tuple[str, ...] = ()
    target: bool = False
    vlm: bool = False
    words: str = ""

    def shown(self, role: str, num_references: int) -> tuple[int, ...]:
        """Which of a row's images (the references, then the target) a role sees as references."""
        images = tuple(range(num_references)) if role in self.references else ()
        return (*images, num_references) if self.target and role == TEACHER else images

    def teacher_prompt(self, caption: str, enhanced: str | None, words: str) -> str:
        """The teacher's text: the longer one where there is one, and the words after it."""
        words = self.words if words == PUBLISHED else words
        return f"{caption if enhanced is None else enhanced} {words}".strip()


# Source of the words of edit and edit_ref: D-OPSD, flux2-klein_self-distill-edit and
# flux2-klein-edit-self-distill-gt-ref.
RECIPES: dict[str, Recipe] = {
    "vlm": Recipe(vlm=True),
    "edit": Recipe(
        target=True,
        words="Make the main subject (facial/ip details), background, and overall composition "
        "consistent with the reference image.",
    ),
    "edit_ref": Recipe(
        Needs(images=(2, None)), (STUDENT, TEACHER), target=True,
        words="Note that the last image is the output image I expect to be. Your output must be "
        "as similar as the last reference image, based on the first reference image and the "
        "editing instructions.",
    ),
    "text": Recipe(Needs(images=(0, 1), enhanced=True)),
    "subject_ref": Recipe(
        Needs(subject=True), (TEACHER,),
        words="Make the main subject (facial/ip details) consistent with the reference images.",
    ),
}


def check_recipe(name: str, pipe: Pipeline, roles: Sequence[str] = (STUDENT, TEACHER)) -> None:
    """Raises ValueError if a model cannot be shown what the roles see; needs no weights."""
    def refusal(recipe: Recipe) -> str:
        if pipe.denoiser.max_references == 0 and any(recipe.shown(role, 1) for role in roles):
            return "shows reference images, which this model does not take"
        if recipe.vlm and TEACHER in roles and (pipe.text.attends_pads or len(pipe.text.taps) > 1):
            return (
                "shows the target through Qwen3-VL as one feature per token, padding masked; this "
                f"model reads {len(pipe.text.taps)} features per token, padding too"
            )
        return ""

    if why := refusal(RECIPES[name]):
        others = [other for other, recipe in RECIPES.items() if not refusal(recipe)]
        raise ValueError(f"{name} {why}; choose one of {', '.join(others)}")


def check_length(text: TextRules, length: int) -> None:
    """Raises ValueError for a padded length that would change the picture."""
    if text.attends_pads and length not in text.lengths:
        raise ValueError(
            f"text length: this model attends to padding and was made for {text.lengths[-1]} "
            f"tokens, got {length}"
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _text_features(encoder: Qwen3, text: TextRules, mesh: Mesh | None, params, ids, mask):
    with sharding.use_mesh(mesh):
        features = encoder.apply({"params": params}, ids, mask, text.taps)
    return features if text.attends_pads else jnp.where(mask[..., None], features, 0)


@functools.partial(jax.jit, static_argnums=0)
def _latents(vae: Vae, params, image):
    return vae.apply({"params": params}, image, method="encode_mode")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _image_features(encoder: Qwen3, vision: VisionTower, static, params, vision_params, *arrays):
    ids, mask, patches = arrays
    grid, image_token_id, mrope_section, rope_theta, mesh = static
    with sharding.use_mesh(mesh):
        features = multimodal_features(
            encoder, {"params": params}, vision, {"params": vision_params}, ids=ids, mask=mask,
            patches=patches, grid=grid, image_token_id=image_token_id,
            mrope_section=mrope_section, rope_theta=rope_theta, tap=encoder.depth,
        )
    return jnp.where(mask[..., None], features, 0)


def text_context(
    pipe: Pipeline, prompts: Sequence[str], *, length: int, truncate: bool = False,
    allow_empty: bool = False,
) -> Context:
    """What the student sees, and what sampling uses.

    Args:
        pipe: With text encoder.
        prompts: B prompts, not templated.
        length: Padded text length L; of `pipe.text.lengths`, or any multiple of 32 where the
            denoiser does not attend to pads.
        truncate: Cut longer prompts as published; otherwise they are an error.
        allow_empty: Take empty prompts too: what guidance leads away from.

    Returns:
        Context with text [B, L, D].

    Raises:
        ValueError: Prompts that do not fit, or a length that would change the picture.
    """
    text = pipe.text
    check_length(text, length)
    ids, mask = prompts_lib.encode_prompts(
        pipe.tokenizer, prompts, length, enable_thinking=text.enable_thinking, truncate=truncate,
        allow_empty=allow_empty,
    )
    features = _text_features(
        pipe.text_encoder, text, pipe.encoder_mesh, pipe.text_params, ids, mask
    )
    return Context(features, np.ones_like(mask) if text.attends_pads else mask)


def image_latents(pipe: Pipeline, images: np.ndarray) -> np.ndarray:
    """Normalised latents of images, float32 [B, H, W, 3] in [-1, 1] -> float32 [B, h, w, C]."""
    # One image at a time: the encoder's activations are far larger than its input.
    return np.concatenate([_latents(pipe.vae, pipe.vae_params, row[None]) for row in images])


def with_references(pipe: Pipeline, ctx: Context, images: Sequence[np.ndarray]) -> Context:
    """Adds reference images to what a context shows.

    Args:
        pipe: With VAE, of a family that looks at references.
        ctx: Context of B rows without references.
        images: One after the other, float32 [B, H, W, 3] in [-1, 1], see
            `data.images.reference_image`. Sizes may differ, and "one after the other" is seen:
            the network knows the first from the second.

    Returns:
        `ctx` with ref_tokens [B, M, C] and ref_ids [B, M, 4].

    Raises:
        ValueError: More references than the family takes.
    """
    most = pipe.denoiser.max_references
    if len(images) > most:
        raise ValueError(f"references: this model takes at most {most}, got {len(images)}")
    return with_latents(ctx, [image_latents(pipe, image) for image in images])


def with_latents(ctx: Context, latents: Sequence[np.ndarray]) -> Context:
    """`with_references` of images that are encoded already: float32 [B, h, w, C] each."""
    tokens, ids = reference_tokens(latents)
    return ctx.replace(ref_tokens=tokens, ref_ids=ids)


def vlm_ids(
    tokenizer, vl_tokenizer, prompts: Sequence[str], num_image_tokens: int, *, length: int,
    double_template: bool = False, truncate: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask [B, L] of `vlm_context`; needs the two tokenizers alone."""
    if double_template:
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True,
                enable_thinking=True,
            )
            for p in prompts
        ]
    return prompts_lib.encode_image_prompts(
        vl_tokenizer, prompts, num_image_tokens, length, truncate=truncate
    )


def vlm_context(
    pipe: Pipeline,
    vl: VisionLanguage,
    prompts: Sequence[str],
    images: np.ndarray,
    *,
    length: int,
    rope_theta: float = 0.0,
    min_pixels: int = 512 * 512,
    max_pixels: int = 768 * 768,
    double_template: bool = False,
    truncate: bool = False,
) -> Context:
    """What the teacher sees in the recipe vlm: prompt and target image.

    Args:
        pipe: With text encoder.
        vl: The vision tower, from `load_vision_language`.
        prompts: B prompts, not templated.
        images: float32 [B, H, W, 3] in [-1, 1], the target images.
        length: Padded length L, image tokens included, a multiple of 32.
        rope_theta: Rotary base of the language model; 0 is Qwen3-VL's own, as published (5e6
            over weights trained with 1e6).
        min_pixels, max_pixels: Area at which the vision tower looks, see `smart_resize`.
        double_template: Put the already templated prompt into the user turn.
            Differs from reference: there a list changed in place makes this the only behaviour.
        truncate: As in `text_context`.

    Returns:
        Context with text [B, L, D].
    """
    v = vl.config.vision
    cut = [
        prompts_lib.image_patches(
            image, v.patch_size, v.spatial_merge_size, v.temporal_patch_size, min_pixels,
            max_pixels,
        )
        for image in images
    ]
    grid = cut[0][1]
    ids, mask = vlm_ids(
        pipe.tokenizer, vl.tokenizer, prompts, grid[0] * grid[1] // v.spatial_merge_size**2,
        length=length, double_template=double_template, truncate=truncate,
    )
    static = (grid, vl.config.image_token_id, vl.config.mrope_section,
              rope_theta or vl.config.rope_theta, pipe.encoder_mesh)
    features = _image_features(
        pipe.text_encoder, vl.vision, static, pipe.text_params, vl.params, ids, mask,
        np.stack([patches for patches, _ in cut]),
    )
    return Context(features, mask)


def without_padding(ctx: Context) -> np.ndarray:
    """The text features of row 0 without padding, on the host, [tokens, D]."""
    tokens = int(np.sum(ctx.text_mask[0]))
    return np.asarray(ctx.text[0, :tokens])


def padded(rows: Sequence[np.ndarray], length: int) -> Context:
    """B rows from `without_padding` -> Context [B, L, D] with L = `length`, as NumPy."""
    text = np.zeros((len(rows), length, rows[0].shape[-1]), rows[0].dtype)
    for out, row in zip(text, rows, strict=True):
        out[: len(row)] = row
    lengths = np.array([len(row) for row in rows])
    return Context(text, np.arange(length) < lengths[:, None])

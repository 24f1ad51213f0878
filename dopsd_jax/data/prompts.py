"""Prompts and images -> what the encoders read: token ids, masks, patches."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# Read when transformers is imported; without it, "PyTorch was not found", which is not needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
from transformers import PreTrainedTokenizerFast

from dopsd_jax.core.files import lfs_advice
from dopsd_jax.data.files import MAX_ASPECT

IMAGE_TOKEN = "<|image_pad|>"
EMPTY = "is empty"


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint's folder, with its chat template.

    Raises:
        ValueError: No such folder, no tokenizer.json, files that are damaged or git-lfs pointers,
            no padding token, or no chat template or one that cannot be rendered.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: expected the folder of a tokenizer, found none")
    if not (directory / "tokenizer.json").is_file():
        found = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
        raise ValueError(f"{directory}: expected tokenizer.json, found {found}")
    for file in sorted(directory.glob("*.json")):
        if advice := lfs_advice(file):
            raise ValueError(f"{file}: {advice}")
    processor_template = directory / "chat_template.json"
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        if tokenizer.chat_template is None and processor_template.is_file():
            tokenizer.chat_template = json.loads(processor_template.read_text())["chat_template"]
    except Exception as e:  # the tokenizers library raises no narrower class
        raise ValueError(
            f"{directory}: tokenizer.json, tokenizer_config.json or another file of the tokenizer "
            f"is damaged ({type(e).__name__}: {e!s:.200}); download it again"
        ) from e
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{directory}: the tokenizer has no chat template; expected chat_template.jinja, "
            "chat_template.json or a chat_template in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{directory}: the tokenizer names no pad_token")
    _check_template(directory, tokenizer)
    return tokenizer


def _check_template(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ValueError unless the chat template renders, with the prompt in it."""
    where = f"{directory}: the tokenizer's chat template"
    try:
        text = _render(tokenizer, "a red fox")
    except Exception as e:  # a template is a program of its own, which may fail in any way
        raise ValueError(
            f"{where} cannot be rendered ({type(e).__name__}: {e!s:.200}); download it again"
        ) from e
    if "a red fox" not in text:
        raise ValueError(f"{where} leaves the prompt out, it makes {text!r:.200}")


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    length: int,
    *,
    enable_thinking: bool,
    truncate: bool = False,
    allow_empty: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Chat template (once), tokens, padding on the right.

    Args:
        tokenizer: From `load_tokenizer`.
        prompts: B prompts, none empty.
        length: L, of the padded result.
        enable_thinking: True for Z-Image, False for FLUX.2-klein. Contrary to its name, False
            adds an empty block of thoughts.
        truncate: Cut longer prompts to L tokens, template end included, as the published
            pipelines do.
        allow_empty: Take empty prompts too: what guidance leads away from.

    Returns:
        ids int32 [B, L], mask bool [B, L], True = real token.

    Raises:
        ValueError: Every empty and every too long prompt, together.
    """
    # Differs from reference: the caller's list stays as it is. The published Z-Image code writes
    # the templated text back and so templates the teacher's prompt twice.
    if not allow_empty:
        _check_prompts(prompts)
    texts = [_render(tokenizer, prompt, enable_thinking=enable_thinking) for prompt in prompts]
    return _encode(tokenizer, texts, length, truncate)


def prompt_problems(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], length: int, *,
    enable_thinking: bool,
) -> list[str]:
    """What is wrong with prompts, one line each: no texts, empty, or beyond `length` tokens.

    See `encode_prompts` for the arguments.
    """
    problems = []
    for i, prompt in enumerate(prompts):
        if problem := _text_problem(prompt):
            problems.append(f"prompt {i} {problem}")
            continue
        text = _render(tokenizer, prompt, enable_thinking=enable_thinking)
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokens > length:
            begin = prompt if len(prompt) <= 40 else prompt[:40] + ".."
            problems.append(
                f"prompt {i} ({begin!r}): expected at most {length} tokens, template included, "
                f"got {tokens}; shorten it"
            )
    return problems


def encode_image_prompts(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    num_image_tokens: int,
    length: int,
    *,
    truncate: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """As `encode_prompts`, each user turn being one image and then the prompt.

    Args:
        tokenizer: Of a vision-language checkpoint, whose chat template knows images.
        prompts: B prompts, none empty.
        num_image_tokens: gh gw / 4 of the images' grid.
        length: L, of the padded result.
        truncate: Cut longer prompts to L tokens, as the published code does.

    Returns:
        ids int32 [B, L], mask bool [B, L], True = real token.

    Raises:
        ValueError: A tokenizer without images, an L that cuts into the image, and every empty or
            too long prompt or prompt that itself contains an image token.
    """
    _check_prompts(prompts)
    image_token_id(tokenizer)
    texts, problems = [], []
    for i, prompt in enumerate(prompts):
        if IMAGE_TOKEN in prompt:
            problems.append(f"prompt {i} contains {IMAGE_TOKEN}, which stands for the image")
            continue
        text = _render(tokenizer, [{"type": "image"}, {"type": "text", "text": prompt}])
        if text.count(IMAGE_TOKEN) != 1:
            raise ValueError(
                f"the tokenizer's chat template makes {text.count(IMAGE_TOKEN)} of 1 image; use "
                "the tokenizer of the vision-language checkpoint"
            )
        texts.append(text.replace(IMAGE_TOKEN, IMAGE_TOKEN * num_image_tokens))
    if problems:
        raise ValueError("encode_image_prompts: " + "; ".join(problems))
    ids, mask = _encode(tokenizer, texts, length, truncate)
    kept = np.count_nonzero(ids == image_token_id(tokenizer), axis=1)
    if np.any(kept != num_image_tokens):
        raise ValueError(
            f"encode_image_prompts: {num_image_tokens} image tokens and the template do not fit "
            f"in a length of {length}; raise the length or shrink the image"
        )
    return ids, mask


def image_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the token that stands for a piece of an image.

    Raises:
        ValueError: The tokenizer has no such token.
    """
    token = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if token is None:
        raise ValueError(
            f"the tokenizer has no {IMAGE_TOKEN}; use the one of the vision-language checkpoint"
        )
    return token


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise ValueError(f"expected a list of prompts, got the string {prompts[:40]!r}")
    wrong = {i: p for i, prompt in enumerate(prompts) if (p := _text_problem(prompt))}
    if others := [f"prompt {i} {p}" for i, p in wrong.items() if p != EMPTY]:
        raise ValueError("; ".join(others))
    empty = list(wrong)
    if empty or not len(prompts):
        raise ValueError(
            f"prompts {empty} of {len(prompts)} are empty" if empty else "got no prompts"
        )


def _text_problem(prompt: object) -> str:
    """What keeps a prompt from being tokenised at any length; "" for nothing."""
    if not isinstance(prompt, str):
        return f"is no text: expected a str, got {type(prompt).__name__} {prompt!r:.40}"
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        return f"({prompt!r:.40}) is no valid UTF-8: character {e.start} stands for a stray byte"
    return "" if prompt.strip() else EMPTY


def _render(tokenizer, content, **template_options) -> str:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
        **template_options,
    )


def _encode(tokenizer, texts, length: int, truncate: bool) -> tuple[np.ndarray, np.ndarray]:
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    long = [f"prompt {i} has {len(row)}" for i, row in enumerate(rows) if len(row) > length]
    if long and not truncate:
        raise ValueError(
            f"expected at most {length} tokens, template included: {'; '.join(long)}; shorten, "
            "raise the length, or ask for truncation"
        )
    ids = np.full((len(rows), length), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        row = row[:length]
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return ids, mask


def smart_resize(
    height: int,
    width: int,
    min_pixels: int = 512 * 512,
    max_pixels: int = 768 * 768,
    factor: int = 32,
) -> tuple[int, int]:
    """The size at which Qwen3-VL looks at an image: multiples of `factor`, area within limits.

    Args:
        height, width: Of the image.
        min_pixels, max_pixels: Of the result; the defaults are D-OPSD's.
        factor: Patch size times merge size.

    Returns:
        height, width.

    Raises:
        ValueError: An aspect ratio above 200.

    Source: transformers `smart_resize` of the Qwen2-VL image processor.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"image of {width}x{height}: expected an aspect ratio of at most {MAX_ASPECT}"
        )
    # round() takes halves to the even neighbour; so does the reference.
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w


def image_patches(
    image: np.ndarray,
    patch_size: int = 16,
    merge_size: int = 2,
    temporal: int = 2,
    min_pixels: int = 512 * 512,
    max_pixels: int = 768 * 768,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Cuts an image into the vision tower's patches.

    Args:
        image: float32 [H, W, 3] in [-1, 1].
        patch_size: P.
        merge_size: Patches per token and axis; such patches follow one another.
        temporal: T, how often the still image is repeated in a patch.
        min_pixels, max_pixels: See `smart_resize`.

    Returns:
        patches float32 [gh gw, 3 T P P], and (gh, gw).

    Raises:
        ValueError: Not an image of this kind.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.float32:
        raise ValueError(
            f"image: expected float32 [H, W, 3] in [-1, 1], got {image.dtype} {image.shape}"
        )
    H, W = smart_resize(*image.shape[:2], min_pixels, max_pixels, factor=patch_size * merge_size)
    # Float mode, so nothing is rounded or clipped between resize and normalisation. The tower's
    # own normalisation is the image's range of [-1, 1] already.
    channels = np.stack(
        [
            np.asarray(
                Image.fromarray(np.ascontiguousarray(image[..., c])).resize(
                    (W, H), Image.Resampling.BICUBIC
                )
            )
            for c in range(3)
        ]
    )
    gh, gw = H // patch_size, W // patch_size
    x = channels.reshape(
        3, gh // merge_size, merge_size, patch_size, gw // merge_size, merge_size, patch_size
    )
    x = x.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]  # gh/m gw/m m m C 1 P P
    x = np.broadcast_to(x, (*x.shape[:5], temporal, *x.shape[6:]))
    return x.reshape(gh * gw, -1), (gh, gw)

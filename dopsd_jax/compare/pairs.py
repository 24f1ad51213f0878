"""Folders of pictures -> which prompt and which references each drawn picture is held against."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dopsd_jax.core.checks import noted
from dopsd_jax.data.files import IMAGE_EXTENSIONS, open_image
from dopsd_jax.data.rows import MAX_LISTED

PAIRINGS = {
    "name": "the reference of the same name without extension; every picture and every reference "
            "must have its partner",
    "nearest": "the nearest of all references, which each metric finds for itself",
    "all": "all references, and the mean is taken",
}


def read_folder(directory: str | Path) -> list[Path]:
    """The pictures directly in a folder, by name; every one has been decoded.

    Raises:
        ValueError: No folder, no picture in it, or pictures that cannot be read, together.
    """
    directory = Path(directory)
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing"
        raise ValueError(f"{directory}: expected a folder of pictures, found {found}")
    files = sorted(p for p in directory.iterdir() if p.suffix.lower() in IMAGE_EXTENSIONS)
    if not files:
        raise ValueError(
            f"{directory}: expected pictures ({', '.join(IMAGE_EXTENSIONS)}) directly in this "
            "folder, found none"
        )
    problems: list[str] = []
    for file in files:
        with noted(problems):
            open_image(file)
    if problems:
        raise ValueError(_listed(problems))
    return files


def read_prompts(pictures: Sequence[Path]) -> list[str | None]:
    """What each picture was asked to show, or None where nothing beside it says so.

    `sample` writes picture.json with a key "prompt"; a caption in picture.txt is read as well.

    Raises:
        ValueError: A .json without a prompt, or an empty text.
    """
    problems: list[str] = []
    prompts: list[str | None] = []
    for picture in pictures:
        prompts.append(None)
        with noted(problems):
            prompts[-1] = _prompt_beside(picture)
    if problems:
        raise ValueError(_listed(problems))
    return prompts


def _prompt_beside(picture: Path) -> str | None:
    sidecar, caption = picture.with_suffix(".json"), picture.with_suffix(".txt")
    if sidecar.is_file():
        source = sidecar
        try:
            prompt = json.loads(sidecar.read_text(encoding="utf-8"))["prompt"]
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f'{sidecar}: expected a JSON object with a text "prompt", as sample writes it '
                f"({type(e).__name__}: {e!s:.80})"
            ) from e
    elif caption.is_file():
        source = caption
        try:
            prompt = caption.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{caption}: expected a caption in UTF-8 ({e})") from e
    else:
        return None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{source}: expected a prompt that is no empty text, got {prompt!r:.40}")
    return prompt.strip()


def replace_words(
    prompts: Sequence[str | None], replacements: Sequence[str]
) -> list[str | None]:
    """Prompts in words that CLIP knows: "OLD=NEW" puts NEW for every OLD.

    A trigger word such as [V] means nothing to CLIP; the published evaluation puts the name of the
    class in its place.

    Raises:
        ValueError: No such pair, or an OLD that no prompt has.
    """
    problems = []
    prompts = list(prompts)
    for pair in replacements:
        old, equals, new = pair.partition("=")
        if not old or not equals:
            problems.append(f"replace: expected OLD=NEW, such as [V]=dog, got {pair!r:.60}")
        elif not any(p and old in p for p in prompts):
            problems.append(f"replace: no prompt has {old!r}; the first is {prompts[0]!r:.80}")
        prompts = [p and p.replace(old, new) if old else p for p in prompts]
    if problems:
        raise ValueError("\n  ".join(problems))
    return prompts


def pair_up(
    pictures: Sequence[Path], references: Sequence[Path], pairing: str | None
) -> list[list[int]]:
    """For every picture the numbers of the references it is compared with.

    Args:
        pictures, references: Files.
        pairing: A key of `PAIRINGS`.

    Raises:
        ValueError: No such pairing, or for "name" every picture or reference without exactly one
            partner.
    """
    if pairing not in PAIRINGS:
        raise ValueError(
            f"pairing: expected one of {', '.join(PAIRINGS)}, got {pairing!r}:\n  "
            + "\n  ".join(f"{name}: {meaning}" for name, meaning in PAIRINGS.items())
        )
    if pairing != "name":
        return [list(range(len(references)))] * len(pictures)
    problems = _twice("picture", pictures) + _twice("reference", references)
    by_name = {file.stem: i for i, file in enumerate(references)}
    drawn = {file.stem for file in pictures}
    problems += [f"picture {f.name}: no reference {f.stem}.*" for f in pictures
                 if f.stem not in by_name]
    problems += [f"reference {f.name}: no picture {f.stem}.*" for f in references
                 if f.stem not in drawn]
    if problems:
        raise ValueError(
            "pairing=name: expected one reference for each picture, of the same name without "
            f"extension:\n  {_listed(problems)}\n  rename them, or take pairing=nearest or all"
        )
    return [[by_name[file.stem]] for file in pictures]


def _twice(kind: str, files: Sequence[Path]) -> list[str]:
    stems = [file.stem for file in files]
    return [f"{kind} {f.name}: another {kind} has this name too" for f in files
            if stems.count(f.stem) > 1]


def _listed(problems: Sequence[str]) -> str:
    more = len(problems) - MAX_LISTED
    return "\n  ".join([*problems[:MAX_LISTED], *([f".. and {more} more"] if more > 0 else [])])

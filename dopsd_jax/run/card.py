"""The model card of exported weights: README.md and images/ beside them, as the hub shows it."""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path

from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.log import log
from dopsd_jax.core.markdown import code, fenced, markdown_table, plain
from dopsd_jax.method.contexts import RECIPES, STUDENT
from dopsd_jax.run import previews
from dopsd_jax.run.story import Story, shown, summary
from dopsd_jax.weights.save import CARD

README, IMAGES = CARD
# The last line of a card: of which file it is, and whether it is as it was written.
MARK = re.compile(r"<!-- dopsd_jax: card of (?P<name>.+), sha256 (?P<digest>[0-9a-f]{64}) -->\n\Z")
GAUGES = {
    "style": "distance of colours to the training pictures', levels of 255",
    "drift": "distance of pictures of unrelated prompts to the untuned model's, levels of 255",
    "sharpness_ratio": "sharpness of pictures of unrelated prompts, the untuned model's is 1",
}
METHOD = """\
D-OPSD ([arXiv 2605.05204](https://arxiv.org/abs/2605.05204)) tunes a step-distilled model without
losing its few-step quality: the student moves along its own few-step trajectory toward a teacher
that also sees the target image."""


def folder_of(out: str | Path, fmt: str, *, full: bool) -> Path:
    """Where the card of an export stands."""
    return Path(out) if fmt == "peft" or full else Path(out).parent


def check_place(folder: Path, name: str) -> None:
    """Raises ValueError if a README.md stands there that is no card of `name`, edited or not."""
    file = folder / README
    mark = MARK.search(file.read_text(errors="replace")) if file.is_file() else None
    if file.exists() and (mark is None or mark["name"] != name):
        raise ValueError(
            f"{file}: expected none, or the card of {name}, which goes to the hub with it; choose "
            "an --out in a folder of its own"
        )


def write(folder: Path, name: str, fmt: str, story: Story) -> bool:
    """Writes README.md and the pictures that it shows.

    A README.md of another origin, of another file or one that was edited stays as it is.

    Args:
        folder: See `folder_of`.
        name: Of the file or directory of weights.
        fmt: Of lora_files.FORMATS.
        story: Of the weights.

    Returns:
        Whether it was written.
    """
    file = folder / README
    if file.exists() and not _unchanged(file, name):
        log.warning("%s: is not the unchanged card of an earlier export of %s; it stays as it is",
                    file, name)
        return False
    for picture, pixels in story.pictures.items():
        previews.save(folder / IMAGES / f"{picture}.png", pixels)
    body = text(name, fmt, story)
    digest = hashlib.sha256(body.encode()).hexdigest()
    write_atomic(file, f"{body}<!-- dopsd_jax: card of {name}, sha256 {digest} -->\n")
    return True


def _unchanged(file: Path, name: str) -> bool:
    found = file.read_text(errors="replace")
    mark = MARK.search(found)
    return bool(mark) and mark["name"] == name and (
        hashlib.sha256(found[:mark.start()].encode()).hexdigest() == mark["digest"])


def files_of(folder: Path) -> list[str]:
    """The card and the pictures that it names, relative to its folder."""
    found = (folder / README).read_text()
    return [README, *(f"{IMAGES}/{p.name}" for p in sorted((folder / IMAGES).glob("*"))
                      if f"{IMAGES}/{p.name}" in found)]


def text(name: str, fmt: str, story: Story) -> str:
    """A card, but for its last line; see `write` for the arguments."""
    title = story.told.repo.rpartition("/")[2] or Path(name).stem
    parts = [f"---\n{_front_matter(story)}\n---", f"# {title}"]
    if story.prompts:
        parts.append("<Gallery />")
    parts += [summary(story), *_notes(story), *_pictures(story)]
    if not story.members:
        parts += _training(story)
    parts += ["## How to use it", *_diffusers(name, fmt, story), *_elsewhere(name, fmt, story)]
    return "\n\n".join(part.strip() for part in parts) + "\n\n"


def _front_matter(story: Story) -> str:
    from huggingface_hub import ModelCardData  # half a second, only for a card

    lora, told, more = story.spec is not None, story.told, {}
    if story.base_model:
        more["base_model_relation"] = "adapter" if lora else "finetune"
    if told.trigger:
        more["instance_prompt"] = told.trigger
    if story.prompts:
        more["widget"] = [
            {"text": prompt, "output": {"url": f"{IMAGES}/prompt_{number}.png"}}
            for number, prompt in enumerate(story.prompts, 1)
        ]
    tags = [story.kind, "template:diffusion-lora"] if lora else []
    return ModelCardData(
        base_model=story.base_model or None, library_name="diffusers",
        license=told.license or None, pipeline_tag=_task(story),
        tags=[_task(story), "diffusers", *tags, "d-opsd"], **more,
    ).to_yaml(line_break="\n")


def _task(story: Story) -> str:
    recipe = RECIPES.get(story.settings.get("recipe", ""))
    edits = recipe is not None and STUDENT in recipe.references
    return "image-to-image" if edits else "text-to-image"


def _notes(story: Story) -> list[str]:
    told, notes = story.told, []
    if told.trigger:
        notes.append(f"Trigger words: {code(told.trigger)}.")
    if story.below:
        notes.append(
            f"It was trained on top of {story.below} other LoRA{'s' * (story.below > 1)}, which "
            "must be loaded too.")
    if story.role == "teacher":
        notes.append("These are the averaged weights of the run (the teacher's).")
    if not story.base_model:
        notes.append(f"The name of the base model on the hub is not known here; `{story.model}` is "
                     "what its directory was called.")
    if not told.license:
        notes.append("No license was stated by who made this. That of the base model holds for "
                     "what is derived from it.")
    return notes


def _pictures(story: Story) -> list[str]:
    words = {
        "prompts": "Left the untuned model, right this one, each row from the same noise"
        + (": " + "; ".join(map(plain, story.prompts)) if story.prompts else "") + ".",
        "learned": "Prompts of the training data, on the same noise: the untuned model, this one.",
        "unrelated": "Prompts that have nothing to do with the data: what they were, what they "
        "are.",
    }
    found = [f"![{said.partition(':')[0]}]({IMAGES}/{name}.png)\n\n{said}"
             for name, said in words.items() if name in story.pictures]
    if not found:
        return []
    calls = f" ({story.sample_steps} denoiser calls)" if story.sample_steps else ""
    return [f"## Before and after{calls}", *found]


def _training(story: Story) -> list[str]:
    table = {"updates": f"{story.step:,}"}
    if story.rows:
        table["rows of data"] = f"{story.rows:,}"
    table |= {f"`{key}`": f"`{shown(value)}`" for key, value in story.settings.items()}
    rows = {name: [value.replace("|", "\\|")] for name, value in table.items()}
    parts = ["## Training"]
    if story.settings.get("objective", "dopsd") == "dopsd":
        parts.append(METHOD)
    parts += [
        "Made with `dopsd_jax`. Settings that are not named are its defaults.",
        markdown_table(["value"], rows),
    ]
    steps = [row["step"] for row in story.gauges]
    names = [name for name in GAUGES if story.step in steps and name in story.gauges[-1]]
    if names:
        parts.append(markdown_table(
            [f"after {step:,}" for step in steps] + ["what it is"],
            {name: [f"{row[name]:.3g}" if name in row else "" for row in story.gauges]
             + [GAUGES[name]] for name in names},
        ))
    return parts


def _opens(fmt: str, story: Story) -> bool:
    """Whether diffusers opens files of a format; ComfyUI's only where both name modules alike."""
    if fmt == "comfyui_fused":
        return False
    example = next(iter(story.family.published.values()))
    return fmt != "comfyui" or story.family.modules(example).comfyui == "diffusion_model."


def _diffusers(name: str, fmt: str, story: Story) -> list[str]:
    if not _opens(fmt, story):
        return ["### diffusers", "diffusers does not open this file; it was made for ComfyUI. "
                "`python -m dopsd_jax.export` with `--format diffusers` makes one for it."]
    repo, full = story.told.repo, story.spec is None
    base = f'base = "{story.base_model or story.model}"'
    if not story.base_model:
        base += "  # put the directory of the model here"
    here = f'"{repo}"' if repo else '"."' if fmt == "diffusers" and not full else f'"{name}"'
    load = {
        "diffusers": f'pipe.load_lora_weights({here}, weight_name="{name}")',
        "comfyui": f'pipe.load_lora_weights({here if repo else chr(34) + "." + chr(34)}, '
                   f'weight_name="{name}")',
        "peft": f"pipe.transformer = PeftModel.from_pretrained(pipe.transformer, {here})",
    }[fmt]
    lines = ["import torch", "from diffusers import DiffusionPipeline"]
    opened = "pipe = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.bfloat16)"
    if full:
        lines[1] = "from diffusers import AutoModel, DiffusionPipeline"
        load = "pipe.to(device)"
        opened = (
            f"transformer = AutoModel.from_pretrained({here}, torch_dtype=torch.bfloat16)\n"
            "pipe = DiffusionPipeline.from_pretrained(\n"
            "    base, transformer=transformer, torch_dtype=torch.bfloat16)")
    elif fmt == "peft":
        lines.append("from peft import PeftModel")
    height, width = story.side or (1024, 1024)
    prompt = story.prompts[0] if story.prompts else story.told.trigger or "a fox in the snow"
    arguments = {"num_inference_steps": story.sample_steps or 4, "height": height, "width": width,
                 **story.family.elsewhere.arguments}
    lines += [
        "", base, 'device = "cuda" if torch.cuda.is_available() else "cpu"', opened,
        load if full else f"{load}\npipe.to(device)",
        "image = pipe(", f"    prompt={prompt!r},",
        *(f"    {key}={value!r}," for key, value in arguments.items()),
        ").images[0]", 'image.save("drawn.png")',
    ]
    return ["### diffusers", fenced("\n".join(lines), "python")]


def _elsewhere(name: str, fmt: str, story: Story) -> list[str]:
    if story.spec is None:
        return ["### dopsd_jax", f"Put `{name}` in place of `transformer/` of the base model."]
    parts = ["### ComfyUI"]
    if story.kind == "dora":
        parts.append("ComfyUI would draw something else with a DoRA, since it divides by other "
                     "lengths. `python -m dopsd_jax.export` with `--lora` and `--full` makes a "
                     "model of it that holds it.")
    elif fmt == "peft":
        parts.append("ComfyUI reads no PEFT directory; `python -m dopsd_jax.export` with "
                     "`--format comfyui` makes a file for it.")
    else:
        parts.append(f"Put `{name}` into `models/loras` and load it with the node *Load LoRA "
                     "(Model)*, at strength 1.")
    prompt = (story.prompts[0] if story.prompts else story.told.trigger or "a fox in the snow")
    height, width = story.side or (1024, 1024)
    command = (
        f"python -m dopsd_jax.sample --model {story.base_model or story.model} --lora {name} "
        f"--prompt {shlex.quote(prompt)} --num_steps {story.sample_steps or 4} --height {height} "
        f"--width {width} --out drawn")
    return [*parts, "### dopsd_jax", fenced(command)]

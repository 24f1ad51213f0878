"""Every key of a run: its default, its meaning, what its value must be, and what it affects.

This table is the only place where a key is described. From it follow the config that all config
files start from (`base`), the values that are refused (`run/config.py`), the keys whose value may
change when a run is continued (`may_change`), the settings that name an entry of a cache
(`affecting`), and the table of keys for readers: `python -m dopsd_jax.run.keys > docs/keys.md`.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from ml_collections import ConfigDict

from dopsd_jax.core.checks import is_whole
from dopsd_jax.method import contexts, flow, lora, rollout
from dopsd_jax.method.train_step import TEACHERS, TRAINABLE
from dopsd_jax.models.layers import REMAT_POLICIES
from dopsd_jax.models.quantization import AS_DTYPE, BASE_DTYPES, ENCODER_DTYPES
from dopsd_jax.run.rules import (
    ANY_PATH,
    BATCH,
    COUNT,
    COUNT_OR_NONE,
    DATA_SETS,
    DECAY,
    DTYPE,
    KEPT_DTYPE,
    LORAS,
    MAX_RANK,
    NOT_NEGATIVE,
    NUM_STEPS,
    PARTS,
    PATH,
    PATHS,
    PIXELS,
    POSITIVE,
    SEED,
    SHARE,
    SWITCH,
    TARGETS,
    TEXT,
    TEXTS,
    TOKENS,
    TRACKERS,
    Rule,
    one_of,
    whole,
)
from dopsd_jax.weights.families import PUBLISHED

# What a key may affect. The first four are what frozen encoders make; a cache names each entry by
# the settings that affect it. What an encoder is given (a caption with its added words, an image
# cut to its bucket, weights) is in that name by content, so a key that chooses it affects STEP.
STUDENT = "student"  # what the text encoder makes of the student's text
TEACHER = "teacher"  # what the text encoder makes of the teacher's text
VISION = "vision"    # what the teacher sees of the target image through Qwen3-VL
LATENTS = "latents"  # what the VAE makes of the images that a run learns from or shows
STEP = "step"        # anything else that an update computes with
DISPLAY = "display"  # pictures, logs, and which checkpoints are kept
PLACE = "place"      # where files lie; what they hold is compared by fingerprint or by name

OBJECTIVES = ("dopsd", "sft")
AUTO = "auto"  # of remat: the policy that computes least again and fits, see run/remat.py


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a run.

    Attributes:
        default: Its value where a config file says nothing.
        rule: What its value must be, whatever the other keys are.
        affects: What follows from its value, of the words above; may be empty.
        meaning: One sentence for the table of keys.
        resume: Why it may change or not when a run is continued, where that is not obvious.
    """

    default: Any
    rule: Rule
    affects: frozenset[str]
    meaning: str
    resume: str = ""


def key(default: Any, rule: Rule, *affects: str, meaning: str, resume: str = "") -> Key:
    return Key(default, rule, frozenset(affects), meaning, resume)


SECTIONS: dict[str, dict[str, Key]] = {"What to train on": {
    "model": key("", PATH, PLACE,
        meaning="Pipeline directory (model_index.json, transformer/, vae/, ..), name on the hub "
        "(OWNER/NAME or OWNER/NAME@REVISION), or mini."),
    "transformer_file": key("", ANY_PATH, PLACE,
        meaning="A .safetensors file, as ComfyUI keeps it, whose weights replace those of model's "
        "transformer; see models.md.",
        resume="what it holds is part of the model's fingerprint"),
    "vae_file": key("", ANY_PATH, PLACE,
        meaning="The same for the VAE.",
        resume="as transformer_file"),
    "text_encoder_file": key("", ANY_PATH, PLACE,
        meaning="The same for the text encoder.",
        resume="as transformer_file"),
    "published": key(next(iter(PUBLISHED)), one_of(*PUBLISHED),
        meaning=f"The published model ({', '.join(PUBLISHED)}) whose sizes are planned for where "
        "no model is given.",
        resume="no run reads it"),
    "vlm": key("", PATH, PLACE,
        meaning="Directory in the format of Qwen3-VL-4B-Instruct, or its name on the hub, through "
        "which the teacher of recipe vlm looks at the target."),
    "data": key("", PATHS, PLACE,
        meaning="A folder of images and captions, a JSONL, JSON, CSV, Parquet or .tar file, a TFDS "
        "data set, or several, `a.jsonl,b.parquet`; see data.md. What a row holds depends on "
        "recipe."),
    "data_weights": key("", TEXT, STEP,
        meaning="Shares of the pictures from each of several data sets, `3,1`; by default each "
        "row is seen equally often."),
    "caption_key": key("", TEXT, STEP,
        meaning="Name of the column or key that holds the caption; by default the known ones."),
    "data_root": key("", ANY_PATH, PLACE,
        meaning="Folder outside which images may not lie; by default where the JSONL is.",
        resume="which images are found is part of the data's fingerprint; with encode=online those "
        "of 16 rows stand for all"),
    "cache": key("", ANY_PATH, PLACE,
        meaning="Folder (or gs://..) of dopsd_jax.encode; training then loads no encoder.",
        resume="an entry is named by all that it follows from, and equals what is made without"),
    "encode": key("ahead", one_of("ahead", "online"), STEP,
        meaning="ahead: all data is checked and encoded before the run; online: an index is "
        "made, the rest is done when a row's turn comes.",
        resume="online identifies data by its index and some images, ahead by all images"),
    "resolution": key(1024, whole(16, 16384, " pixels"), STEP,
        meaning="Side of the square bucket, in pixels; the others are the published ones at its "
        "area."),
    "buckets": key("", TEXT, STEP,
        meaning="Own buckets instead, `512x512,768x512` (width x height)."),
    "small_buckets": key("error", one_of("error", "repeat"), STEP,
        meaning="What to do with a bucket that has fewer rows than batch_size: error, or repeat "
        "its rows within a batch."),
    "text_tokens": key(512, TOKENS, STUDENT,
        meaning="Padded length of the student's prompt, in tokens; a model that attends to "
        "padding takes one length alone, for both."),
    "teacher_tokens": key(1024, TOKENS, TEACHER,
        meaning="Padded length of the teacher's prompt and, with recipe vlm, the image, in "
        "tokens."),
    "truncate_prompts": key(False, SWITCH, STUDENT, TEACHER,
        meaning="Cut prompts that are too long, as published; otherwise they are an error."),
}, "The method": {
    "objective": key("dopsd", one_of(*OBJECTIVES), STEP,
        meaning="dopsd, or sft: plain flow matching on the images, to compare with."),
    "states": key("student", one_of(*rollout.STATES), STEP,
        meaning="Where the loss is taken: on the student's own trajectory, or off-policy on "
        "that of the teacher or on noised targets (noised)."),
    "base_lora": key("", LORAS, PLACE,
        meaning="LoRAs that stay beside the one that trains, in float32: those of earlier tasks, "
        "or one that undoes a distillation. Runs or files, `runs/a,b.safetensors:0.7`.",
        resume="what it holds is part of a run's identity, and so are strengths"),
    "init_lora": key("", LORAS, PLACE,
        meaning="LoRA to go on training from: a run or file, of at most lora.rank; fresh "
        "directions fill up.",
        resume="as base_lora"),
    "init_full": key("", ANY_PATH, PLACE,
        meaning="Run of full fine-tuning to go on training from, at its latest checkpoint; model "
        "stays the one that counts as untuned.",
        resume="as base_lora"),
    "keep_prompts": key("", ANY_PATH, PLACE,
        meaning="Text file with a prompt in each line on which the student is to stay as it was: "
        "rows without a picture whose teacher is the model of retain with the same prompt. Several "
        "files, `a.txt,b.txt`, take turns: each has as many rows.",
        resume="the prompts are part of a run's identity"),
    "keep_share": key(0.0, SHARE, STEP,
        meaning="Share of the rows of every batch that keep_prompts take; a whole number of rows."),
    "anchor": key(0.0, NOT_NEGATIVE, STEP,
        meaning="Weight of the distance to what the model of retain predicts with the prompt "
        "alone, at the states of the loss; 0: none."),
    "retain": key("untuned", one_of("untuned", "start"), STEP,
        meaning="What keep_prompts and anchor hold on to: the untuned model, or the one that this "
        "run began with, base_lora, init_lora or init_full included."),
    "recipe": key("vlm", one_of(*contexts.RECIPES), STUDENT, TEACHER, STEP,
        meaning="What the teacher sees: vlm (prompt and target image), edit (target as "
        "reference), edit_ref (references, target as the last), text (a longer text), "
        "subject_ref (other pictures of the subject)."),
    "teacher_words": key("published", TEXT, STEP,
        meaning="Added to the teacher's prompt: the recipe's own words (published), or any "
        "text."),
    "trainable": key("lora", one_of(*TRAINABLE), STEP,
        meaning="lora, or full: all weights of the transformer."),
    "num_steps": key(4, NUM_STEPS, STEP,
        meaning="Denoiser calls of the training rollout; memory does not grow with them."),
    "schedule": key("shifted", one_of(*flow.SCHEDULES), STEP,
        meaning="shifted: the sampler's own; as published for training: reference8 (8 steps), "
        "reference (any number)."),
    "shift": key(0.0, NOT_NEGATIVE, STEP, DISPLAY,
        meaning="Shift of the schedule towards noise; 0: the sampler's own, which may follow "
        "num_steps and the bucket."),
    "loss": key("x0", one_of(*rollout.LOSSES), STEP,
        meaning="x0, as published, which is sigma^2 times velocity; or velocity."),
    "teacher": key("ema", one_of(*TEACHERS), STEP,
        meaning="ema (average of the student), frozen (as the run began), live (known to "
        "collapse), or untuned (the model without any LoRA, earlier ones included; for one task "
        "after another, see tasks.md)."),
    "ema_decay": key(0.9999, SHARE, STEP,
        meaning="Share of the averaged teacher that stays in each update, computed in float32."),
    "ema_dtype": key("float32", KEPT_DTYPE, STEP,
        meaning="In which the averaged teacher is kept between updates; bfloat16 takes half the "
        "memory, rounded at random."),
    "vlm_rope_theta": key(0.0, NOT_NEGATIVE, VISION,
        meaning="Rotary base beside an image; 0: Qwen3-VL's 5e6, as published; 1e6: the text "
        "encoder's own."),
    "vlm_min_pixels": key(512 * 512, PIXELS, VISION,
        meaning="Least area at which the vision tower looks at the target, in pixels."),
    "vlm_max_pixels": key(768 * 768, PIXELS, VISION,
        meaning="Largest area at which the vision tower looks at the target, in pixels."),
    "double_template": key(False, SWITCH, VISION,
        meaning="Put the chat template around the teacher's prompt twice, as published by "
        "accident."),
    "lora.kind": key("lora", one_of(*lora.KINDS), STEP,
        meaning="lora; dora: the lengths of the tuned weight's columns train too; lokr: Kronecker "
        "products, as in LyCORIS."),
    "lora.rank": key(64, whole(1, MAX_RANK), STEP,
        meaning="Rank of the LoRA; at most what a targeted layer can express, its smaller side. Of "
        "a lokr the rank of its larger factor, which is whole if that is smaller."),
    "lora.alpha": key(128.0, POSITIVE, STEP,
        meaning="The LoRA is scaled by alpha / rank; a lokr without a rank by 1."),
    "lora.factor": key(8, Rule(f"-1, or a whole number from 1 to {MAX_RANK}",
                               lambda x: is_whole(x) and (x == -1 or 1 <= x <= MAX_RANK)), STEP,
        meaning="Of a lokr: each side of a layer is split into this and the rest, or the largest "
        "divisor below; -1: into two about equal parts, which has the fewest parameters."),
    "lora.targets": key("published", TARGETS, STEP,
        meaning="Linear layers that get a LoRA: those published, attention, all, or regexes of "
        "parameter names, separated by commas."),
}, "The optimizer": {
    "num_train_steps": key(2000, COUNT,
        meaning="How many updates a run has.",
        resume="no update depends on how many follow"),
    "batch_size": key(4, BATCH, STEP,
        meaning="Images per update, over all devices."),
    "accumulation": key(1, BATCH, STEP,
        meaning="Micro-batches per update; divides batch_size."),
    "learning_rate": key(1e-4, POSITIVE, STEP,
        meaning="Learning rate of AdamW, constant after the warm-up."),
    "warmup_steps": key(0, COUNT_OR_NONE, STEP,
        meaning="Updates over which the learning rate rises linearly to its value."),
    "b1": key(0.9, DECAY, STEP,
        meaning="Decay of AdamW's average of gradients."),
    "b2": key(0.999, DECAY, STEP,
        meaning="Decay of AdamW's average of squared gradients."),
    "eps": key(1e-8, POSITIVE, STEP,
        meaning="Added to the denominator of AdamW's update."),
    "weight_decay": key(0.0, NOT_NEGATIVE, STEP,
        meaning="Decoupled weight decay of AdamW."),
    "max_grad_norm": key(1.0, POSITIVE, STEP,
        meaning="Global norm that gradients are clipped to."),
    "moments_dtype": key("float32", one_of("float32", "bfloat16", "int8"), STEP,
        meaning="In which AdamW's averages are kept between updates; bfloat16 takes half the "
        "memory, rounded at random; int8 a quarter, in blocks of 64 to 256 values, see "
        "recipes.md."),
    "seed": key(30, SEED, STEP, DISPLAY,
        meaning="Seed of the LoRA's first weights, of the order of rows and of all noise."),
}, "The machine": {
    "dtype": key("bfloat16", DTYPE, STUDENT, TEACHER, STEP,
        meaning="In which frozen weights are kept and used; LoRA, the averaged teacher and "
        "AdamW's averages are float32 unless their own keys say otherwise."),
    "base_dtype": key(AS_DTYPE, one_of(*BASE_DTYPES), STEP,
        meaning=f"In which the kernels of the frozen transformer's layers are kept: {AS_DTYPE} (as "
        f"the key {AS_DTYPE} says, bfloat16 by default), or quantised: int8 takes half the memory "
        "of bfloat16, fp8 as much as int8, nf4 a quarter; w8a8 is int8 whose products are integers "
        "too, faster on TPU; see memory.md. For trainable = lora."),
    "encoder_dtype": key(AS_DTYPE, one_of(*ENCODER_DTYPES), STUDENT, TEACHER, VISION,
        meaning="The same for the text encoder and the vision tower, but w8a8."),
    "cache_quantised": key(False, SWITCH,
        meaning="Keep what base_dtype and encoder_dtype made in .quantised/ in the model's "
        "directories, so that the next start reads half as much, or a quarter, and makes nothing.",
        resume="the weights are the same"),
    "vae_dtype": key("float32", DTYPE, LATENTS, DISPLAY,
        meaning="In which the VAE's weights are kept and used.",
        resume="a cache changes nothing in this, since it names latents by vae_dtype"),
    "remat": key(AUTO, one_of(AUTO, *REMAT_POLICIES), STEP,
        meaning="What layers keep for the backward pass, from least memory to least compute: "
        f"{', '.join(REMAT_POLICIES)}; {AUTO}: what computes least again and fits the devices, "
        "found by compiling when a run begins, but not offload, which keeps in the host's memory "
        "what full keeps, see planning.md.",
        resume="gradients are rounded otherwise, even on the same devices; auto goes on with what "
        "the run began with"),
    "mesh.data": key(-1, PARTS,
        meaning="Devices that split the batch; -1: all that are left.",
        resume="a run may move to other devices; sums differ by rounding alone"),
    "mesh.fsdp": key(1, PARTS,
        meaning="Devices that split the batch and the weights.",
        resume="as mesh.data"),
    "mesh.tensor": key(1, PARTS,
        meaning="Devices that split heads and the columns of MLPs.",
        resume="as mesh.data"),
}, "What to see and keep": {
    "preflight": key("on", one_of("on", "off"), DISPLAY,
        meaning="on: before the run, see whether the teacher knows more than the student at "
        "all.",
        resume="it draws with noise of its own and changes nothing"),
    "log_every": key(10, COUNT, DISPLAY,
        meaning="Updates between two lines of the log; metrics.jsonl has a row for each."),
    "sample_every": key(100, COUNT_OR_NONE, DISPLAY,
        meaning="Updates between two previews; 0: never."),
    "sample_steps": key(4, NUM_STEPS, DISPLAY,
        meaning="Denoiser calls of preview pictures.",
        resume="gauges before and after the change cannot be compared"),
    "sample_guidance": key(0.0, NOT_NEGATIVE, DISPLAY,
        meaning="Scale of classifier-free guidance of the run's own pictures, the preflight's too, "
        "as guidance_scale of the model's pipeline in diffusers; for models that are not "
        "step-distilled; 0: none.",
        resume="as sample_steps"),
    "sample_negative": key("", TEXT, DISPLAY,
        meaning="What sample_guidance leads away from; by default the empty prompt.",
        resume="as sample_steps"),
    "preview_model": key("", ANY_PATH, DISPLAY,
        meaning="Another model, such as the step-distilled one of an undistilled model, on which "
        "previews and gauges are drawn too, with the LoRA that trains and without guidance. It may "
        "differ from model in the transformer's weights alone, and these stay in memory.",
        resume="it only draws"),
    "preview_model_steps": key(4, NUM_STEPS, DISPLAY,
        meaning="Denoiser calls of pictures on preview_model.",
        resume="as sample_steps"),
    "preview_model_shift": key(0.0, NOT_NEGATIVE, DISPLAY,
        meaning="Shift of its schedule; 0: its own sampler's.",
        resume="as sample_steps"),
    "sample_rows": key(4, COUNT, DISPLAY,
        meaning="Training rows shown in previews.",
        resume="as sample_steps"),
    "sample_prompts": key((), TEXTS, DISPLAY,
        meaning="Further prompts, drawn by the untuned model and the student."),
    "gauge_prompts": key((
        "a lighthouse on a rocky coast at dawn", "a bowl of ramen on a wooden table, from above",
        "portrait of an old man with a white beard, studio light",
        "a narrow street in a rainy city at night, neon signs",
    ), TEXTS, DISPLAY,
        meaning="Unrelated prompts, the same in every run, drawn with sample_every: what became "
        "of them is logged as gauges of retention; empty: no such gauges.",
        resume="as sample_steps"),
    "earlier_data": key("", DATA_SETS, PLACE, DISPLAY,
        meaning="Data of earlier tasks, `a.jsonl;b.jsonl,c.parquet` with ; between tasks, whose "
        "first prompts previews draw too; dopsd_jax.tasks sets it."),
    "trackers": key("", TRACKERS, DISPLAY,
        meaning="Where numbers and pictures go besides TensorBoard: wandb, trackio, or both as "
        "wandb,trackio; see runs.md."),
    "checkpoint_every": key(500, COUNT, DISPLAY,
        meaning="Updates between two checkpoints."),
    "keep_checkpoints": key(5, COUNT, DISPLAY,
        meaning="How many of the latest checkpoints are kept."),
}}
KEYS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


def base() -> ConfigDict:
    """A config of all keys with their defaults: the published recipe for the first family, except
    where a meaning says otherwise."""
    config = ConfigDict()
    for name, entry in KEYS.items():
        *groups, last = name.split(".")
        inner = config
        for group in groups:
            if group not in inner:
                inner[group] = ConfigDict()
            inner = inner[group]
        inner[last] = entry.default
    return config


def affecting(*what: str) -> tuple[str, ...]:
    """The keys that some of `what` follows from."""
    return tuple(name for name, entry in KEYS.items() if entry.affects & set(what))


def may_change(name: str, *, encodes_images: bool) -> bool:
    """Whether a run may be continued with another value of a key.

    It may where no update depends on the value. A name that is no key may not.

    Args:
        name: Such as "lora.rank".
        encodes_images: Whether the run learns from what the VAE makes of images, or shows it to
            the networks; otherwise the VAE only draws.
    """
    if name not in KEYS:
        return False
    free = {DISPLAY, PLACE} if encodes_images else {DISPLAY, PLACE, LATENTS}
    return KEYS[name].affects <= free


def resume_words(name: str) -> str:
    """What the table of keys says of `may_change`."""
    words = "no"
    if may_change(name, encodes_images=True):
        words = "yes"
    elif may_change(name, encodes_images=False):
        words = "yes where the VAE only draws previews, no where it encodes images to learn from"
    return f"{words}; {reason}" if (reason := KEYS[name].resume) else words


def document() -> str:
    """The table of keys in Markdown: docs/keys.md."""
    lines = [
        "# Keys of a run",
        "",
        "Made by `python -m dopsd_jax.run.keys > docs/keys.md` from the table in "
        "`dopsd_jax/run/keys.py`; do not edit it here.",
        "Any key can be set on the command line, as in `--config.lora.rank=32`. The last column "
        "says whether a run may be continued with another value; of a path, what it holds must "
        "stay the same.",
    ]
    for title, section in SECTIONS.items():
        lines += ["", f"## {title}", "", "| key | default | meaning | may change on resume |",
                  "|---|---|---|---|"]
        for name, entry in section.items():
            cells = (f"`{name}`", f"`{entry.default!r}`", entry.meaning, resume_words(name))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())

"""What is known of weights that are exported: facts for a model card and for a file's header."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dopsd_jax.core.metrics import GAUGES, read_metrics
from dopsd_jax.data.keeping import kept_rows
from dopsd_jax.method import contexts
from dopsd_jax.method.lora import WORDS
from dopsd_jax.models.family import Family
from dopsd_jax.run import loras, previews
from dopsd_jax.run.keys import KEYS, PLACE, STEP
from dopsd_jax.run.loras import Named
from dopsd_jax.run.workdir import flat_config, saved_steps
from dopsd_jax.weights import hub
from dopsd_jax.weights.lora_reader import BASE_DTYPE, LoraSpec
from dopsd_jax.weights.shipped import PIPELINES

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
LICENSE = re.compile(r"[a-z0-9.-]+")
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")
# Said of every run; any other setting only where it is not the default.
MAIN = ("objective", "recipe", "trainable", "num_steps", "loss", "teacher", "ema_decay",
        "learning_rate", "batch_size", "resolution", "seed")
LORA = ("lora.kind", "lora.rank", "lora.alpha", "lora.targets")


@dataclasses.dataclass(frozen=True)
class Told:
    """What only the user knows; any may be empty.

    Attributes:
        base_model: Name on the hub of the model it belongs to.
        license: The hub's id of a license, such as apache-2.0.
        trigger: Words that call up what was learned.
        repo: Where on the hub it is sent.
    """

    base_model: str = ""
    license: str = ""
    trigger: str = ""
    repo: str = ""


@dataclasses.dataclass(frozen=True)
class Story:
    """Facts of exported weights. No path of the machine is among them.

    Attributes:
        family: Of the model.
        size: Name of the published checkpoint that the model has the sizes of; "" for none.
        model: What the model is called; never with the folders that it lies in.
        base_model: Its name on the hub, "" if unknown.
        told: What the user said.
        spec: Rank, alpha and base model of a LoRA; None with all weights.
        kind: Of a LoRA, one of `method.lora.KINDS`.
        members: LoRAs that were added up, where there were several; their names and strengths.
        base_dtypes: In which the weights were kept that it was trained on, where quantised.
        role: "student" or "teacher".
        step: Updates; None of several LoRAs.
        settings: Keys of the run's config that an update depends on.
        rows: Rows of data; None if unknown.
        below: How many LoRAs the run trained on top of.
        gauges: Rows of gauges.jsonl: untrained, and at the step.
        pictures: Name -> uint8 [H, W, 3].
        prompts: Prompt of every one of the pictures prompt_1, prompt_2, ..
        sample_steps: Denoiser calls of the pictures.
        side: (height, width) of one picture of the prompts; None if unknown.
    """

    family: Family
    size: str
    model: str
    base_model: str
    told: Told
    spec: LoraSpec | None
    kind: str = "lora"
    members: tuple[Named, ...] = ()
    base_dtypes: tuple[str, ...] = ()
    role: str = "student"
    step: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: int | None = None
    below: int = 0
    gauges: tuple[dict[str, Any], ...] = ()
    pictures: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    sample_steps: int | None = None
    side: tuple[int, int] | None = None


def check_told(told: Told) -> None:
    """Raises ValueError for what the hub would not take; see hub.check_push for the place."""
    if told.base_model and not REPOSITORY.fullmatch(told.base_model):
        raise ValueError(f"--base_model: expected OWNER/NAME on the hub, got {told.base_model!r}")
    if told.license and not LICENSE.fullmatch(told.license):
        raise ValueError("--license: expected one of the hub's ids in small letters, such as "
                         f"apache-2.0 or other, got {told.license!r}")


def size_of(family: Family, config: Any) -> str:
    """Name of the published checkpoint of a transformer's config; "" for none."""
    return next((name for name, known in family.published.items() if known == config), "")


def public_name(model: str, family: Family, size: str) -> str:
    """The name on the hub of a model that is given by name or directory; "" if it is not known.

    A directory tells it if it lies in the hub's cache, or if it is called as the published
    checkpoint of its sizes.
    """
    if not Path(model).exists() and model not in PIPELINES and hub.is_name(model):
        return model.partition("@")[0]
    if found := CACHED.search(f"{Path(model).absolute()}/"):
        return f"{found[1]}/{found[2]}"
    known = family.elsewhere.hub.get(size, "")
    return known if known.rpartition("/")[2].lower() == Path(model).name.lower() else ""


def name_of(model: str, base_model: str) -> str:
    """What a model may be called in public: its name on the hub, or that of its folder alone."""
    return base_model or Path(model).name


def of_run(
    workdir: Path, config: dict[str, Any], family: Family, size: str, told: Told,
    spec: LoraSpec | None, step: int | None, role: str, kind: str = "lora",
) -> Story:
    """The story of a run's checkpoint.

    Args:
        workdir: The run's directory, here.
        config: Its config.json.
        family: Of its model.
        size: See `Story`.
        told: What the user said.
        spec: Of its LoRA, None with full fine-tuning.
        step: Of the checkpoint; None is the latest.
        role: Whose weights.
        kind: Of the LoRA, see `Story`.
    """
    step = saved_steps(workdir)[-1] if step is None else step
    values = flat_config(config)
    base = told.base_model or public_name(config["model"], family, size)
    story = Story(
        family, size, name_of(config["model"], base), base, told,
        None if spec is None else dataclasses.replace(
            spec, base_model=name_of(config["model"], base)),
        kind=kind, role=role, step=step, settings=_settings(values),
        base_dtypes=tuple(loras.base_dtypes([str(workdir)]).values()),
        rows=_rows(workdir, values, step),
        below=len([x for x in str(values.get("base_lora") or "").split(",") if x]),
        gauges=tuple(r for r in read_metrics(workdir, GAUGES) if r["step"] in (0, step)),
        sample_steps=values.get("sample_steps"),
    )
    return _with_pictures(story, workdir, values) if role == "student" else story


def of_loras(
    model: str, members: list[Named], family: Family, size: str, told: Told,
    spec: LoraSpec | None, kind: str = "lora", base_dtypes: tuple[str, ...] = (),
) -> Story:
    """The story of several LoRAs that were added up, as `of_run`; base_dtypes: see `Story`."""
    base = told.base_model or public_name(model, family, size)
    name = name_of(model, base)
    return Story(
        family, size, name, base, told,
        None if spec is None else dataclasses.replace(spec, base_model=name), kind=kind,
        members=tuple(Named(Path(m.path).name, m.strength) for m in members),
        base_dtypes=base_dtypes,
    )


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that an update depends on and that hold no path: the main ones, and those changed."""
    main = MAIN + (LORA if values.get("trainable") == "lora" else ())
    if values.get("lora.kind") == "lokr":
        main += ("lora.factor",)
    changed = {
        name for name, entry in KEYS.items()
        if not name.startswith("lora.") and _differs(values.get(name), entry.default)
    }
    return {
        name: values[name] for name, entry in KEYS.items()
        if name in values and STEP in entry.affects and PLACE not in entry.affects
        and (name in main or name in changed)
    }


def _differs(value: Any, default: Any) -> bool:
    return value != (list(default) if isinstance(default, tuple) else default)


def _rows(workdir: Path, values: Mapping[str, Any], step: int) -> int | None:
    """How many rows a run learns from, by the epochs that it logged."""
    row = next((r for r in read_metrics(workdir) if r["step"] == step), {})
    if not row.get("epochs") or not values.get("batch_size"):
        return None
    learned = values["batch_size"] - kept_rows(
        values["batch_size"], values.get("keep_share") or 0.0)
    return round(step * learned / row["epochs"])


def _with_pictures(story: Story, workdir: Path, values: Mapping[str, Any]) -> Story:
    """With the pictures that the run drew at the step: those of the model, none of the data."""
    def drawn(name: str) -> np.ndarray | None:
        file = workdir / "samples" / f"{name}_{story.step:06d}.png"
        return np.asarray(Image.open(file).convert("RGB")) if file.is_file() else None

    pictures: dict[str, np.ndarray] = {}
    prompts, side = tuple(values.get("sample_prompts") or ()), None
    recipe = contexts.RECIPES.get(values.get("recipe", ""))
    if (grid := drawn("step")) is not None and recipe and (
            recipe.needs.images[1] == 1 and not recipe.needs.subject):
        # target, base, student and, where the objective has one, teacher
        count = 4 if values.get("objective") == "dopsd" else 3
        pictures["learned"] = previews.columns_of(grid, count, 1, 2)
    if (grid := drawn("prompts")) is not None and prompts:
        pictures["prompts"] = grid
        for number, one in enumerate(previews.column_of(grid, 2, 1, len(prompts)), 1):
            pictures[f"prompt_{number}"] = one
            side = one.shape[:2]
    else:
        prompts = ()
    if (grid := drawn("gauge")) is not None:
        pictures["unrelated"] = grid
    return dataclasses.replace(story, pictures=pictures, prompts=prompts, side=side)


def header(story: Story, name: str, fmt: str) -> dict[str, str]:
    """The entries of a LoRA file's `__metadata__` by which others show what it is.

    `modelspec.*` is Stability AI's model spec 1.0.1, `ss_*` are names of kohya-ss/sd-scripts. Only
    what is known is there, and no date, so that one checkpoint makes one file.

    Args:
        story: Of a LoRA.
        name: What the file is called, without its ending.
        fmt: Of lora_files.FORMATS.
    """
    told, settings = story.told, story.settings
    architecture = story.family.elsewhere.spec.get(story.size, story.family.pipeline)
    # Some files hold alpha / rank in their tensors, so to whoever opens them alpha is the rank.
    baked = fmt == "diffusers" or (fmt, story.kind) == ("peft", "lokr")
    alpha = story.spec.rank if baked else story.spec.alpha
    facts = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": told.repo.rpartition("/")[2] or name,
        "modelspec.author": told.repo.partition("/")[0],
        "modelspec.description": summary(story),
        "modelspec.resolution": _resolution(settings),
        "modelspec.trigger_phrase": told.trigger,
        "modelspec.license": told.license,
        "ss_output_name": name,
        "ss_base_model_version": architecture,
        "ss_sd_model_name": story.model,
        "ss_network_dim": story.spec.rank,
        "ss_network_alpha": f"{alpha:g}",
        "ss_steps": story.step,
        "ss_num_train_images": story.rows,
        "ss_learning_rate": settings.get("learning_rate"),
        "ss_seed": settings.get("seed"),
        BASE_DTYPE: ", ".join(story.base_dtypes),
    }
    return {key: str(value) for key, value in facts.items() if value not in (None, "")}


def _resolution(settings: Mapping[str, Any]) -> str:
    if settings.get("buckets"):
        return settings["buckets"].split(",")[0]
    side = settings.get("resolution")
    return f"{side}x{side}" if side else ""


def summary(story: Story) -> str:
    """What the weights are, in a sentence."""
    what = "All weights of the transformer" if story.spec is None else (
        f"A {WORDS[story.kind]} of rank {story.spec.rank}" if story.kind != "lokr" else
        "A LoKr (a LoRA of Kronecker products)")
    on = f" It was trained on weights in {', '.join(story.base_dtypes)}." * bool(story.base_dtypes)
    if story.members:
        listed = ", ".join(f"{m.path} at {m.strength:g}" for m in story.members)
        return f"{what} for {story.model}, which holds {listed}.{on}"
    how = "D-OPSD" if story.settings.get("objective", "dopsd") == "dopsd" else (
        f"objective {story.settings['objective']}")
    data = f" on {story.rows:,} image-text pairs" if story.rows else ""
    return f"{what} for {story.model}, tuned with {how} in {story.step:,} updates{data}.{on}"


def shown(value: Any) -> str:
    """A setting for a table."""
    return value if isinstance(value, str) and value else json.dumps(value)

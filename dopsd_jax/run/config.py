"""A run's config, checked before weights are read and before its directory is claimed.

Every key has a rule, see run/keys.py. What follows from several keys, the devices or the files of
the models is checked after that, as far as the values it needs are good ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dopsd_jax.core import sharding, trackers, trees
from dopsd_jax.core.checks import noted
from dopsd_jax.data import keeping, prompts
from dopsd_jax.data.buckets import Bucket, make_buckets, parse_buckets
from dopsd_jax.data.datasets import parse_data
from dopsd_jax.data.drafts import Needs
from dopsd_jax.method import contexts, flow, lora
from dopsd_jax.method.guidance import check_guidance
from dopsd_jax.method.train_step import Method, method_of
from dopsd_jax.models.quantization import AS_DTYPE
from dopsd_jax.run import loras, preview_model
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.keys import KEYS
from dopsd_jax.run.model import FILES, load_model
from dopsd_jax.weights.pipeline import Pipeline, read_vl_config
from dopsd_jax.weights.shapes import transformer_shapes


def needs_teacher(config: ConfigDict) -> bool:
    """Whether a run has a teacher that sees more than the student."""
    return config.objective == "dopsd"


def needs_vlm(config: ConfigDict) -> bool:
    """Whether a run's teacher sees the target image through Qwen3-VL."""
    return needs_teacher(config) and contexts.RECIPES[config.recipe].vlm


def needs_targets(config: ConfigDict) -> bool:
    """Whether a run's objective reads the target images themselves."""
    return config.objective == "sft" or config.states == "noised"


def needs_of_rows(config: ConfigDict) -> Needs:
    """What a run reads of every row: its recipe's needs, and the target of an objective."""
    needs = contexts.RECIPES[config.recipe].needs
    fewest, most = needs.images
    return dataclasses.replace(
        needs, images=(max(fewest, int(needs_targets(config))), most),
        caption_key=config.caption_key,
    )


def roles(config: ConfigDict) -> tuple[str, ...]:
    """The roles that a run has: the student, and the teacher where the objective has one."""
    return (contexts.STUDENT, contexts.TEACHER)[: 1 + needs_teacher(config)]


def needs_latents(config: ConfigDict) -> bool:
    """Whether images are encoded, as targets or as references."""
    recipe = contexts.RECIPES[config.recipe]
    return needs_targets(config) or any(recipe.shown(role, 1) for role in roles(config))


def check_config(config: ConfigDict, *, starts: bool = True) -> Method:
    """Checks every value of a config, and returns its method.

    Opens the models' configs and the tokenizer, but reads no weights and writes nothing.

    Args:
        config: Of the run.
        starts: Whether the run is to start on this machine, whose devices must then fit the mesh,
            and where the LoRAs or the run that it stands on must be.

    Raises:
        ValueError: Every missing or impossible value, together.
    """
    values = workdir_lib.flat_config(config.to_dict())
    wrong = _break_rules(values)
    shown = {"objective", "recipe"} <= values.keys() - wrong.keys() and needs_vlm(config)
    if not shown and not values.get("vlm"):  # it may be left empty then
        wrong.pop("vlm", None)
    problems = list(wrong.values())

    def good(*keys: str) -> bool:
        return not wrong.keys() & set(keys)

    if good("batch_size", "accumulation") and config.batch_size % config.accumulation:
        wrong["accumulation"] = (
            f"batch_size: expected a multiple of accumulation = {config.accumulation}, got "
            f"{config.batch_size}"
        )
        problems.append(wrong["accumulation"])
    problems += (_break_start(config, good) if starts else []) + _break_retention(config, good)
    if good("data", "data_weights"):
        with noted(problems):
            parse_data(config.data, config.data_weights)
    if good("trackers"):
        with noted(problems, "trackers"):
            trackers.check_installed(config.trackers)
    if good("encode", "cache") and config.encode == "online" and config.cache:
        problems.append("encode: expected ahead with a cache, which holds all that is encoded")
    if good("schedule", "num_steps", "shift"):
        with noted(problems):
            _check_schedule(config)
    if good("vlm_min_pixels", "vlm_max_pixels") and config.vlm_min_pixels > config.vlm_max_pixels:
        problems.append(
            f"vlm_min_pixels: expected at most vlm_max_pixels = {config.vlm_max_pixels}, got "
            f"{config.vlm_min_pixels}"
        )
    if starts and good("batch_size", "mesh.data", "mesh.fsdp", "mesh.tensor"):
        with noted(problems):
            _check_mesh(config, config.accumulation if good("accumulation") else 1)
    if shown and good("vlm"):
        with noted(problems, "vlm"):
            read_vl_config(config.vlm)
    if good("model", *FILES):
        with noted(problems, "model"):
            pipe = load_model(config, parts=())
            problems += _break_model(config, pipe, good)
    if problems:
        raise ValueError("config:\n  " + "\n  ".join(problems))
    return method_of(config)


def _break_start(config: ConfigDict, good: Callable[..., bool]) -> list[str]:
    """Problems of what a run stands on or goes on from."""
    problems: list[str] = []
    for key in ("base_lora", "init_lora"):
        if good(key, "trainable") and config[key]:
            if config.trainable != "lora":
                problems.append(f"{key}: expected nothing with trainable = full, which has no LoRA")
                continue
            with noted(problems, key):
                loras.check_present(config[key])
    if good("base_lora", "lora.kind", "trainable") and config.base_lora and (
        config.trainable == "lora" and config.lora.kind == "dora"
    ):
        problems.append("base_lora: expected nothing with lora.kind = dora, which sets how long "
                        "the columns of the whole weight are and adds up with no other LoRA; take "
                        "lora or lokr, or go on from it with init_lora")
    if good("cache_quantised", "base_dtype", "encoder_dtype") and config.cache_quantised and (
        config.base_dtype == config.encoder_dtype == AS_DTYPE
    ):
        problems.append(f"cache_quantised: expected a quantised base_dtype or encoder_dtype with "
                        f"it, got {AS_DTYPE} for both")
    if good("base_dtype", "trainable") and config.trainable == "full" and (
        config.base_dtype != AS_DTYPE
    ):
        problems.append(f"base_dtype: expected {AS_DTYPE} with trainable = full, which trains what "
                        f"would be quantised, got {config.base_dtype}")
    if good("init_full", "trainable") and config.init_full:
        if config.trainable != "full":
            problems.append("init_full: expected nothing with trainable = lora; give init_lora")
        elif not workdir_lib.is_workdir(config.init_full):
            problems.append(
                f"init_full: expected a run's directory, found none at {config.init_full}"
            )
    return problems


def _break_retention(config: ConfigDict, good: Callable[..., bool]) -> list[str]:
    """Problems of what keeps the student near the untuned model."""
    problems: list[str] = []
    if not good("keep_prompts", "keep_share", "anchor", "objective", "states", "recipe"):
        return problems
    if bool(config.keep_prompts) != (config.keep_share > 0):
        problems.append(
            "keep_share: expected a share above 0 with keep_prompts, got 0"
            if config.keep_prompts else
            f"keep_prompts: expected a text file with keep_share = {config.keep_share:g}, got none"
        )
    if config.keep_share and good("batch_size"):
        with noted(problems):
            keeping.kept_rows(config.batch_size, config.keep_share)
    for key in ("keep_share", "anchor"):
        if config[key] and config.objective != "dopsd":
            problems.append(f"{key}: expected 0 with objective = {config.objective}, which has no "
                            "trajectory to ask the untuned model on")
    if config.keep_share and config.states != "student":
        problems.append("keep_share: expected 0 unless states = student; prompts without a picture "
                        f"have no other trajectory than the student's, got {config.states}")
    recipe = contexts.RECIPES[config.recipe]
    if config.keep_share and recipe.shown(contexts.STUDENT, 1):
        problems.append(f"keep_share: expected 0 with recipe = {config.recipe}, whose student sees "
                        "references that a prompt alone does not have")
    if good("earlier_data") and config.earlier_data and recipe.shown(contexts.STUDENT, 1):
        problems.append(f"earlier_data: expected nothing with recipe = {config.recipe}, whose "
                        "student sees references that a prompt alone does not have")
    return problems


def check_values(config: ConfigDict, besides: Collection[str] = ()) -> None:
    """Raises ValueError unless every value is possible by itself.

    Args:
        config: Of a run.
        besides: Keys that may be left empty.
    """
    values = workdir_lib.flat_config(config.to_dict())
    wrong = _break_rules(values)
    if problems := [w for key, w in wrong.items() if key not in besides or values.get(key)]:
        raise ValueError("config:\n  " + "\n  ".join(problems))


def _break_rules(values: dict[str, Any]) -> dict[str, str]:
    """Key -> what is wrong with its value alone."""
    wrong = {}
    for key, entry in KEYS.items():
        if key not in values:
            wrong[key] = f"{key}: missing; start from configs.common.base()"
        elif not entry.rule.holds(values[key]):
            wrong[key] = f"{key}: expected {entry.rule.words}, got {_shown(key, values[key])}"
    return wrong


def _shown(key: str, value: Any) -> str:
    """A wrong value for a message."""
    if isinstance(value, str) and value == "":
        return f"nothing (--config.{key}=..)"
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        return f"an int of {value.bit_length()} bits"
    return text if len(text) <= 200 else f"{text[:80]}.. ({len(text)} characters)"


def _check_schedule(config: ConfigDict) -> None:
    """Raises ValueError unless the rollout has a schedule whose every step moves."""
    sigmas = flow.make_sigmas(config.schedule, config.num_steps, config.shift or 1.0)
    if not np.all(np.diff(sigmas) < 0):
        raise ValueError(
            f"shift: expected one with which each of {config.num_steps} steps lowers sigma in "
            f"float32, got {config.shift}"
        )


def _check_mesh(config: ConfigDict, accumulation: int) -> None:
    """Raises ValueError unless the mesh fits the devices and each part of a batch fits the mesh."""
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % (parts * accumulation):
        times = f", times accumulation = {accumulation}" if accumulation > 1 else ""
        raise ValueError(
            f"batch_size: expected a multiple of {parts * accumulation}, the devices that share it "
            f"(mesh.data {mesh.shape['data']} x mesh.fsdp {mesh.shape['fsdp']}){times}, got "
            f"{config.batch_size}"
        )


def _break_model(config: ConfigDict, pipe: Pipeline, good: Callable[..., bool]) -> list[str]:
    """Problems of a config with its model, found by the model's configs and tokenizer alone."""
    problems: list[str] = []
    if good("trainable", "lora.targets") and config.trainable == "lora":
        with noted(problems):
            _check_lora(config, pipe, check_rank=good("lora.rank"))
    if good("recipe", "objective"):
        with noted(problems, "recipe"):
            contexts.check_recipe(config.recipe, pipe, roles(config))
        for key in ("text_tokens", "teacher_tokens")[: len(roles(config))]:
            if good(key):
                with noted(problems, key):
                    contexts.check_length(pipe.text, config[key])
    # Texts are padded to what the config says, those of previews and gauges included.
    lengths = ("text_tokens", "teacher_tokens")[: len(roles(config))]
    buckets: tuple[Bucket, ...] = ()
    if good("resolution", "buckets"):
        with noted(problems):
            buckets = (
                parse_buckets(config.buckets) if config.buckets
                else make_buckets(config.resolution)
            )
    if buckets and good(*lengths):
        with noted(problems, ", ".join((*lengths, "buckets" if config.buckets else "resolution"))):
            sizes = [pipe.denoiser.latent_shape(b.height, b.width) for b in buckets]
            pipe.denoiser.network.check_sizes(
                max(h for h, _, _ in sizes), max(w for _, w, _ in sizes),
                max(config[key] for key in lengths),
            )
    if good("sample_guidance", "sample_negative"):
        with noted(problems):
            check_guidance(pipe, config.sample_guidance, config.sample_negative,
                           names=("sample_guidance", "sample_negative"))
    if good("preview_model", "trainable") and config.preview_model:
        with noted(problems, "preview_model"):
            preview_model.check_sibling(config, pipe)
    texts = {key: config[key] for key in ("sample_prompts", "gauge_prompts") if good(key)}
    if good("sample_negative") and config.sample_negative:
        texts["sample_negative"] = [config.sample_negative]
    if good("keep_prompts") and config.keep_prompts:
        with noted(problems):
            texts["keep_prompts"] = keeping.all_prompts(
                keeping.read_kept(config.keep_prompts)
            )
    for key, given in texts.items() if good("text_tokens") else ():
        problems += [
            f"{key}: {problem} (text_tokens = {config.text_tokens})"
            for problem in prompts.prompt_problems(
                pipe.tokenizer, given, config.text_tokens,
                enable_thinking=pipe.text.enable_thinking,
            )
        ]
    return problems


def _check_lora(config: ConfigDict, pipe: Pipeline, *, check_rank: bool) -> None:
    """Raises ValueError for targets that the model lacks, or a rank that no target can use."""
    shapes = transformer_shapes(pipe.denoiser.network)
    targets = lora.parse_targets(config.lora.targets, pipe.lora.targets)
    names = lora.match_targets(shapes, targets)
    flat = trees.flatten(shapes)
    most = max(min(flat[name].shape[-2:]) for name in names)
    if check_rank and config.lora.rank > most:
        raise ValueError(
            f"lora.rank: expected at most {most}, all that the targeted linear layers can express "
            f"(the smaller side of each, of the largest), got {config.lora.rank}"
        )

"""A run's config, checked before weights are read and before its directory is claimed.

Every key has a rule. What follows from several keys, the devices or the files of the models is
checked after that, as far as the values it needs are good ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dopsd_jax.core import sharding
from dopsd_jax.core.checks import noted
from dopsd_jax.data import prompts
from dopsd_jax.data.buckets import make_buckets, parse_buckets
from dopsd_jax.data.datasets import parse_data
from dopsd_jax.data.drafts import Needs
from dopsd_jax.method import contexts, flow, lora, rollout
from dopsd_jax.method.train_step import TEACHERS, TRAINABLE, Method, method_of
from dopsd_jax.models.layers import REMAT_POLICIES
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.families import PUBLISHED
from dopsd_jax.weights.pipeline import (
    DTYPES,
    Pipeline,
    load_pipeline,
    read_vl_config,
    transformer_shapes,
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test (which NaN fails, as every comparison)."""

    words: str
    holds: Callable[[Any], bool]


def one_of(*allowed: str) -> Rule:
    return Rule(f"one of {allowed}", lambda x: x in allowed)


def at_least(low: int) -> Rule:
    return Rule(f"at least {low}", lambda x: low <= x < math.inf)


OBJECTIVES = ("dopsd", "sft")
NUM_STEPS = Rule(f"1 to {flow.MAX_STEPS} denoiser calls", lambda x: 1 <= x <= flow.MAX_STEPS)
ANY = Rule("anything", lambda x: True)
PATH = Rule("a path", bool)
POSITIVE = Rule("a number above 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Rule("0 or more", lambda x: 0 <= x < math.inf)
DECAY = Rule("a number in [0, 1)", lambda x: 0 <= x < 1)
TOKENS = Rule("a multiple of 32, above 0", lambda x: x > 0 and x % 32 == 0)
PARTS = Rule("at least 1, or -1 for what is left", lambda x: x >= 1 or x == -1)
TEXT = Rule("a text", lambda x: isinstance(x, str))
TEXTS = Rule("texts", lambda x: all(isinstance(text, str) for text in x))

RULES: dict[str, Rule] = {
    "model": PATH, "published": one_of(*PUBLISHED), "vlm": PATH,
    "data": PATH, "data_weights": TEXT, "data_root": ANY, "cache": TEXT,
    "encode": one_of("ahead", "online"),
    "resolution": at_least(16), "buckets": ANY, "small_buckets": one_of("error", "repeat"),
    "text_tokens": TOKENS, "teacher_tokens": TOKENS, "truncate_prompts": ANY,
    "objective": one_of(*OBJECTIVES), "states": one_of(*rollout.STATES), "base_lora": TEXT,
    "recipe": one_of(*contexts.RECIPES), "trainable": one_of(*TRAINABLE),
    "num_steps": NUM_STEPS, "schedule": one_of(*flow.SCHEDULES), "shift": NOT_NEGATIVE,
    "loss": one_of(*rollout.LOSSES), "teacher": one_of(*TEACHERS),
    "ema_decay": Rule("a number in [0, 1]", lambda x: 0 <= x <= 1),
    "teacher_words": TEXT,
    "vlm_rope_theta": NOT_NEGATIVE, "vlm_min_pixels": at_least(1), "vlm_max_pixels": at_least(1),
    "double_template": ANY,
    "lora.rank": at_least(1), "lora.alpha": POSITIVE, "lora.targets": ANY,
    "num_train_steps": at_least(1), "batch_size": at_least(1), "accumulation": at_least(1),
    "learning_rate": POSITIVE, "warmup_steps": at_least(0), "b1": DECAY, "b2": DECAY,
    "eps": POSITIVE, "weight_decay": NOT_NEGATIVE, "max_grad_norm": POSITIVE,
    "moments_dtype": one_of("float32", "bfloat16"), "ema_dtype": one_of("float32", "bfloat16"),
    "seed": Rule("a whole number in [0, 2^32)", lambda x: 0 <= x < 2**32),
    "dtype": one_of(*DTYPES), "vae_dtype": one_of(*DTYPES), "remat": one_of(*REMAT_POLICIES),
    "mesh.data": PARTS, "mesh.fsdp": PARTS, "mesh.tensor": PARTS,
    "log_every": at_least(1), "sample_every": at_least(0), "sample_steps": NUM_STEPS,
    "sample_rows": at_least(1), "sample_prompts": TEXTS, "gauge_prompts": TEXTS,
    "preflight": one_of("on", "off"), "checkpoint_every": at_least(1),
    "keep_checkpoints": at_least(1),
}


def needs_teacher(config: ConfigDict) -> bool:
    """Whether a run has a teacher that sees more than the student."""
    return config.objective == "dopsd"


def needs_vlm(config: ConfigDict) -> bool:
    """Whether a run's teacher looks through Qwen3-VL."""
    return needs_teacher(config) and contexts.RECIPES[config.recipe].vlm


def needs_targets(config: ConfigDict) -> bool:
    """Whether a run's objective reads the target images themselves."""
    return config.objective == "sft" or config.states == "noised"


def needs_of_rows(config: ConfigDict) -> Needs:
    """What a run reads of every row: its recipe's needs, and the target of an objective."""
    needs = contexts.RECIPES[config.recipe].needs
    fewest, most = needs.images
    return dataclasses.replace(needs, images=(max(fewest, int(needs_targets(config))), most))


def roles(config: ConfigDict) -> tuple[str, ...]:
    """Who sees anything in a run."""
    return (contexts.STUDENT, contexts.TEACHER)[: 1 + needs_teacher(config)]


def needs_latents(config: ConfigDict) -> bool:
    """Whether images are encoded, as targets or as references."""
    recipe = contexts.RECIPES[config.recipe]
    return needs_targets(config) or any(recipe.shown(role, 1) for role in roles(config))


def check_config(config: ConfigDict) -> Method:
    """The method of a config whose every value was found possible.

    Opens the models' configs and the tokenizer, but reads no weights and writes nothing.

    Raises:
        ValueError: Every missing or impossible value, together.
    """
    values = workdir_lib.flat_config(config.to_dict())
    wrong = _break_rules(values)
    looks = {"objective", "recipe"} <= values.keys() - wrong.keys() and needs_vlm(config)
    if not looks:
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
    if good("base_lora", "trainable") and config.base_lora:
        if config.trainable != "lora":
            problems.append("base_lora: expected nothing with trainable = full, which has no base")
        elif not Path(config.base_lora).is_file():
            problems.append(f"base_lora: expected a LoRA file, found none at {config.base_lora}")
    if good("data", "data_weights"):
        with noted(problems):
            parse_data(config.data, config.data_weights)
    if good("encode", "cache") and config.encode == "online" and config.cache:
        problems.append("encode: expected ahead with a cache, which holds all that is encoded")
    if good("schedule", "num_steps", "shift"):
        with noted(problems):
            flow.make_sigmas(config.schedule, config.num_steps, config.shift or 1.0)
    if good("batch_size", "mesh.data", "mesh.fsdp", "mesh.tensor"):
        with noted(problems):
            _check_mesh(config, config.accumulation if good("accumulation") else 1)
    if looks and good("vlm"):
        with noted(problems, "vlm"):
            read_vl_config(config.vlm)
    if good("model"):
        with noted(problems, "model"):
            pipe = load_pipeline(config.model, parts=())
            problems += _break_model(config, pipe, good)
    if problems:
        raise ValueError("config:\n  " + "\n  ".join(problems))
    return method_of(config)


def check_values(config: ConfigDict, besides: Collection[str] = ()) -> None:
    """Raises ValueError unless every value is possible by itself, but for those of some keys."""
    wrong = _break_rules(workdir_lib.flat_config(config.to_dict()))
    if problems := [words for key, words in wrong.items() if key not in besides]:
        raise ValueError("config:\n  " + "\n  ".join(problems))


def _break_rules(values: dict[str, Any]) -> dict[str, str]:
    """Key -> what is wrong with its value alone."""
    wrong = {}
    for key, rule in RULES.items():
        if key not in values:
            wrong[key] = f"{key}: missing; start from configs.common.base()"
        elif not rule.holds(values[key]):
            got = repr(values[key]) if values[key] != "" else f"nothing (--config.{key}=..)"
            wrong[key] = f"{key}: expected {rule.words}, got {got}"
    return wrong


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
    """What does not fit the model, by its configs and tokenizer alone."""
    problems: list[str] = []
    if good("trainable", "lora.targets") and config.trainable == "lora":
        with noted(problems):
            shapes = transformer_shapes(pipe.denoiser.network)
            lora.match_targets(shapes, lora.parse_targets(config.lora.targets, pipe.lora.targets))
    if good("recipe", "objective"):
        with noted(problems, "recipe"):
            contexts.check_recipe(config.recipe, pipe, roles(config))
        for key in ("text_tokens", "teacher_tokens")[: len(roles(config))]:
            if good(key):
                with noted(problems, key):
                    contexts.check_length(pipe.text, config[key])
    if good("text_tokens", "teacher_tokens", "resolution", "buckets"):
        with noted(problems):
            buckets = (
                parse_buckets(config.buckets) if config.buckets
                else make_buckets(config.resolution)
            )
            # Of each the longest; how long the texts are in fact is not known yet.
            sizes = [pipe.denoiser.latent_shape(b.height, b.width) for b in buckets]
            pipe.denoiser.network.check_sizes(
                max(h for h, _, _ in sizes), max(w for _, w, _ in sizes),
                max(config.text_tokens, config.teacher_tokens),
            )
    for key in ("sample_prompts", "gauge_prompts"):
        if good(key, "text_tokens"):
            problems += [
                f"{key}: {problem} (text_tokens = {config.text_tokens})"
                for problem in prompts.prompt_problems(
                    pipe.tokenizer, config[key], config.text_tokens,
                    enable_thinking=pipe.text.enable_thinking,
                )
            ]
    return problems

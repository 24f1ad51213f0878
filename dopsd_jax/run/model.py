"""The model of a run or a command: a directory, and files that stand in for some of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from absl import flags

from dopsd_jax.models.quantization import AS_DTYPE, BASE_DTYPES, ENCODER_DTYPES
from dopsd_jax.weights import fingerprints, one_file
from dopsd_jax.weights.pipeline import (
    Pipeline,
    find_directory,
    load_pipeline,
)

# Key of a config, or flag of a command -> what the file holds.
FILES = {
    "transformer_file": "transformer, in place of that of --model",
    "vae_file": "VAE, in place of that of --model",
    "text_encoder_file": "text encoder, in place of that of --model",
}


def define_flags(*names: str) -> None:
    """Flags of a command that reads a model, some of FILES or all."""
    for name in names or FILES:
        flags.DEFINE_string(name, "", f"A .safetensors file, as ComfyUI keeps it: {FILES[name]}.")


def define_dtype_flags() -> None:
    """Flags of a command that draws: in which dtypes weights may be kept to save memory, and
    whether those that are made are kept."""
    for name, choices, what in (("base_dtype", BASE_DTYPES, "transformer"),
                                ("encoder_dtype", ENCODER_DTYPES, "text encoder")):
        flags.DEFINE_enum(name, AS_DTYPE, choices, f"In which the layers of the {what} are "
                          f"kept: {AS_DTYPE} is as --dtype, the others are quantised.")
    flags.DEFINE_bool("cache_quantised", False, "Keep what was quantised in .quantised/ in the "
                      "model's directory, for the next start.")


def dtypes_given(given: Mapping[str, Any]) -> dict[str, str]:
    """The dtypes of `define_dtype_flags` in a command's flags, as options of `load_pipeline`.

    Raises:
        ValueError: A cache is asked for, and nothing to keep in it.
    """
    dtypes = {name: given[name].value for name in ("base_dtype", "encoder_dtype")}
    if given["cache_quantised"].value and set(dtypes.values()) == {AS_DTYPE}:
        raise ValueError("--cache_quantised: expected a quantised --base_dtype or --encoder_dtype "
                         f"with it, got {AS_DTYPE} for both")
    return dtypes


def files_of(config: Mapping[str, Any] | Any) -> dict[str, str]:
    """A config's files, as `load_pipeline` takes them; runs of earlier versions have no such keys.

    Args:
        config: Of a run, as a ConfigDict or read back from its config.json.
    """
    return {name: config.get(name, "") for name in FILES}


def load_model(config: Mapping[str, Any] | Any, **options) -> Pipeline:
    """The model of a config; options as of `load_pipeline`."""
    return load_pipeline(config["model"], **files_of(config), **options)


def fingerprint(config: Mapping[str, Any] | Any, parts: tuple[str, ...] = (), **options) -> str:
    """What identifies the model of a config, or some of its parts, by content; options as of
    `fingerprints.fingerprint`.

    Raises:
        ValueError: No such directory or file.
    """
    files = one_file.by_part(**files_of(config))
    return fingerprints.fingerprint(find_directory(config["model"], files), parts, files, **options)

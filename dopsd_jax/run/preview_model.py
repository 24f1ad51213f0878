"""The other model of a run's previews: what is learned on one model, drawn on a sibling of it.

Who trains on a model that is not step-distilled mostly uses the LoRA on the distilled one. That
one's transformer is loaded beside the run's own; VAE and text encoder are the run's, so they must
be the same.
"""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh
from ml_collections import ConfigDict

from dopsd_jax.core import trees
from dopsd_jax.core.checks import noted
from dopsd_jax.core.log import log
from dopsd_jax.run import model
from dopsd_jax.weights.pipeline import Pipeline, load_pipeline

SHARED = {"vae": "VAE", "text_encoder": "text encoder"}  # folder -> in words


def check_sibling(config: ConfigDict, pipe: Pipeline) -> None:
    """Refuses a preview_model that draws in another way than by another transformer.

    Reads configs and tokenizers alone; weights are for `check_weights`.

    Args:
        config: Of a run, with a preview_model.
        pipe: The run's own model, with or without weights.

    Raises:
        ValueError: No such model, full fine-tuning, which has no LoRA to move, or all in which the
            two differ.
    """
    if config.trainable != "lora":
        raise ValueError(f"expected none with trainable = {config.trainable}, which has no LoRA "
                         "to draw with on another model")
    other = load_pipeline(config.preview_model, parts=())
    if other.family is not pipe.family:
        raise ValueError(f"expected a {pipe.family.pipeline} as config.model, got a "
                         f"{other.family.pipeline}")
    problems: list[str] = []
    configs = [dataclasses.asdict(p.denoiser.network.config) for p in (pipe, other)]
    if different := [k for k in configs[0] if configs[0][k] != configs[1][k]]:
        problems.append("another transformer: " + ", ".join(
            f"{k} {configs[1][k]!r}, config.model has {configs[0][k]!r}" for k in different
        ))
    if pipe.vae.config != other.vae.config:
        problems.append("another VAE, by its config.json")
    if (pipe.text, pipe.text_encoder.config) != (other.text, other.text_encoder.config):
        problems.append("another text encoder, by its config.json")
    if _as_text(pipe.tokenizer) != _as_text(other.tokenizer):
        problems.append("another tokenizer or chat template")
    if problems:
        raise ValueError(_differs(config.preview_model, problems))


def check_weights(config: ConfigDict) -> None:
    """Raises ValueError unless the VAE and the text encoder of both models are the same.

    By size, header and evenly spread blocks of their files, see `weights.pipeline.fingerprint`.
    """
    models = config, {"model": config.preview_model}
    problems: list[str] = []
    for folder, words in SHARED.items():
        with noted(problems):
            first, second = (model.fingerprint(m, (folder,), kinds=(".safetensors",))
                             for m in models)
            if first != second:
                problems.append(f"another {words}, by the weights in {folder}/")
    if problems:
        raise ValueError(f"preview_model: {_differs(config.preview_model, problems)}")


def load(config: ConfigDict, pipe: Pipeline, mesh: Mesh) -> Pipeline:
    """The preview_model with its own transformer and everything else of the run's `pipe`."""
    other = load_pipeline(
        config.preview_model, dtype=config.dtype, parts=("transformer",), mesh=mesh,
        base_dtype=config.base_dtype, cache_quantised=config.cache_quantised,
    )
    log.info("preview_model %s: its transformer stays in memory beside the run's, %.2f GB over "
             "all devices", config.preview_model, trees.num_bytes(other.params) / 1e9)
    return dataclasses.replace(
        pipe, params=other.params, shift=other.shift, distilled=other.distilled,
        directory=other.directory,
    )


def _as_text(tokenizer) -> tuple[str, str]:
    return tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template)


def _differs(name: str, problems: list[str]) -> str:
    return (
        f"{name} draws on what this run encodes and decodes, so all but the transformer's weights "
        "must be the same as in config.model; it has " + "; ".join(problems)
    )

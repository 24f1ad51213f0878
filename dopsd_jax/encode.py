"""Command: image-text rows -> contexts and latents on disk, so that training loads no encoder.

    python -m dopsd_jax.encode --config configs/z_image_turbo_lora.py --config.model=DIR \
        --config.vlm=DIR --config.data=DATA --config.cache=CACHE

and then train with the same --config.cache. Only what is not in the cache yet is encoded: after a
change of data, prompts, settings or weights, run it again. Several datasets may share a cache.
"""

from __future__ import annotations

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from dopsd_jax.core import cli, distributed, memory, mirror, sharding
from dopsd_jax.core.log import log
from dopsd_jax.data.cache import Cache, CacheWriter
from dopsd_jax.data.datasets import read_data
from dopsd_jax.run import data_check
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.caption_check import check_captions
from dopsd_jax.run.config import (
    check_config,
    needs_latents,
    needs_of_rows,
)
from dopsd_jax.run.features import Entries, encode_all, load_encoders
from dopsd_jax.run.model import load_model

FLAGS = flags.FLAGS


def encode(config: ConfigDict) -> tuple[int, int]:
    """Adds to config.cache what it does not hold yet; loads nothing if that is nothing.

    Several processes share the work.

    Returns:
        How many entries this process made, and how many were its share.

    Raises:
        ValueError: Bad config, data or weights; a caption that does not fit.
    """
    if not config.cache:
        raise ValueError("cache: expected a folder or gs://.., got nothing (--config.cache=..)")
    check_config(config)
    if not mirror.is_remote(config.cache):
        try:
            cli.check_directory(config.cache)
        except ValueError as e:
            raise ValueError(f"cache: {e}") from e
    data = read_data(config, needs_of_rows(config))
    data_check.warn(config, data)
    check_captions(config, data)
    wanted = Entries(config, data).all()
    # A process's share does not depend on what others have written meanwhile.
    wanted = wanted[jax.process_index() :: jax.process_count()]
    cache = Cache(config.cache, repair=True)
    missing = [e for e in wanted if e.key not in cache]
    log.info("%s: %d of %d entries are there", config.cache, len(wanted) - len(missing),
             len(wanted))
    if missing:
        writer = CacheWriter(config.cache)
        pipe = load_model(config, dtype=config.dtype, vae_dtype=config.vae_dtype,
                          encoder_dtype=config.encoder_dtype,
                          cache_quantised=config.cache_quantised,
                          parts=("text_encoder", *(["vae"] if needs_latents(config) else [])),
                          encoder_mesh=sharding.own_mesh())
        try:
            encode_all(missing, load_encoders(config, pipe, data), writer.add)
        finally:
            writer.flush()  # what is done is done
        log.info("encoded and written; %s", memory.report())
    distributed.barrier("encoded")
    return len(missing), len(wanted)


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
    distributed.define_flags()


def main() -> None:
    if FLAGS.config is None:
        raise ValueError("--config is needed, such as --config configs/z_image_turbo_lora.py")
    cli.check_kind(FLAGS.config, "configs/z_image_turbo_lora.py", "recipe", "cache")
    distributed.initialize()
    workdir_lib.enable_compilation_cache()
    made, total = encode(FLAGS.config)
    print(f"{made} entries made, {total - made} were there: {FLAGS.config.cache}")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)

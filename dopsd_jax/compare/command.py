"""What the commands of comparisons share: a config, and a directory for everything."""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from dopsd_jax.core import cli
from dopsd_jax.run import workdir as workdir_lib

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The flags; a function, so that importing this module defines none."""
    config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Directory of everything.", required=True)


def begin(example: str, *keys: str) -> tuple[ConfigDict, Path]:
    """The config and the directory, which is made.

    Args:
        example: A config file, for who gave none.
        *keys: That a config of the command has.

    Raises:
        ValueError: No config, one of another command, or a directory that cannot be.
    """
    if FLAGS.config is None:
        raise ValueError(f"--config is needed, such as --config {example}")
    cli.check_kind(FLAGS.config, example, *keys)
    workdir = Path(FLAGS.workdir)
    cli.check_directory(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    workdir_lib.enable_compilation_cache()
    return FLAGS.config, workdir

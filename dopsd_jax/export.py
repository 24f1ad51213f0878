"""Command: a run's checkpoint -> a LoRA file in another tool's format.

    python -m dopsd_jax.export --workdir runs/a --format diffusers --out lora.safetensors
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from dopsd_jax import workdir as workdir_lib
from dopsd_jax.core import cli
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.families import lora_rules_of

FLAGS = flags.FLAGS
FORMATS = lora_files.FORMATS


def export(
    workdir: str, fmt: str, out: str, *, step: int | None = None, role: str = "student",
    overwrite: bool = False,
) -> None:
    """Writes the LoRA of a run.

    Args:
        workdir: A run's directory.
        fmt: "peft" (a directory), "diffusers" or "comfyui" (one .safetensors file).
        out: Where to.
        step: Which checkpoint; None is the latest.
        role: "student" or "teacher".
        overwrite: Replace a LoRA at `out` that was not written here.

    Raises:
        ValueError: No such run, checkpoint or format, or a place that cannot be written.
    """
    if fmt not in FORMATS:
        raise ValueError(f"format: expected one of {sorted(FORMATS)}, got {fmt!r}")
    cli.check_directory(Path(out).parent)
    tree, spec = workdir_lib.read_lora(workdir, step=step, role=role)
    FORMATS[fmt](out, tree, spec, lora_rules_of(tree).modules, overwrite=overwrite)


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    flags.DEFINE_enum("format", None, sorted(FORMATS), "Whose format.", required=True)
    flags.DEFINE_string("out", None, "A .safetensors file; for peft a directory.", required=True)
    flags.DEFINE_integer("step", None, "Which checkpoint; default: the latest.")
    flags.DEFINE_enum("role", "student", ["student", "teacher"], "Whose weights.")
    flags.DEFINE_bool("overwrite", False, "Replace a LoRA at --out that was not written here.")


def main() -> None:
    export(FLAGS.workdir, FLAGS.format, FLAGS.out, step=FLAGS.step, role=FLAGS.role,
           overwrite=FLAGS.overwrite)
    print(f"wrote {FLAGS.out} ({FLAGS.format})")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)

"""Command: a run's checkpoint -> a LoRA file, or all weights, in another tool's format.

    python -m dopsd_jax.export --workdir runs/a --format diffusers --out lora.safetensors
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from dopsd_jax.core import cli, mirror
from dopsd_jax.core.trees import Tree
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.families import example, family_of_tree, transformer_table
from dopsd_jax.weights.names import Modules
from dopsd_jax.weights.pipeline import load_pipeline, read_config
from dopsd_jax.weights.save import write_component
from dopsd_jax.weights.shipped import pipeline_directory

FLAGS = flags.FLAGS
FORMATS = lora_files.FORMATS


def export(
    workdir: str, fmt: str, out: str, *, step: int | None = None, role: str = "student",
    overwrite: bool = False,
) -> None:
    """Writes the LoRA of a run, or, of one that trains everything, its transformer.

    Args:
        workdir: A run's directory.
        fmt: "peft" (a directory), "diffusers" or "comfyui" (one .safetensors file); of a
            transformer "diffusers", a directory to put in place of the model's transformer/.
        out: Where to.
        step: Which checkpoint; None is the latest.
        role: "student" or "teacher".
        overwrite: Replace what is at `out` and was not written here.

    Raises:
        ValueError: No such run, checkpoint or format, or a place that cannot be written.
    """
    if fmt not in FORMATS:
        raise ValueError(f"format: expected one of {sorted(FORMATS)}, got {fmt!r}")
    cli.check_directory(Path(out).parent)
    workdir = mirror.local_copy(workdir)
    config = workdir_lib.read_config(workdir)
    if config["trainable"] == "full":
        _export_full(workdir, fmt, out, step, role, overwrite)
        return
    tree, spec = workdir_lib.read_lora(workdir, step=step, role=role)
    FORMATS[fmt](out, tree, spec, _modules(config["model"], tree), overwrite=overwrite)


def _modules(model: str, tree: Tree) -> Modules:
    """What files call the linear layers of a LoRA: a network's config may stand in the names.

    A run can be exported without its model; the names are then those of the published one.
    """
    family = family_of_tree(tree)
    file = pipeline_directory(model) / "transformer" / "config.json"
    config = read_config(file, family.config.from_json) if file.is_file() else example(family)
    return family.modules(config)


def _export_full(
    workdir: str | Path, fmt: str, out: str, step: int | None, role: str, overwrite: bool
) -> None:
    if fmt != "diffusers":
        raise ValueError(
            f"format: expected diffusers for a run with trainable=full, got {fmt!r}"
        )
    tree, model = workdir_lib.read_full(workdir, step=step, role=role)
    pipe = load_pipeline(model, parts=())
    write_component(
        out, pipe.directory / "transformer", transformer_table(pipe.denoiser), tree,
        overwrite=overwrite,
    )


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    flags.DEFINE_enum("format", None, sorted(FORMATS), "The tool whose format is written.",
                      required=True)
    flags.DEFINE_string("out", None, "A .safetensors file; for peft and full weights a "
                        "directory.", required=True)
    flags.DEFINE_integer("step", None, "Which checkpoint; default: the latest.")
    flags.DEFINE_enum("role", "student", ["student", "teacher"], "Which network's weights.")
    flags.DEFINE_bool("overwrite", False, "Replace what is at --out and was not written here.")


def main() -> None:
    export(FLAGS.workdir, FLAGS.format, FLAGS.out, step=FLAGS.step, role=FLAGS.role,
           overwrite=FLAGS.overwrite)
    print(f"wrote {FLAGS.out} ({FLAGS.format})")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)

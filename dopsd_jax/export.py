"""Command: a run's checkpoint, or several LoRAs -> a LoRA file, or all weights, for other tools.

    python -m dopsd_jax.export --workdir runs/a --format diffusers --out lora.safetensors
    python -m dopsd_jax.export --model DIR --lora runs/a --lora b.safetensors:0.7 \
        --format diffusers --out both.safetensors
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from absl import flags

from dopsd_jax.core import cli, mirror, trees
from dopsd_jax.core.log import log
from dopsd_jax.core.trees import Tree
from dopsd_jax.method import lora as lora_lib
from dopsd_jax.models import adapters
from dopsd_jax.run import loras as loras_lib
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.families import example, family_of_tree, transformer_table
from dopsd_jax.weights.names import Modules
from dopsd_jax.weights.pipeline import Pipeline, load_pipeline, load_transformer, read_config
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
    _check_format(fmt, full=False)
    cli.check_directory(Path(out).parent)
    workdir = mirror.local_copy(workdir)
    config = workdir_lib.read_config(workdir)
    if config["trainable"] == "full":
        _export_full(workdir, fmt, out, step, role, overwrite)
        return
    tree, spec = workdir_lib.read_lora(workdir, step=step, role=role)
    FORMATS[fmt](out, tree, spec, _modules(config["model"], tree), overwrite=overwrite)


def export_loras(
    model: str, loras: list, fmt: str, out: str, *, rank: int | None = None, full: bool = False,
    overwrite: bool = False,
) -> float:
    """Writes several LoRAs of a model, with their strengths, as one, or in the model's weights.

    Args:
        model: Pipeline directory, or mini.
        loras: As `sample.generate` takes them.
        fmt: As of `export`.
        out: Where to.
        rank: Of what is written: the best LoRA of so many ranks; None: exactly what they add up to.
        full: Write the transformer with the LoRAs merged into it, computed in float32 and rounded
            to the dtype of its files, instead of a LoRA; "diffusers" alone.
        overwrite: Replace what is at `out` and was not written here.

    Returns:
        The relative error that `rank` costs; 0 where it costs nothing.

    Raises:
        ValueError: LoRAs that do not fit the model or each other, no such format, or a place that
            cannot be written.
    """
    _check_format(fmt, full)
    if full and rank is not None:
        raise ValueError("rank: expected none with full weights, which have no rank")
    cli.check_directory(Path(out).parent)
    pipe = load_pipeline(model, parts=())
    if full:
        _write_merged(pipe, loras, out, overwrite)
        return 0.0
    # What is reduced may have any rank in between.
    tree = loras_lib.take_trainable(loras, pipe, any_rank=rank is not None)
    kind, cost = adapters.kind_of(tree), 0.0
    if kind != "lora":
        if rank is not None:
            raise ValueError(f"rank: expected none with a {lora_lib.WORDS[kind]}, which is written "
                             "as it is; only LoRAs are reduced to another rank")
        rank = lora_lib.max_rank(tree)
    elif rank is None:
        rank = lora_lib.max_rank(tree)
        tree = lora_lib.padded(tree, rank)
    else:
        tree, cost = lora_lib.reduced(tree, rank)
    spec = lora_files.LoraSpec(rank, float(rank), str(model))
    FORMATS[fmt](out, tree, spec, pipe.lora.modules, overwrite=overwrite)
    return cost


def _write_merged(pipe: Pipeline, loras: list, out: str, overwrite: bool) -> None:
    """The pipeline's transformer with LoRAs in it, in the dtype of its files."""
    loras_lib.take_loras(loras, pipe, any_rank=True)  # what is wrong is said before weights load
    with jax.default_device(jax.devices("cpu")[0]):
        params = load_transformer(pipe.directory)
        tree = loras_lib.take_loras(loras, pipe, any_rank=True, params=params)
        merged = jax.tree.map(np.asarray, lora_lib.merge(params, tree, 1.0))
        changed, error = lora_lib.rounding(params, merged, tree)
    dtype = next(x.dtype for n, x in trees.flatten(merged).items() if n.endswith("/kernel"))
    log.info("merged in %s: %.1f%% of the elements of adapted layers changed; what was added is "
             "off by %.2g of it, which as a LoRA it would not be", dtype, 100 * changed, error)
    write_component(
        out, pipe.directory / "transformer", transformer_table(pipe.denoiser), merged,
        overwrite=overwrite,
    )


def _check_format(fmt: str, full: bool) -> None:
    if fmt not in FORMATS:
        raise ValueError(f"format: expected one of {sorted(FORMATS)}, got {fmt!r}")
    if full and fmt != "diffusers":
        raise ValueError(f"format: expected diffusers for full weights, got {fmt!r}")


def _modules(model: str, tree: Tree) -> Modules:
    """What files call the linear layers of a LoRA: a network's config may stand in the names.

    A run can be exported without its model; the names are then those of the published one.
    """
    family = family_of_tree(tree)
    file = pipeline_directory(model, weights=False) / "transformer" / "config.json"
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
    flags.DEFINE_string("workdir", None, "Directory of the run, where one is exported.")
    flags.DEFINE_multi_string("lora", None, "In place of --workdir: a run, LoRA file or PEFT "
                              "directory, with :STRENGTH behind it if not 1; several add up.")
    flags.DEFINE_string("model", None, "Pipeline directory that the LoRAs belong to, or mini.")
    flags.DEFINE_integer("rank", None, "Of the LoRA that several become; default: what they add "
                         "up to, exactly.", lower_bound=1)
    flags.DEFINE_bool("full", False, "Write the model's transformer with the LoRAs merged into it.")
    flags.DEFINE_enum("format", None, sorted(FORMATS), "The tool whose format is written.",
                      required=True)
    flags.DEFINE_string("out", None, "A .safetensors file; for peft and full weights a "
                        "directory.", required=True)
    flags.DEFINE_integer("step", None, "Which checkpoint; default: the latest.")
    flags.DEFINE_enum("role", "student", ["student", "teacher"], "Which network's weights.")
    flags.DEFINE_bool("overwrite", False, "Replace what is at --out and was not written here.")


def _check_flags() -> None:
    """Raises ValueError for flags of the one kind of export beside the other."""
    if bool(FLAGS.workdir) == bool(FLAGS.lora):
        raise ValueError("expected either --workdir or --lora")
    if FLAGS.lora and not FLAGS.model:
        raise ValueError("--lora: expected --model too, the pipeline that the LoRAs belong to")
    only = ("step", "role") if FLAGS.lora else ("model", "rank", "full")
    wrong = [f"--{name}" for name in only if FLAGS[name].present]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: expected only with {'--workdir' if FLAGS.lora else '--lora'}"
        )


def main() -> None:
    _check_flags()
    if FLAGS.lora:
        members = [loras_lib.parse(text) for text in FLAGS.lora]
        cost = export_loras(FLAGS.model, members, FLAGS.format, FLAGS.out, rank=FLAGS.rank,
                            full=FLAGS.full, overwrite=FLAGS.overwrite)
        if FLAGS.rank is not None:
            log.info("rank %d keeps all but %.2g of what the LoRAs change (Frobenius norms)",
                     FLAGS.rank, cost)
    else:
        export(FLAGS.workdir, FLAGS.format, FLAGS.out, step=FLAGS.step, role=FLAGS.role,
               overwrite=FLAGS.overwrite)
    print(f"wrote {FLAGS.out} ({FLAGS.format})")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)

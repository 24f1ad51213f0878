"""Command: a run's checkpoint, or several LoRAs -> a LoRA file, or all weights, for other tools.

    python -m dopsd_jax.export --workdir runs/a --format diffusers --out lora.safetensors
    python -m dopsd_jax.export --model DIR --lora runs/a --lora b.safetensors:0.7 \
        --format diffusers --out both.safetensors
    python -m dopsd_jax.export --workdir runs/a --format diffusers --out style/style.safetensors \
        --push OWNER/NAME

A model card, README.md and its pictures, is written beside it; --push sends both to the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from dopsd_jax.core import cli, mirror, trees
from dopsd_jax.core.log import log
from dopsd_jax.core.trees import Tree
from dopsd_jax.method import lora as lora_lib
from dopsd_jax.models import adapters
from dopsd_jax.models.family import Family
from dopsd_jax.run import card
from dopsd_jax.run import loras as loras_lib
from dopsd_jax.run import model as model_lib
from dopsd_jax.run import story as story_lib
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.model import load_model
from dopsd_jax.run.story import Story, Told
from dopsd_jax.weights import hub, lora_files
from dopsd_jax.weights.families import example, family_of_tree, find, transformer_table
from dopsd_jax.weights.names import Modules
from dopsd_jax.weights.pipeline import (
    Pipeline,
    load_pipeline,
    load_transformer,
    read_config,
    transformer_dtypes,
)
from dopsd_jax.weights.save import write_component
from dopsd_jax.weights.shapes import transformer_shapes
from dopsd_jax.weights.shipped import pipeline_directory

FLAGS = flags.FLAGS
FORMATS = lora_files.FORMATS
TOLD = Told()
IN_MEMORY = "a LoRA"  # the name of one that is given as a tree


def export(
    workdir: str, fmt: str, out: str, *, step: int | None = None, role: str = "student",
    overwrite: bool = False, told: Told = TOLD, with_card: bool = True,
) -> None:
    """Writes the LoRA of a run, or, of one that trains everything, its transformer, and a card.

    Args:
        workdir: A run's directory.
        fmt: "peft" (a directory), or "diffusers", "comfyui", "comfyui_fused" (one .safetensors
            file); of a transformer "diffusers", a directory to put in place of the model's
            transformer/.
        out: Where to.
        step: Which checkpoint; None is the latest.
        role: "student" or "teacher".
        overwrite: Replace what is at `out` and was not written here.
        told: What the user says of it, for the card.
        with_card: Write the model card; a README.md of another origin stays.

    Raises:
        ValueError: No such run, checkpoint or format, or a place that cannot be written.
    """
    _check_format(fmt, full=False)
    cli.check_directory(Path(out).parent)
    workdir = mirror.local_copy(workdir)
    config = workdir_lib.read_config(workdir)
    if config["trainable"] == "full":
        if fmt != "diffusers":
            raise ValueError(
                f"format: expected diffusers for a run with trainable=full, got {fmt!r}"
            )
        tree = workdir_lib.read_full(workdir, step=step, role=role)
        pipe = load_model(config, parts=())
        workdir_lib.check_same_model(tree, transformer_shapes(pipe.denoiser.network), workdir)
        write_component(
            out, pipe.directory / "transformer" / "config.json", transformer_table(pipe.denoiser),
            tree, dtypes=transformer_dtypes(pipe), overwrite=overwrite,
        )
        family, network = find(pipe.denoiser.network.config), pipe.denoiser.network.config
        spec, kind = None, "lora"
    else:
        tree, spec = workdir_lib.read_lora(workdir, step=step, role=role)
        family, network = _network(config["model"], tree)
        kind = adapters.kind_of(tree)
    size = story_lib.size_of(family, network)
    story = story_lib.of_run(Path(workdir), config, family, size, told, spec, step, role,
                             kind)
    if spec is not None:
        modules = family.modules(network or example(family))
        _write_lora(fmt, out, tree, story, modules, overwrite)
    if with_card:
        _write_card(out, fmt, story)


def _write_lora(
    fmt: str, out: str, tree: Tree, story: Story, modules: Modules, overwrite: bool
) -> None:
    header = story_lib.header(story, Path(out).stem, fmt)
    FORMATS[fmt](out, tree, story.spec, modules, overwrite=overwrite, about=header)


def _write_card(out: str, fmt: str, story: Story) -> None:
    folder = card.folder_of(out, fmt, full=story.spec is None)
    card.write(folder, Path(out).name, fmt, story)


def export_loras(
    model: str, loras: list, fmt: str, out: str, *, rank: int | None = None, full: bool = False,
    overwrite: bool = False, told: Told = TOLD, with_card: bool = True,
    transformer_file: str = "",
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
        told, with_card: As of `export`.
        transformer_file: See `load_pipeline`.

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
    pipe = load_pipeline(model, parts=(), transformer_file=transformer_file)
    cost, spec, kind = 0.0, None, "lora"
    named = [_named(member) for member in loras]
    on_disk = [n.path for n in named if n.path != IN_MEMORY]
    kept_as = loras_lib.base_dtypes(on_disk)
    if full:
        _write_merged(pipe, loras, out, overwrite, kept_as)
    else:
        tree, spec, cost = _summed(loras, pipe, rank)
        kind = adapters.kind_of(tree)
    network = pipe.denoiser.network.config
    family = find(network)
    size = story_lib.size_of(family, network)
    story = story_lib.of_loras(str(model), named, family, size, told, spec, kind,
                               tuple(dict.fromkeys(kept_as.values())))
    if not full:
        _write_lora(fmt, out, tree, story, pipe.lora.modules, overwrite)
    if with_card:
        _write_card(out, fmt, story)
    return cost


def _named(member: Any) -> loras_lib.Named:
    """A LoRA as `export_loras` takes it, by name."""
    strength = 1.0
    if isinstance(member, tuple) and isinstance(member[0], str | Path | tuple):
        member, strength = member
    return loras_lib.Named(str(member) if isinstance(member, str | Path) else IN_MEMORY, strength)


def _summed(
    loras: list, pipe: Pipeline, rank: int | None
) -> tuple[Tree, lora_files.LoraSpec, float]:
    """What LoRAs add up to, as it is written, and the error that `rank` costs."""
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
    return tree, lora_files.LoraSpec(rank, float(rank)), cost


def _write_merged(
    pipe: Pipeline, loras: list, out: str, overwrite: bool, kept_as: dict[str, str]
) -> None:
    """The pipeline's transformer with LoRAs in it, in the dtype of its files.

    `kept_as` names those that were trained on quantised weights, see `loras.base_dtypes`.
    """
    loras_lib.take_loras(loras, pipe, any_rank=True)  # what is wrong is said before weights load
    with jax.default_device(jax.devices("cpu")[0]):
        params = load_transformer(pipe)
        tree = loras_lib.take_loras(loras, pipe, any_rank=True, params=params)
        merged = jax.tree.map(np.asarray, lora_lib.merge(params, tree, 1.0))
        changed, error = lora_lib.rounding(params, merged, tree)
    dtype = next(x.dtype for n, x in trees.flatten(merged).items() if n.endswith("/kernel"))
    source = pipe.files.get("transformer", pipe.directory).name
    for name, kind in kept_as.items():
        log.warning("%s: was trained on weights in %s, and is merged into those of %s, in %s",
                    name, kind, source, dtype)
    log.info("merged in %s: %.1f%% of the elements of adapted layers changed; what was added is "
             "off by %.2g of it, which as a LoRA it would not be", dtype, 100 * changed, error)
    write_component(
        out, pipe.directory / "transformer" / "config.json", transformer_table(pipe.denoiser),
        merged, overwrite=overwrite,
    )


def _check_format(fmt: str, full: bool) -> None:
    if fmt not in FORMATS:
        raise ValueError(f"format: expected one of {sorted(FORMATS)}, got {fmt!r}")
    if full and fmt != "diffusers":
        raise ValueError(f"format: expected diffusers for full weights, got {fmt!r}")


def _network(model: str, tree: Tree) -> tuple[Family, Any]:
    """The family of a LoRA, and the config of its network, which stands in the names of files.

    A run can be exported without its model: then the config is None.
    """
    family = family_of_tree(tree)
    file = pipeline_directory(model, weights=False) / "transformer" / "config.json"
    return family, read_config(file, family.config.from_json) if file.is_file() else None


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    flags.DEFINE_string("workdir", None, "Directory of the run, where one is exported.")
    flags.DEFINE_multi_string("lora", None, "In place of --workdir: a run, LoRA file or PEFT "
                              "directory, with :STRENGTH behind it if not 1; several add up.")
    flags.DEFINE_string("model", None, "Pipeline directory that the LoRAs belong to, or mini.")
    model_lib.define_flags("transformer_file")
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
    flags.DEFINE_bool("card", True, "Write a model card, README.md and images/, beside it.")
    flags.DEFINE_string("base_model", "", "For the card: the model's name on the hub, where its "
                        "directory does not tell.")
    flags.DEFINE_string("license", "", "For the card: the hub's id of a license, as apache-2.0.")
    flags.DEFINE_string("trigger", "", "For the card: words that call up what was learned.")
    flags.DEFINE_string("push", "", "Send it and its card to this place on the hub, OWNER/NAME.")
    flags.DEFINE_bool("private", False, "With --push: make that place a private one.")


def _check_flags() -> None:
    """Raises ValueError for flags of the one kind of export beside the other."""
    if bool(FLAGS.workdir) == bool(FLAGS.lora):
        raise ValueError("expected either --workdir or --lora")
    if FLAGS.lora and not FLAGS.model:
        raise ValueError("--lora: expected --model too, the pipeline that the LoRAs belong to")
    only = ("step", "role") if FLAGS.lora else ("model", "rank", "full", "transformer_file")
    wrong = [f"--{name}" for name in only if FLAGS[name].present]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: expected only with {'--workdir' if FLAGS.lora else '--lora'}"
        )


def _check_push(folder: Path) -> None:
    """Raises ValueError for what would keep a finished export from being sent."""
    if FLAGS.private and not FLAGS.push:
        raise ValueError("--private: expected only with --push")
    if not FLAGS.push:
        return
    if not FLAGS.card:
        raise ValueError("--nocard: expected a card with --push, which belongs to it")
    hub.check_push(FLAGS.push)
    card.check_place(folder, Path(FLAGS.out).name)


def _push(folder: Path) -> str:
    """Sends what was written, and returns its address."""
    out = Path(FLAGS.out)
    weights = [out.name] if out.is_file() else sorted(
        p.name for p in out.iterdir() if p.suffix in (".json", ".safetensors"))
    return hub.push(
        FLAGS.push, folder, [*weights, *card.files_of(folder)], private=FLAGS.private
    )


def main() -> None:
    _check_flags()
    told = Told(FLAGS.base_model, FLAGS.license, FLAGS.trigger, FLAGS.push)
    story_lib.check_told(told)
    full = FLAGS.full if FLAGS.lora else Path(FLAGS.out).suffix != ".safetensors"
    folder = card.folder_of(FLAGS.out, FLAGS.format, full=full)
    _check_push(folder)
    more = {"overwrite": FLAGS.overwrite, "told": told, "with_card": FLAGS.card}
    if FLAGS.lora:
        members = [loras_lib.parse(text) for text in FLAGS.lora]
        cost = export_loras(FLAGS.model, members, FLAGS.format, FLAGS.out, rank=FLAGS.rank,
                            full=FLAGS.full, transformer_file=FLAGS.transformer_file, **more)
        if FLAGS.rank is not None:
            log.info("rank %d keeps all but %.2g of what the LoRAs change (Frobenius norms)",
                     FLAGS.rank, cost)
    else:
        export(FLAGS.workdir, FLAGS.format, FLAGS.out, step=FLAGS.step, role=FLAGS.role, **more)
    print(f"wrote {FLAGS.out} ({FLAGS.format})")
    if FLAGS.push:
        print(f"sent to {_push(folder)}")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)

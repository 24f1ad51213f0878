"""Command: trained stages -> the files of the mini model that come with the package.

    python -m dopsd_jax.mini.ship --turbo runs/mini/turbo --out dopsd_jax/assets

Writes <out>/mini (a pipeline as Z-Image-Turbo's), <out>/mini_qwen3_vl and
<out>/mini_undistilled.safetensors, all in bfloat16. The last is a LoRA: with it the distilled
transformer is the undistilled one again.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags
from safetensors import safe_open
from safetensors.numpy import save_file

from dopsd_jax.core import cli
from dopsd_jax.mini.model import PIPELINE, VLM
from dopsd_jax.mini.turbo_stage import UNDO
from dopsd_jax.weights.load import weight_files
from dopsd_jax.weights.qwen3_names import LANGUAGE
from dopsd_jax.weights.save import read_tensors, write_tensors
from dopsd_jax.weights.shipped import ASSETS, PIPELINES, UNDISTILLED, VISION_LANGUAGE

FLAGS = flags.FLAGS


def round_files(directory: Path, replaced: dict[str, np.ndarray] | None = None) -> None:
    """Rounds every safetensors file below a folder to bfloat16.

    Args:
        directory: Its folders hold the files; each file is replaced atomically.
        replaced: Values that take the place of a file's own, by tensor name.
    """
    for folder in sorted({file.parent for file in directory.rglob("*.safetensors")}):
        contents = {file: read_tensors(file) for file in weight_files(folder)}
        for tensors in contents.values():
            for name, value in tensors.items():
                value = (replaced or {}).get(name, value)
                tensors[name] = np.ascontiguousarray(value, ml_dtypes.bfloat16)
        write_tensors(folder, contents)


def ship(turbo: Path, out: Path) -> list[Path]:
    """Writes the three; what stands there is replaced.

    Raises:
        ValueError: `turbo` is not the workdir of a finished distillation.
    """
    missing = [name for name in (PIPELINE, VLM, UNDO) if not (turbo / name).exists()]
    if missing:
        raise ValueError(
            f"{turbo}: expected the workdir of a finished step_distillation run, {missing} is not "
            "there; see launch/mini.sh"
        )
    out.mkdir(parents=True, exist_ok=True)
    targets = [out / p.name for p in (PIPELINES["mini"], VISION_LANGUAGE["mini"], UNDISTILLED)]
    partial = Path(tempfile.mkdtemp(prefix=".ship-", dir=out))
    try:
        pipeline, vlm, undo = (partial / target.name for target in targets)
        shutil.copytree(turbo / PIPELINE, pipeline)
        shutil.copytree(turbo / VLM, vlm)
        # So that the directory by itself is whole: its language model is the text encoder.
        text: dict[str, np.ndarray] = {}
        for file in weight_files(pipeline / "text_encoder"):
            text |= read_tensors(file)
        language = {LANGUAGE + name.removeprefix("model."): x for name, x in text.items()}
        round_files(pipeline)
        round_files(vlm, language)
        with safe_open(turbo / UNDO, framework="numpy") as f:
            metadata = f.metadata()
        rounded = {n: x.astype(ml_dtypes.bfloat16) for n, x in read_tensors(turbo / UNDO).items()}
        save_file(rounded, undo, metadata=metadata)
        undo.chmod(0o644)
        for made, target in zip((pipeline, vlm, undo), targets, strict=True):
            if target.is_dir():
                for kept in (*target.glob("*.md"), *target.glob("*.png")):  # the model card
                    shutil.copy2(kept, made / kept.name)
                shutil.rmtree(target)
            made.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return targets


def main() -> None:
    print(*ship(Path(FLAGS.turbo), Path(FLAGS.out)), sep="\n")


if __name__ == "__main__":
    flags.DEFINE_string("turbo", "runs/mini/turbo", "Workdir of the finished last stage.")
    flags.DEFINE_string("out", str(ASSETS), "Parent of what is written.")
    cli.run_command(main)

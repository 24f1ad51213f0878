"""Command: trained stages -> the files of the mini model that come with the package.

    python -m dopsd_jax.mini.ship --turbo runs/mini/turbo --judge runs/mini/judge

Writes <out>/mini (a pipeline as Z-Image-Turbo's), <out>/mini_qwen3_vl and
<out>/mini_undistilled.safetensors, all in bfloat16, and <out>/mini_judge.safetensors as it is. The
third is a LoRA: with it the distilled transformer is the undistilled one again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags
from safetensors import safe_open
from safetensors.numpy import save_file

from dopsd_jax.core import cli
from dopsd_jax.mini import judge as judge_lib
from dopsd_jax.mini.model import PIPELINE, VLM
from dopsd_jax.mini.turbo_stage import UNDO
from dopsd_jax.weights.load import weight_files
from dopsd_jax.weights.qwen3_names import LANGUAGE
from dopsd_jax.weights.save import read_tensors, write_tensors
from dopsd_jax.weights.shipped import ASSETS, JUDGE, PIPELINES, UNDISTILLED, VISION_LANGUAGE

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


def check_finished(workdir: Path, objective: str, products: Sequence[str]) -> None:
    """Raises ValueError unless a run of `objective` has left its products in `workdir`."""
    missing = [name for name in products if not (workdir / name).exists()]
    if missing:
        raise ValueError(
            f"{workdir}: expected the workdir of a finished {objective} run, {missing} is not "
            "there; see launch/mini.sh"
        )


def ship(turbo: Path, judge: Path, out: Path) -> list[Path]:
    """Writes the four; what stands there is replaced.

    Raises:
        ValueError: `turbo` or `judge` is not the workdir of such a finished stage.
    """
    check_finished(turbo, "step_distillation", (PIPELINE, VLM, UNDO))
    check_finished(judge, "judge", (judge_lib.FILE,))
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
        shutil.copy2(judge / judge_lib.FILE, partial)
        (partial / judge_lib.FILE).rename(out / JUDGE.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [*targets, out / JUDGE.name]


def main() -> None:
    print(*ship(Path(FLAGS.turbo), Path(FLAGS.judge), Path(FLAGS.out)), sep="\n")


if __name__ == "__main__":
    flags.DEFINE_string("turbo", "runs/mini/turbo", "Workdir of the finished last stage.")
    flags.DEFINE_string("judge", "runs/mini/judge", "Workdir of the finished judge.")
    flags.DEFINE_string("out", str(ASSETS), "Parent of what is written.")
    cli.run_command(main)

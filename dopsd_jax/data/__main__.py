"""Command: a run's data -> one page and a contact sheet, to look at before a run.

    python -m dopsd_jax.data --config configs/z_image_turbo_lora.py --config.model=DIR \
        --config.vlm=DIR --config.data=DATA --out runs/data

Reads what `train` would read with the same config, and writes <out>/data.html and <out>/data.png:
first what a run refuses and what may be wrong, then every row as it will be cropped, with its
captions and how many tokens they take. Needs the tokenizers of the models, but no weights, no
network and no accelerator.
"""

from __future__ import annotations

import io
from pathlib import Path

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from dopsd_jax.core import cli
from dopsd_jax.core.files import write_atomic, write_whole
from dopsd_jax.run import data_page
from dopsd_jax.run.data_check import inspect

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
    flags.DEFINE_string("out", "runs/data", "Folder of the page and the contact sheet.")
    flags.DEFINE_integer("limit", 1000, "Look at so many rows at most, evenly spread; 0: at all.",
                         lower_bound=0)


def main() -> None:
    if FLAGS.config is None:
        raise ValueError("--config is needed, such as --config configs/z_image_turbo_lora.py")
    cli.check_directory(FLAGS.out)
    jax.config.update("jax_platforms", "cpu")  # a training may have the accelerator
    found = inspect(FLAGS.config, FLAGS.limit)
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    page, sheet = out / "data.html", out / "data.png"
    text, picture = data_page.page(FLAGS.config, found), io.BytesIO()
    data_page.sheet(found).save(picture, "PNG")
    write_atomic(page, text)
    write_whole(epath.Path(sheet), picture.getvalue())
    total = len(found.data.rows) if found.data else 0
    print(*data_page.summary(found), sep="\n", end="\n" if data_page.summary(found) else "")
    print(f"{len(found.rows)} of {total} usable rows looked at")
    print(f"page   {page} ({len(text) / 2**20:.1f} MiB)")
    print(f"sheet  {sheet}")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)

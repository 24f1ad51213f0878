"""Command: a page in the browser to play with LoRAs, base beside tuned from the same noise.

    python -m dopsd_jax.demo --lora runs/a

Prompt, seed, number of steps and the strength of every LoRA can be changed; what is compiled for
the first picture draws all others. The page is served to this machine alone unless --host says
otherwise, and loads and sends nothing beyond it.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dopsd_jax import sample
from dopsd_jax.core import cli
from dopsd_jax.core.checks import noted
from dopsd_jax.core.log import log
from dopsd_jax.run import loras, model
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.pipeline import DTYPES, Pipeline

if TYPE_CHECKING:
    import gradio

FLAGS = flags.FLAGS
MOST_STEPS = 8            # on the slider, of a step-distilled model
MOST_STEPS_GUIDED = 50    # of another
STRONGEST = 2.0
SHOWN = 384               # pixels per side up to which small pictures are enlarged on the page
CSS = """
.pixels img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain; }
footer { display: none !important; }
"""


class Player:
    """A model with LoRAs whose strengths are arguments: draws without compiling anything again.

    Attributes:
        names: What the LoRAs are called.
        height, width: Of all pictures, in pixels.
    """

    def __init__(self, pipe: Pipeline, named: Sequence[loras.Named], height: int, width: int):
        """Reads the LoRAs and puts them on the device.

        Raises:
            ValueError: As `loras.take_loras`, and sizes that the model cannot draw.
        """
        sample.check_request(pipe, ["a"], num_steps=1, height=height, width=width)
        loras.take_loras(list(named), pipe)  # refuses all that do not go together
        self._pipe, self.height, self.width = pipe, height, width
        self.names = [Path(n.path).name for n in named]
        self._trees = [
            jax.tree.map(jnp.asarray, loras.take_loras(n.path, pipe)) for n in named
        ]
        self._one_at_a_time = threading.Lock()
        self._base = functools.lru_cache(maxsize=8)(self._draw_base)

    def draw(
        self, prompt: str, *, seed: int, num_steps: int, strengths: Sequence[float],
        guidance: float = 0.0, negative: str = "",
    ) -> tuple[np.ndarray, np.ndarray]:
        """The picture without and with the LoRAs, from the same noise.

        Args:
            prompt, seed, num_steps, guidance, negative: As for `sample.generate`.
            strengths: Of the LoRAs, in order.

        Returns:
            Two of uint8 [H, W, 3].

        Raises:
            ValueError: As `sample.generate`.
        """
        asked = (prompt, seed, num_steps, guidance, negative)
        with self._one_at_a_time:
            return self._base(*asked), self._draw(strengths, *asked)

    def _draw_base(self, *asked) -> np.ndarray:
        """Kept, so that moving a strength draws one picture; by the program of all others."""
        return self._draw([0.0] * len(self._trees), *asked)

    def _draw(self, strengths: Sequence[float], prompt, seed, num_steps, guidance, negative):
        return sample.generate(
            self._pipe, [prompt], seed=seed, num_steps=num_steps, height=self.height,
            width=self.width, guidance=guidance, negative=negative,
            lora=[((tree, 1.0), s) for tree, s in zip(self._trees, strengths, strict=True)],
        )[0]


def load_gradio():
    """The package, with all that it would send or load switched off.

    Raises:
        ValueError: It is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as e:
        raise ValueError(
            f"the page needs the package gradio ({e}): pip install -e '.[demo]'"
        ) from e
    return gradio


def page(player: Player, strengths: Sequence[float], num_steps: int, guided: bool,
         prompt: str = "") -> gradio.Blocks:
    """The page; it draws as `Player.draw` does.

    Args:
        player: Draws.
        strengths: Of the LoRAs, at first.
        num_steps: At first.
        guided: Whether the model is made for guidance, for which there are fields then.
        prompt: At first.
    """
    gr = load_gradio()

    def draw(prompt, seed, num_steps, guidance, negative, *strengths):
        began = time.monotonic()
        try:
            base, tuned = player.draw(
                prompt, seed=int(seed), num_steps=int(num_steps), strengths=strengths,
                guidance=guidance, negative=negative if guidance else "",
            )
        except (ValueError, TypeError) as e:
            return gr.skip(), gr.skip(), f"**Not drawn:** {e}"
        return base, tuned, f"Drawn in {time.monotonic() - began:.2f} s."

    small = max(player.height, player.width) < SHOWN
    picture = dict(
        type="numpy", format="png", interactive=False, elem_classes=["pixels"] if small else [],
        height=SHOWN if small else None, buttons=["download", "fullscreen"],
    )
    most = max(MOST_STEPS_GUIDED if guided else MOST_STEPS, num_steps)
    with gr.Blocks(title="dopsd_jax", analytics_enabled=False, fill_width=True) as blocks, gr.Row():
        with gr.Column(scale=1, min_width=320):
            text = gr.Textbox(prompt, label="Prompt", max_lines=8, elem_id="prompt")
            button = gr.Button("Draw", variant="primary", elem_id="draw")
            sliders = [
                gr.Slider(-STRONGEST, STRONGEST, value=strength, step=0.05,
                          label=f"Strength of {name}", elem_id=f"strength{i}")
                for i, (name, strength) in enumerate(zip(player.names, strengths, strict=True))
            ]
            steps = gr.Slider(1, most, value=num_steps, step=1, label="Steps", elem_id="steps")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=sample.MAX_SEED,
                             elem_id="seed")
            following = gr.Button("Next seed", elem_id="next")
            scale = gr.Slider(0, 10, value=4 if guided else 0, step=0.5, label="Guidance",
                              elem_id="guidance", visible=guided)
            negative = gr.Textbox(label="Negative prompt", elem_id="negative", visible=guided)
        with gr.Column(scale=3):
            with gr.Row():
                base = gr.Image(label="Base", elem_id="base", **picture)
                tuned = gr.Image(label="With LoRA", elem_id="tuned", **picture)
            told = gr.Markdown("Both from the same noise. The first picture takes longer: its "
                               "program is compiled.", elem_id="told")
        asked = [text, seed, steps, scale, negative, *sliders]
        drawn = [base, tuned, told]
        triggers = [button.click, text.submit, seed.submit, negative.submit,
                    *(slider.release for slider in (steps, scale, *sliders))]
        how = dict(trigger_mode="always_last", api_visibility="private")
        gr.on(triggers, draw, asked, drawn, **how)
        following.click(lambda seed: seed + 1, seed, seed, api_visibility="private").then(
            draw, asked, drawn, **how
        )
    return blocks


def model_of(named: Sequence[loras.Named]) -> dict[str, str]:
    """The model, as `model.load_model` takes it, that the first run among the LoRAs was trained on.

    Raises:
        ValueError: None of them is a run's directory.
    """
    for member in named:
        if workdir_lib.is_workdir(member.path):
            config = workdir_lib.read_config(member.path)
            return {"model": config["model"], **model.files_of(config)}
    raise ValueError(
        "--model: expected the model's directory or name, since none of the LoRAs is a run's "
        f"directory that says it: {', '.join(n.path for n in named)}"
    )


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    flags.DEFINE_multi_string("lora", None, "Workdir of a run, LoRA file, or PEFT directory, with "
                              ":STRENGTH behind it if not 1; several add up.", required=True)
    flags.DEFINE_string("model", None, "Pipeline directory, name on the hub, or mini; default: "
                        "what the first run among the LoRAs was trained on.")
    model.define_flags()
    flags.DEFINE_string("prompt", "", "Prompt at first.")
    flags.DEFINE_integer("num_steps", 4, "Number of denoiser calls at first.", lower_bound=1)
    default = "Pixels, a multiple of 16; default: the model's own."
    flags.DEFINE_integer("height", None, default)
    flags.DEFINE_integer("width", None, default)
    flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "Dtype of transformer and text encoder.")
    model.define_dtype_flags()
    flags.DEFINE_string("host", "127.0.0.1", "Address to serve at; 0.0.0.0: to the whole network, "
                        "to anyone who can reach this machine.")
    flags.DEFINE_integer("port", 7860, "Port to serve at.", lower_bound=0, upper_bound=65535)


def check_address(host: str, port: int) -> None:
    """Raises ValueError where no page can be served at, before weights are read for it."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as e:
        reason = str(e.strerror).partition(" (")[0]
        raise ValueError(
            f"--host {host} --port {port}: no page can be served there ({reason}); take another "
            "port, or 0 for any that is free"
        ) from e


def main() -> None:
    load_gradio()
    check_address(FLAGS.host, FLAGS.port)
    named = [loras.parse(text) for text in FLAGS.lora]
    chosen = {name: FLAGS[name].value for name in ("model", *model.FILES)}
    if not FLAGS.model:
        chosen = model_of(named)
    workdir_lib.enable_compilation_cache()
    pipe = model.load_model(chosen, dtype=FLAGS.dtype, parts=())
    height, width = sample.picture_size(pipe, FLAGS.height, FLAGS.width, [])
    problems: list[str] = []
    with noted(problems):
        loras.take_loras(list(named), pipe)
    with noted(problems):
        sample.check_request(pipe, ["a"], num_steps=FLAGS.num_steps, height=height, width=width)
    if problems:
        raise ValueError("\n  ".join(problems))
    pipe = model.load_model(chosen, dtype=FLAGS.dtype, **model.dtypes_given(FLAGS),
                            cache_quantised=FLAGS.cache_quantised)
    player = Player(pipe, named, height, width)
    blocks = page(player, [n.strength for n in named], FLAGS.num_steps, not pipe.distilled,
                  FLAGS.prompt)
    log.info("serving at http://%s:%d; Ctrl-C ends it", FLAGS.host, FLAGS.port)
    launch(blocks, FLAGS.host, FLAGS.port)


def launch(blocks: gradio.Blocks, host: str, port: int, **how) -> str:
    """Serves a page until the process ends; returns its address where `how` lets it go on."""
    gr = load_gradio()
    theme = gr.themes.Default(
        font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    _, address, _ = blocks.launch(
        server_name=host, server_port=port or None, share=False, enable_monitoring=False,
        mcp_server=False, ssr_mode=False, theme=theme, css=CSS, quiet=True, footer_links=[],
        **how,
    )
    return address


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)

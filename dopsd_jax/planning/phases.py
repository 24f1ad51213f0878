"""The phases of a run of `train`, each with the program that it runs and what lies beside it.

First the frozen encoders make of the data what student and teacher see, then the transformer is
loaded and draws for the preflight, trains, and draws previews along the way. Whatever a phase
needs is counted by compiling its own program from shapes alone.

Run as a module it is the child that `compile_for` starts; see `main`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from dopsd_jax.core import child, sharding
from dopsd_jax.core.memory import memory_of
from dopsd_jax.core.trees import Tree
from dopsd_jax.data.prompts import smart_resize
from dopsd_jax.method import contexts, sampling
from dopsd_jax.method.guidance import with_guidance
from dopsd_jax.models.denoiser import Context, Denoiser
from dopsd_jax.models.family import TextRules
from dopsd_jax.models.quantization import quantised_as, quantised_shapes
from dopsd_jax.models.qwen3 import Qwen3
from dopsd_jax.models.qwen3_vl import Qwen3VLConfig, VisionTower
from dopsd_jax.planning import compiler, lowering
from dopsd_jax.planning.chips import chip_of
from dopsd_jax.run.config import needs_latents, needs_teacher, needs_vlm
from dopsd_jax.run.model import load_model
from dopsd_jax.run.pictures import PREFLIGHT_PICTURES, at_once
from dopsd_jax.weights.families import published_encoders
from dopsd_jax.weights.pipeline import read_vl_config
from dopsd_jax.weights.shapes import text_shapes, vae_shapes, vision_shapes

CAPTIONS, VLM, LATENTS = "captions", "vlm", "latents"
TRAIN, DRAW, DECODE = "train", "draw", "decode"
# Phase -> what happens in it.
WORDS = {
    CAPTIONS: "encode captions",
    VLM: "encode captions beside pictures",
    LATENTS: "encode pictures",
    TRAIN: "train",
    DRAW: "draw pictures",
    DECODE: "decode pictures",
}
SHORT = {CAPTIONS: "text", VLM: "text+vlm", LATENTS: "latents", TRAIN: "train", DRAW: "draw",
         DECODE: "decode"}  # titles of columns
# The jitted function that is its program.
MODULES = {CAPTIONS: "_text_features", VLM: "_image_features", LATENTS: "_latents",
           TRAIN: "train_step", DRAW: "sample_trajectory", DECODE: "_decode"}
ENCODING, DRAWING = (CAPTIONS, VLM, LATENTS), (DRAW, DECODE)
# Folders of a VAE's parameters that one direction alone reads.
VAE_ENCODES, VAE_DECODES = ("encoder", "quant_conv"), ("decoder", "post_quant_conv")
HOST = 4  # chips of one process of several, as libtpu's topologies have them
GUIDED = 1.5  # any scale: it is an argument of the program


@dataclasses.dataclass(frozen=True)
class Phase:
    """What one phase of a run needs on one device.

    Attributes:
        name: A key of WORDS.
        program: Bytes of its program, arguments and temporaries; infinite where the compiler
            refused it without saying how many.
        beside: Bytes of all that lies on the device meanwhile and is not an argument.
    """

    name: str
    program: float
    beside: int = 0

    @property
    def total(self) -> float:
        return self.program + self.beside


def of_run(config: ConfigDict) -> tuple[str, ...]:
    """The phases of a run in their order, see WORDS.

    Of captions alone and captions beside pictures only the second is named: its program has the
    weights of the first and more.
    """
    names = []
    if not config.cache:
        names.append(VLM if needs_vlm(config) else CAPTIONS)
        if needs_latents(config):
            names.append(LATENTS)
    names.append(TRAIN)
    return (*names, *(DRAWING if _draws(config) else ()))


def _draws(config: ConfigDict) -> bool:
    return bool(config.sample_every or (config.preflight == "on" and needs_teacher(config)))


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The frozen networks of a run; `vision` is None where no teacher sees pictures through it."""

    text_encoder: Qwen3
    text: TextRules
    vae: nn.Module
    vlm: Qwen3VLConfig | None
    dtype: jnp.dtype

    @property
    def vision(self) -> VisionTower:
        return VisionTower(self.vlm.vision, self.dtype)


def encoders_of(config: ConfigDict) -> Encoders:
    """The encoders of config.model and config.vlm by their files, else those of config.published.

    Raises:
        ValueError: Sizes that are not known, or a vision tower of another text encoder.
    """
    dtype = jnp.dtype(config.dtype)
    if config.model:
        pipe = load_model(config, dtype=config.dtype, vae_dtype=config.vae_dtype, parts=())
        text_encoder, text, vae = pipe.text_encoder, pipe.text, pipe.vae
    else:
        text_encoder, text, vae = published_encoders(
            config.published, dtype, jnp.dtype(config.vae_dtype)
        )
    vlm = None
    if needs_vlm(config):
        vlm = read_vl_config(config.vlm) if config.vlm else Qwen3VLConfig.qwen3_vl_4b()
        width, wanted = vlm.vision.out_hidden_size, text_encoder.config.hidden_size
        if width != wanted:
            raise ValueError(f"vlm: expected a vision tower for a text encoder {wanted} wide, got "
                             f"{width}; give the config.vlm that belongs to config.model")
    return Encoders(text_encoder, text, vae, vlm, dtype)


class Weights:
    """What the frozen networks of a run take, as placed shapes on a mesh."""

    def __init__(self, config: ConfigDict, mesh: Mesh | AbstractMesh, encoders: Encoders):
        self.own, self.one = _own_meshes(mesh)
        dtype = jnp.dtype(config.dtype)
        self.text = self.vision = None
        if not config.cache:
            spread, kind = self.own or self.one, quantised_as("encoder_dtype", config.encoder_dtype)
            text = quantised_shapes(text_shapes(encoders.text_encoder), kind, dtype)
            self.text = _placed(text, spread)
            if encoders.vlm:
                vision = quantised_shapes(vision_shapes(encoders.vision), kind, dtype)
                self.vision = _placed(vision, spread)
        self.vae = None
        vae, vae_dtype = vae_shapes(encoders.vae), jnp.dtype(config.vae_dtype)
        self.encodes = _whole(_without(vae, VAE_DECODES), self.one, vae_dtype)
        self.decodes = _whole(_without(vae, VAE_ENCODES), self.one, vae_dtype)
        if needs_latents(config) and not config.cache:
            self.vae = _whole(vae, self.one, vae_dtype)
        elif _draws(config):
            self.vae = self.decodes

    def size(self, name: str) -> int:
        """Bytes per device of text, vision, vae, encodes or decodes; 0 if it is not loaded."""
        return lowering.bytes_per_device(getattr(self, name) or {})


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Bytes per device that are known before anything is compiled.

    Attributes:
        own: Of the weights and the state among the arguments of a phase's program.
        beside: Of all that lies on the device meanwhile and is not an argument.
    """

    own: int
    beside: int

    @property
    def least(self) -> int:
        """What the phase needs at least."""
        return self.own + self.beside


def arrays(config: ConfigDict, mesh: Mesh | AbstractMesh) -> dict[str, Arrays]:
    """What lies on a device in every phase of a run."""
    weights, step = Weights(config, mesh, encoders_of(config)), lowering.step_of(config, mesh)
    shapes = step.shapes(lowering.planned_bucket(config))
    size = lowering.bytes_per_device
    preview, learns = lowering.preview_bytes(config, shapes), size(shapes.state)
    model = size(shapes.base or {}) + learns + preview
    encoding = weights.size("text") + weights.size("vision")
    online = config.encode == "online" and not config.cache
    vae = weights.size("vae")
    stays = vae + (encoding if online else 0)  # beside the model
    variables = _variables(step, shapes, mesh)
    drawn = size(variables["params"])
    lora = size(variables.get("lora", {}))  # another one than the state's
    first = encoding + vae + (model if online else 0)
    text, encodes, decodes = weights.size("text"), weights.size("encodes"), weights.size("decodes")
    every = {
        CAPTIONS: Arrays(text, first - text),
        VLM: Arrays(encoding, first - encoding),
        LATENTS: Arrays(encodes, first - encodes),
        TRAIN: Arrays(model - preview, stays + preview),
        DRAW: Arrays(drawn + lora, stays + model - drawn),
        DECODE: Arrays(decodes, stays + model + lora - decodes),
    }
    return {name: every[name] for name in of_run(config)}


def _variables(step, shapes, mesh: Mesh | AbstractMesh) -> Tree:
    """What the network draws with, as placed shapes."""
    made = jax.eval_shape(step.method.assemble, shapes.base, shapes.state.student)
    return _placed(made, mesh)


def lower(config: ConfigDict, mesh: Mesh, name: str) -> jax.stages.Lowered:
    """The program of a phase, lowered for a mesh whose devices need not be there."""
    if name == TRAIN:
        return lowering.lower(config, mesh)[0]
    if name == DRAW:
        return _lower_drawing(config, mesh)
    encoders = encoders_of(config)
    weights, bucket = Weights(config, mesh, encoders), lowering.planned_bucket(config)

    def array(*shape, dtype=jnp.float32, mesh=weights.one):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))

    with sharding.use_mesh(weights.one):
        if name == LATENTS:
            image = array(1, bucket.height, bucket.width, 3)
            return contexts._latents.lower(encoders.vae, weights.encodes, image)
        if name == DECODE:
            count, _ = _drawn(config)
            shape = lowering.denoiser_of(config).latent_shape(bucket.height, bucket.width)
            return sampling._decode.lower(encoders.vae, weights.decodes, array(count, *shape))
        text, spread = (encoders.text_encoder, encoders.text), weights.own or weights.one
        if name == CAPTIONS:
            length = _longest(config)
            tokens = [array(1, length, dtype=t, mesh=spread) for t in (jnp.int32, bool)]
            return contexts._text_features.lower(*text, weights.own, weights.text, *tokens)
        return _lower_looking(config, encoders, weights, bucket, array, spread)


def _longest(config: ConfigDict) -> int:
    return max(config.text_tokens, config.teacher_tokens if needs_teacher(config) else 0)


def _lower_looking(config, encoders, weights, bucket, array, spread) -> jax.stages.Lowered:
    vlm = encoders.vlm
    v = vlm.vision
    height, width = smart_resize(
        bucket.height, bucket.width, config.vlm_min_pixels, config.vlm_max_pixels,
        factor=v.patch_size * v.spatial_merge_size,
    )
    grid = height // v.patch_size, width // v.patch_size
    theta = config.vlm_rope_theta or vlm.rope_theta
    static = (grid, vlm.image_token_id, vlm.mrope_section, theta, weights.own)
    length = config.teacher_tokens
    return contexts._image_features.lower(
        encoders.text_encoder, encoders.vision, static, weights.text, weights.vision,
        array(1, length, dtype=jnp.int32, mesh=spread), array(1, length, dtype=bool, mesh=spread),
        array(1, grid[0] * grid[1], v.patch_dim, mesh=spread),
    )


def _drawn(config: ConfigDict) -> tuple[int, str]:
    """How many pictures a run draws of one kind at most, and the role with the longest context."""
    batches = [(PREFLIGHT_PICTURES, config.preflight == "on")]
    batches.append((config.sample_rows, config.sample_every))
    count = max(n for n, drawn in batches if drawn)
    if config.sample_every:
        count = max(count, len(config.sample_prompts), len(config.gauge_prompts))
    role = contexts.TEACHER if needs_teacher(config) else contexts.STUDENT
    return count, role


def _lower_drawing(config: ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    count, role = _drawn(config)
    config = config.copy_and_resolve_references()
    config.batch_size = min(count, at_once(mesh))
    step = lowering.step_of(config, mesh)
    shapes = step.shapes(lowering.planned_bucket(config))
    batch = shapes.batch
    ctx = batch.teacher_ctx if role == contexts.TEACHER else batch.student_ctx
    if config.sample_guidance:
        text, mask = (jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
                      for x in (batch.student_ctx.text, batch.student_ctx.text_mask))
        guide = functools.partial(with_guidance, scale=GUIDED)
        ctx = jax.eval_shape(guide, ctx, Context(text, mask))
    everywhere = sharding.replicated(mesh)
    noise, ctx, sigmas = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        (batch.noise, ctx, jax.ShapeDtypeStruct((config.sample_steps + 1,), jnp.float32)),
    )
    denoiser: Denoiser = dataclasses.replace(lowering.denoiser_of(config), mesh=mesh)
    variables = _variables(step, shapes, mesh)
    return sampling.sample_trajectory.lower(denoiser, variables, noise, ctx, sigmas)


def _own_meshes(
    mesh: Mesh | AbstractMesh,
) -> tuple[Mesh | AbstractMesh | None, Mesh | AbstractMesh]:
    """What `sharding.own_mesh` is to the first process of a mesh, and its first device alone."""
    if isinstance(mesh, AbstractMesh):
        own = min(mesh.size, HOST)
        several = lowering.abstract_mesh(1, own, 1) if own > 1 else None
        return several, lowering.abstract_mesh(1, 1, 1)
    devices = list(mesh.devices.flat)
    own = [d for d in devices if d.process_index == devices[0].process_index]
    several = sharding.make_mesh(1, -1, 1, devices=own) if len(own) > 1 else None
    return several, sharding.make_mesh(1, 1, 1, devices=own[:1])


def _placed(shapes: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
        shapes, sharding.shard(mesh, shapes),
    )


def _whole(shapes: Tree, mesh: Mesh, dtype: jnp.dtype) -> Tree:
    where = sharding.replicated(mesh)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype, sharding=where), shapes)


def _without(tree: Tree, names: tuple[str, ...]) -> Tree:
    return {name: part for name, part in tree.items() if name not in names}


def compile_for(
    config: ConfigDict, topology: str, name: str, *, full: bool = False
) -> compiler.Dump:
    """Compiles the program of a phase in a child process.

    Args:
        config: Of a run, with a policy of rematerialisation.
        topology: Such as "v5e:4x4", or a GPU such as "h100".
        name: A key of WORDS.
        full: Build the executable, which a TPU program takes many minutes for.

    Raises:
        compiler.DoesNotFit: The program needs more memory than a chip has.
        ValueError: The compiler refuses it for another reason.
    """
    asked = {"config": config.to_dict(), "topology": topology, "full": full, "phase": name}
    target = chip_of(topology).target
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asked, file)
        file.flush()
        command = [sys.executable, "-m", __name__, file.name]
        try:
            if target:
                return compiler.compile_for_gpu(command)
            return compiler.compile_in_child(command, MODULES[name], full=full)
        except compiler.DoesNotFit:
            raise
        except RuntimeError as e:
            kind = "GPU" if target else "TPU"
            raise ValueError(
                f"{topology}: the {kind} compiler gave up; are there such chips, and does the step "
                f"run elsewhere?\n  {e}"
            ) from e


def main() -> None:
    """JSON file of {config, topology, full, phase}, directory -> compiles, and leaves the dump."""
    child.end_with_parent()
    asked, directory = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    config, topology = ConfigDict(asked["config"]), asked["topology"]
    compiled = lower(config, lowering.topology_mesh(config, topology), asked["phase"]).compile()
    if asked["full"] or chip_of(topology).target:
        (directory / compiler.FINAL).write_text(compiled.as_text())
    if chip_of(topology).target:
        (directory / compiler.COUNTED).write_text(json.dumps(memory_of(compiled)))


if __name__ == "__main__":
    main()

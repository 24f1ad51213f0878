"""A diffusers-format pipeline directory, and the Qwen3-VL directory beside it, as networks."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dopsd_jax.core import memory, sharding, trees
from dopsd_jax.core.checks import COUNT, noted, path_problem, value_problems
from dopsd_jax.core.log import log
from dopsd_jax.data import prompts
from dopsd_jax.models.denoiser import Denoiser
from dopsd_jax.models.family import Family, TextRules
from dopsd_jax.models.quantization import (
    AS_DTYPE,
    ENCODER_DTYPES,
    quantised_as,
    quantised_shapes,
)
from dopsd_jax.models.qwen3 import Qwen3
from dopsd_jax.models.qwen3_vl import Qwen3VLConfig, VisionTower
from dopsd_jax.models.vae import Vae
from dopsd_jax.weights import fingerprints, one_file, quantized_cache
from dopsd_jax.weights.families import (
    DECODER,
    LoraRules,
    Networks,
    Source,
    open_networks,
    other_transformers,
)
from dopsd_jax.weights.load import PREFIXES, Prefixes, kept_dtypes, load_tree, weight_files
from dopsd_jax.weights.names import Rule, WeightsError
from dopsd_jax.weights.one_file import PARTS
from dopsd_jax.weights.qwen3_names import check_language_match, vision_table
from dopsd_jax.weights.shapes import text_shapes, transformer_shapes, vae_shapes, vision_shapes
from dopsd_jax.weights.shipped import pipeline_directory, vlm_directory

DTYPES = ("bfloat16", "float16", "float32")  # of weights and compute
C = TypeVar("C")


@dataclasses.dataclass
class Pipeline:
    """Networks and weights of a text-to-image model. Parts that were not asked for are None.

    Attributes:
        directory: Where it came from.
        files: Part -> the file whose weights stand in for the directory's.
        family: All that is known of models of its kind.
        denoiser: The transformer behind the family's adapter.
        params: The transformer's parameters, {layers: ..}.
        vae, vae_params: Images to normalised latents and back.
        text_encoder, text_params: Qwen3, as deep as the taps need.
        encoder_mesh: Over which its weights are split, and those of a vision tower beside it.
        tokenizer: With the chat template.
        text: How prompts become features.
        lora: Targets and file names of its LoRA.
        shift: The scheduler's static shift, or None where it depends on the picture's size.
        distilled: Whether it is step-distilled; other models are made for guidance.
        sample_size: Pixels per side that the model draws by itself.
    """

    directory: Path
    family: Family
    denoiser: Denoiser
    tokenizer: Any
    text: TextRules
    lora: LoraRules
    shift: float | None
    distilled: bool
    sample_size: int
    vae: Vae
    text_encoder: Qwen3
    params: trees.Tree | None = None
    vae_params: trees.Tree | None = None
    text_params: trees.Tree | None = None
    encoder_mesh: Mesh | None = None
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    def shift_at(self, num_steps: int, height: int, width: int) -> float:
        """The sampler's shift for S = num_steps and a picture of height x width pixels."""
        if self.shift is not None:
            return self.shift
        m = self.denoiser.pixel_multiple
        return self.family.shift(num_steps, (height // m) * (width // m))


@dataclasses.dataclass
class VisionLanguage:
    """The vision tower of Qwen3-VL; its language model is the pipeline's text encoder.

    Attributes:
        matched: How many language tensors of the directory the text encoder replaces: all.
    """

    config: Qwen3VLConfig
    vision: VisionTower
    params: trees.Tree
    tokenizer: Any
    matched: int


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        WeightsError: Missing, or not a JSON object.
    """
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as e:
        raise WeightsError(f"{path}: no such file; is {path.parent} complete?") from e
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise WeightsError(f"{path}: not valid JSON ({e})") from e
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def read_config(path: Path, from_json: Callable[[dict], C]) -> C:
    """A network's config; what is wrong with it is said with the file's name.

    Raises:
        WeightsError: See `read_json`, and whatever values `from_json` refuses.
    """
    values = read_json(path)
    try:
        return from_json(values)
    except ValueError as e:
        raise WeightsError(f"{path}: {e}") from e


def check_dtype(name: str, dtype: str) -> None:
    """Raises ValueError unless `dtype` is one of DTYPES; `name` is for the message."""
    if dtype not in DTYPES:
        raise ValueError(f"{name}: expected one of {DTYPES}, got {dtype!r}")


def _check_is_directory(directory: Path, contents: str) -> None:
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing"
        advice = ""
        if directory.suffix == ".safetensors" and directory.exists():
            advice = "; one file of a model is named by transformer_file, beside model"
        elif str(directory).startswith(("https:", "http:")):
            advice = "; a model on the hub is named OWNER/NAME"
        raise WeightsError(
            f"{directory}: expected a directory with {contents}, found {found}{advice}"
        )


def read_vl_config(directory: str | Path) -> Qwen3VLConfig:
    """The config of a Qwen3-VL directory.

    Raises:
        ValueError: No such directory, or a config of something else.
    """
    directory = vlm_directory(directory, weights=False)
    _check_is_directory(directory, "config.json and the weights of Qwen3-VL")
    return read_config(directory / "config.json", Qwen3VLConfig.from_json)


def _sample_size(values: dict) -> int:
    values = {"sample_size": 1024, **values}
    if wrong := value_problems(values, {"sample_size": COUNT}):
        raise ValueError(wrong["sample_size"])
    return values["sample_size"]


def load_pipeline(
    directory: str | Path,
    *,
    dtype: str = "bfloat16",
    vae_dtype: str = "float32",
    remat: str = "full",
    parts: tuple[str, ...] = PARTS,
    mesh: Mesh | None = None,
    encoder_mesh: Mesh | None = None,
    transformer_file: str | Path = "",
    vae_file: str | Path = "",
    text_encoder_file: str | Path = "",
    base_dtype: str = AS_DTYPE,
    encoder_dtype: str = AS_DTYPE,
    cache_quantised: bool = False,
) -> Pipeline:
    """Opens a directory as Tongyi-MAI/Z-Image-Turbo or FLUX.2-klein ships it.

    Args:
        directory: Holds model_index.json, transformer/, vae/, text_encoder/, tokenizer/ and
            scheduler/; or "mini", the model that comes with the package. The transformer's
            tensors may be a single file in the layout of its makers, in transformer/ or, if there
            are none, beside it.
        dtype: Dtype of the transformer's and the text encoder's weights and compute.
        vae_dtype: The same for the VAE; float32 keeps the picture's last bit.
        remat: Rematerialisation policy of the transformer, see models/layers.py.
        parts: Which weights to read, of PARTS and DECODER; networks and configs are always
            there. () opens in no time, to check a request against them.
        mesh: Over which the transformer's weights and evaluations are spread, or None.
        encoder_mesh: The same for the text encoder, of this process's own devices: each encodes
            what it needs without waiting for others.
        transformer_file, vae_file, text_encoder_file: A safetensors file each, as ComfyUI keeps
            them, whose weights replace the directory's, which then need not be there.
        base_dtype: In which the kernels of the transformer's layers are kept: AS_DTYPE, or a key of
            quantization.KINDS.
        encoder_dtype: The same for the text encoder, of ENCODER_DTYPES.
        cache_quantised: Keep what is quantised beside the model, see weights/quantized_cache.py.

    Returns:
        The pipeline.

    Raises:
        WeightsError: Anything that is missing, unsupported or does not fit.
        ValueError: An unknown dtype or part.
    """
    if problem := path_problem(str(directory)):
        raise WeightsError(f"model: {directory!s:.60}.. {problem}")
    files = one_file.by_part(transformer_file=transformer_file, vae_file=vae_file,
                             text_encoder_file=text_encoder_file)
    directory = find_directory(directory, files, weights=bool(parts))
    check_dtype("dtype", dtype)
    check_dtype("vae_dtype", vae_dtype)
    quantise = {
        "transformer": quantised_as("base_dtype", base_dtype),
        "text_encoder": quantised_as("encoder_dtype", encoder_dtype, ENCODER_DTYPES),
    }
    if unknown := sorted(set(parts) - {*PARTS, DECODER}):
        raise ValueError(f"parts: expected some of {(*PARTS, DECODER)}, got {unknown}")
    dtype, vae_dtype = jnp.dtype(dtype), jnp.dtype(vae_dtype)
    nets = _open(directory, dtype, vae_dtype, remat)
    shapes = _shapes_of(nets)
    _check_files(files, nets, shapes)
    pipe = Pipeline(
        directory=directory,
        family=nets.family,
        denoiser=dataclasses.replace(nets.denoiser, mesh=mesh),
        tokenizer=prompts.load_tokenizer(directory / "tokenizer"),
        text=nets.text,
        lora=nets.lora,
        shift=nets.shift,
        distilled=nets.distilled,
        sample_size=read_config(directory / "vae" / "config.json", _sample_size),
        vae=nets.vae,
        text_encoder=nets.text_encoder,
        encoder_mesh=encoder_mesh,
        files=files,
    )

    def load(part, dtype, mesh=None):
        folder = "vae" if part == DECODER else part
        return _load(part_files(directory, files, folder), nets.tables[part], shapes(part), dtype,
                     mesh, folder, PREFIXES[folder], quantise.get(part, ""),
                     directory if cache_quantised else None)

    if "transformer" in parts:
        pipe.params = load("transformer", dtype, mesh)
    if "vae" in parts:
        pipe.vae_params = load("vae", vae_dtype)
    elif DECODER in parts:
        pipe.vae_params = load(DECODER, vae_dtype)
    if "text_encoder" in parts:
        pipe.text_params = load("text_encoder", dtype, encoder_mesh)
    return pipe


def find_directory(
    name: str | Path, files: Mapping[str, Path], *, weights: bool = True
) -> Path:
    """The directory of a pipeline by its name, with the weights that no file stands in for.

    Args:
        name: See `load_pipeline`.
        files: See `Pipeline`.
        weights: Whether weights are needed at all.

    Raises:
        ValueError: No directory, or a name of the hub that cannot be had.
    """
    wanted = tuple(part for part in PARTS if part not in files) if files else True
    directory = pipeline_directory(name, weights=weights and wanted)
    _check_is_directory(directory, "model_index.json, transformer/, vae/, ..")
    return directory


def load_transformer(pipe: Pipeline) -> trees.Tree:
    """The transformer's parameters in the dtypes of their files, quantised ones in bfloat16."""
    files, table, shapes = _transformer(pipe)
    return _load(files, table, shapes, None, None, "transformer", PREFIXES["transformer"])


def transformer_dtypes(pipe: Pipeline) -> dict[tuple[str, int | None], np.dtype]:
    """The dtypes of the transformer's files, see `load.kept_dtypes`."""
    return kept_dtypes(*_transformer(pipe), PREFIXES["transformer"])


def _transformer(pipe: Pipeline) -> tuple[list[Path], list[Rule], trees.Tree]:
    """The transformer's files, name table and shapes."""
    nets = _open(pipe.directory, jnp.dtype("float32"), jnp.dtype("float32"), "none")
    return (part_files(pipe.directory, pipe.files, "transformer"), nets.tables["transformer"],
            transformer_shapes(nets.denoiser.network))


def part_files(directory: Path, files: Mapping[str, Path], part: str) -> list[Path]:
    """The safetensors files of a part of a model, see `Pipeline`."""
    if part in files:
        return [files[part]]
    folder = directory / part
    beside = part == "transformer" and not any(folder.glob("*.safetensors*")) and any(
        directory.glob("*.safetensors")
    )
    return weight_files(directory if beside else folder)


def _shapes_of(nets: Networks) -> Callable[[str], trees.Tree]:
    """Part, or DECODER -> shapes of its parameters; what was found is kept."""

    @functools.cache
    def shapes(part: str) -> trees.Tree:
        if part == "transformer":
            return transformer_shapes(nets.denoiser.network)
        if part == "text_encoder":
            return text_shapes(nets.text_encoder)
        if part == "vae":
            return vae_shapes(nets.vae)
        only_encodes = ("encoder", "quant_conv")
        return {name: tree for name, tree in shapes("vae").items() if name not in only_encodes}

    return shapes


def _check_files(
    files: Mapping[str, Path], nets: Networks, shapes: Callable[[str], trees.Tree]
) -> None:
    """Raises WeightsError for every file that does not hold the part it stands in for."""
    problems: list[str] = []
    for part, file in files.items():
        with noted(problems):
            one_file.check(part, file, nets.tables, shapes(part), nets.family.pipeline,
                           other_transformers(nets.family))
    if problems:
        raise WeightsError("\n".join(problems))


def _open(directory: Path, dtype: jnp.dtype, vae_dtype: jnp.dtype, remat: str) -> Networks:
    """The networks of a directory by its configs."""

    def read(part, from_json):
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        return read_config(directory / part / file, from_json)

    index = read_json(directory / "model_index.json")
    return open_networks(Source(directory, index, read, dtype, vae_dtype, remat))


def load_vision_language(
    directory: str | Path, pipe: Pipeline, *, dtype: str = "bfloat16",
    encoder_dtype: str = AS_DTYPE, cache_quantised: bool = False,
) -> VisionLanguage:
    """Opens a directory in the format of Qwen3-VL-4B-Instruct for use with a pipeline.

    dtype, encoder_dtype and cache_quantised: as of `load_pipeline`.

    Raises:
        WeightsError: Anything missing or unsupported, and language tensors that are not, by name
            and shape, exactly those of the pipeline's text encoder.
    """
    directory = vlm_directory(directory)
    check_dtype("dtype", dtype)
    config = read_vl_config(directory)
    matched = check_language_match(
        weight_files(directory), part_files(pipe.directory, pipe.files, "text_encoder")
    )
    log.info(
        "%s: all %d language tensors match the pipeline's text encoder, which replaces them",
        directory, matched,
    )
    vision = VisionTower(config.vision, jnp.dtype(dtype))
    params = _load(weight_files(directory), vision_table(config.vision), vision_shapes(vision),
                   dtype, pipe.encoder_mesh, directory.name,
                   quantise=quantised_as("encoder_dtype", encoder_dtype, ENCODER_DTYPES),
                   beside=directory if cache_quantised else None)
    return VisionLanguage(config, vision, params, prompts.load_tokenizer(directory), matched)


def _load(
    files: list[Path], table, shapes, dtype, mesh: Mesh | None, name: str,
    prefixes: Prefixes | None = None, quantise: str = "", beside: Path | None = None,
) -> trees.Tree:
    """The weights of what the log calls `name`.

    As of `load_tree`, and `beside`: the model's directory, if what is quantised is kept there.
    """
    shardings, kept_as = None, quantised_shapes(shapes, quantise, dtype)
    if mesh is not None:
        shardings = sharding.shard(mesh, kept_as)
    if quantise and beside is not None:
        key = fingerprints.of_files(files)
        folder = quantized_cache.folder_of(beside, name, quantise, dtype, key)
        return quantized_cache.cached(folder, kept_as, shardings, lambda: _load(
            files, table, shapes, dtype, mesh, name, prefixes, quantise,
        ))
    total = sum(f.stat().st_size for f in files)
    where = files[0] if len(files) == 1 else f"{files[0].parent}: {len(files)} files"
    log.info("reading %s, %.2f GB", where, total / 1e9)
    report = functools.partial(_report, name) if total > 5e8 else None
    tree = load_tree(files, table, shapes, dtype=dtype, shardings=shardings, report=report,
                     prefixes=prefixes, quantise=quantise)
    if report:
        log.info("%s: loaded; %s", name, memory.report())
    return tree


def _report(name: str, done: int, total: int) -> None:
    if done == total or done % max(total // 10, 1) == 0:
        log.info("%s: %d of %d tensors", name, done, total)

"""Qwen3-VL around a Qwen3 text encoder beside transformers' own, through the real loader."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from dopsd_jax.core import trees
from dopsd_jax.models.qwen3 import Qwen3, Qwen3Config
from dopsd_jax.models.qwen3_vl import (
    Qwen3VLConfig,
    VisionConfig,
    VisionTower,
    mrope_angles,
    mrope_positions,
    multimodal_features,
)
from dopsd_jax.weights.load import load_tree, weight_files
from dopsd_jax.weights.names import WeightsError, export_names, resolve
from dopsd_jax.weights.qwen3_names import check_language_match, qwen3_table, vision_table

TEXT = dict(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
)
TINY = dict(
    text_config={
        **TEXT, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6,
                            "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    },
    vision_config=dict(
        depth=3, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4,
        spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=32,
        num_position_embeddings=36, deepstack_visual_indexes=[0, 2], in_channels=3,
        hidden_act="gelu_pytorch_tanh",
    ),
    image_token_id=120, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123,
    tie_word_embeddings=True,
)
GRIDS = [(6, 8), (4, 2)]


@pytest.fixture(autouse=True)
def exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


def shapes_of(config: VisionConfig):
    def init(patches):
        return VisionTower(config).init(jax.random.key(0), patches, (4, 4))

    return jax.eval_shape(init, jax.ShapeDtypeStruct((1, 16, config.patch_dim), jnp.float32))[
        "params"
    ]


def text_shapes(config, depth):
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    net = Qwen3(config, depth)
    return jax.eval_shape(net.init, jax.random.key(0), ids, ids)["params"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny torch Qwen3-VL; its directory; its language model saved as a pipeline's encoder."""
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(**TINY))
    for name, p in model.eval().named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(p, 1.0, 0.3)
        else:
            torch.nn.init.normal_(p, 0.0, 1.0 if "embed" in name else 0.2)
    directory = tmp_path_factory.mktemp("qwen3_vl")
    model.save_pretrained(directory / "vl", max_shard_size="200KB")
    assert len(list((directory / "vl").glob("*.safetensors"))) > 1
    text = transformers.Qwen3Model(
        transformers.Qwen3Config(**TEXT, rope_parameters={"rope_type": "default",
                                                          "rope_theta": 1e6})
    )
    text.load_state_dict(model.model.language_model.state_dict())
    text.save_pretrained(directory / "text")
    return model, directory


@functools.cache
def load(directory, dtype=None):
    """(text encoder, its variables, tower, its variables, Qwen3-VL's config)."""
    config = Qwen3VLConfig.from_json(json.loads((directory / "vl/config.json").read_text()))
    text = Qwen3Config.from_json(json.loads((directory / "text/config.json").read_text()))
    vision_params = load_tree(
        weight_files(directory / "vl"), vision_table(config.vision), shapes_of(config.vision),
        dtype=dtype,
    )
    text_params = load_tree(
        weight_files(directory / "text"), qwen3_table(text, 3), text_shapes(text, 3), dtype=dtype
    )
    compute = dtype or jnp.float32
    return (
        Qwen3(text, 3, compute), {"params": text_params},
        VisionTower(config.vision, compute), {"params": vision_params}, config,
    )


def images(grid, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, grid[0] * grid[1], 96), np.float32)


def prompts(grid):
    """Two rows of unequal length; the image stands at 4 and at 2."""
    image = [122] + [120] * (grid[0] * grid[1] // 4) + [123]
    rows = [[1, 2, 3, *image, 5, 6, 7, 8, 9], [11, *image, 15]]
    length = len(rows[0]) + 3
    ids = np.asarray([row + [99] * (length - len(row)) for row in rows], np.int32)
    return ids, np.asarray([[i < len(row) for i in range(length)] for row in rows])


def run_torch(model, ids, mask, patches, grid, theta=None):
    """hidden_states[-2] of the whole model, rows of pads included."""
    model = model.model
    rope = model.language_model.rotary_emb
    published = rope.inv_freq.clone()
    if theta is not None:
        rope.inv_freq.copy_(1.0 / theta ** (torch.arange(0, 16, 2, dtype=torch.float) / 16))
    ids = torch.from_numpy(ids).long()
    with torch.no_grad():
        out = model(
            input_ids=ids, attention_mask=torch.from_numpy(mask).long(),
            pixel_values=torch.from_numpy(patches).flatten(0, 1),
            image_grid_thw=torch.tensor([[1, *grid]] * 2),
            mm_token_type_ids=(ids == 120).int(), output_hidden_states=True,
        )
    rope.inv_freq.copy_(published)
    return out.hidden_states[-2].float().numpy()


def run_ours(directory, ids, mask, patches, grid, theta=None, dtype=None):
    config = load(directory)[-1]
    features = features_under_jit(directory, grid, theta or config.rope_theta, dtype)
    return np.asarray(features(ids, mask, patches), np.float32)


@functools.cache
def features_under_jit(directory, grid, theta, dtype):
    text, text_variables, vision, vision_variables, config = load(directory, dtype)
    return jax.jit(
        lambda ids, mask, patches: multimodal_features(
            text, text_variables, vision, vision_variables, ids=ids, mask=mask, patches=patches,
            grid=grid, image_token_id=config.image_token_id, mrope_section=config.mrope_section,
            rope_theta=theta, tap=3,
        )
    )


def error(got, want):
    return np.abs(np.asarray(got, np.float32) - want).max() / np.abs(want).max()


def rms_error(got, want):
    return np.sqrt(np.mean((np.asarray(got, np.float32) - want) ** 2) / np.mean(want**2))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_tower_equals_transformers(pair, grid):
    model, directory = pair
    patches = images(grid)
    with torch.no_grad():
        want = model.model.visual(
            torch.from_numpy(patches).flatten(0, 1), grid_thw=torch.tensor([[1, *grid]] * 2)
        )
    _, _, vision, variables, _ = load(directory)
    merged, deepstack = jax.jit(vision.apply, static_argnums=2)(variables, patches, grid)
    assert merged.shape == (2, grid[0] * grid[1] // 4, 32)
    assert deepstack.shape == (2, *merged.shape)
    assert error(merged.reshape(-1, 32), want.pooler_output.numpy()) < 2e-5
    for ours, theirs in zip(deepstack, want.deepstack_features, strict=True):
        assert error(ours.reshape(-1, 32), theirs.numpy()) < 2e-5


@pytest.mark.parametrize("grid", GRIDS)
def test_features_equal_transformers_with_the_published_rope_base(pair, grid):
    model, directory = pair
    ids, mask = prompts(grid)
    data = ids, mask, images(grid), grid
    want, got = run_torch(model, *data), run_ours(directory, *data)
    assert error(got[mask], want[mask]) < 2e-5
    assert np.isfinite(got).all()


def test_features_equal_transformers_with_the_text_encoders_rope_base(pair):
    model, directory = pair
    grid = GRIDS[0]
    ids, mask = prompts(grid)
    data = ids, mask, images(grid), grid
    want, got = run_torch(model, *data, theta=1e6), run_ours(directory, *data, theta=1e6)
    assert error(got[mask], want[mask]) < 2e-5
    assert error(run_ours(directory, *data)[mask], want[mask]) > 1e-2  # the base does matter


def test_bfloat16_is_as_close_to_float32_as_torchs_bfloat16(pair):
    model, directory = pair
    grid = GRIDS[0]
    ids, mask = prompts(grid)
    data = ids, mask, images(grid), grid
    exact = run_torch(model, *data)[mask]
    copy = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        directory / "vl", dtype=torch.bfloat16
    )
    theirs = rms_error(run_torch(copy.eval(), *data)[mask], exact)
    ours = rms_error(run_ours(directory, *data, dtype=jnp.bfloat16)[mask], exact)
    assert ours < 1.3 * theirs, (ours, theirs)
    assert theirs < 0.03


def test_positions_equal_the_worked_example_and_transformers(pair):
    ids = np.asarray([[1, 2, 3, 122] + [120] * 12 + [123, 5, 6, 7]], np.int32)
    t, h, w = np.asarray(mrope_positions(ids, (6, 8), 120))[:, 0].tolist()
    after = [8, 9, 10, 11]
    assert t == [0, 1, 2, 3] + [4] * 12 + after
    assert h == [0, 1, 2, 3] + [4] * 4 + [5] * 4 + [6] * 4 + after
    assert w == [0, 1, 2, 3] + [4, 5, 6, 7] * 3 + after

    ids, mask = prompts((6, 8))
    want, _ = pair[0].model.get_rope_index(
        torch.from_numpy(ids).long(), torch.from_numpy(ids == 120).int(),
        image_grid_thw=torch.tensor([[1, 6, 8]] * 2), attention_mask=torch.from_numpy(mask),
    )
    got = np.asarray(jax.jit(mrope_positions, static_argnums=(1, 2))(ids, (6, 8), 120))
    np.testing.assert_array_equal(got[:, mask], want.numpy()[:, mask])


def test_frequencies_take_turns_among_the_axes():
    positions = jnp.asarray([100, 10, 1], jnp.int32)[:, None, None]

    def axes(section, head_dim):
        angles = mrope_angles(positions, section, head_dim, 1.0)[0, 0]
        return "".join({100: "T", 10: "H", 1: "W"}[int(a)] for a in angles)

    assert axes((4, 2, 2), 16) == "THWTHWTT"
    assert axes((24, 20, 20), 128) == "THW" * 20 + "TTTT"
    with pytest.raises(ValueError, match="expected 8 frequencies in all"):
        axes((4, 2, 3), 16)


def test_tensors_survive_the_way_in_and_out(pair):
    model, directory = pair
    _, _, _, variables, config = load(directory)
    want = {n: p.numpy() for n, p in model.state_dict().items()}
    got = export_names(vision_table(config.vision), want, trees.flatten(variables["params"]))
    assert sorted(got) == sorted(n for n in want if n.startswith("model.visual."))
    for name, value in got.items():
        np.testing.assert_array_equal(value, want[name])


@pytest.mark.parametrize("old_names", [False, True])
def test_full_size_names_and_shapes_resolve_completely(old_names):
    text = dict(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )
    vision = dict(
        depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=2560,
        deepstack_visual_indexes=[5, 11, 17],
    )
    full = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True
    )
    with torch.device("meta"):
        tensors = transformers.Qwen3VLForConditionalGeneration(full).state_dict()
    assert len(tensors) == 714
    if old_names:
        tensors = {
            n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): t
            for n, t in tensors.items()
        }
    config = VisionConfig.qwen3_vl_4b()
    assert VisionConfig.from_json(full.to_dict()["vision_config"]) == config
    slots, problems = resolve(vision_table(config), tensors)
    assert problems == []
    shapes = trees.flatten(shapes_of(config))
    filled = {(s.name, s.layer) for s in slots.values()}
    assert len(filled) == len(slots) == 714 - 399
    assert {name for name, _ in filled} == set(shapes)
    for tensor, slot in slots.items():
        stand_in = np.broadcast_to(np.zeros((), np.int8), tensors[tensor].shape)
        ours = shapes[slot.name].shape[slot.layer is not None :]
        assert slot.transform.to_flax(stand_in).shape == ours
    assert trees.count(shapes_of(config)) == 415_347_712


def test_the_language_model_of_the_vl_checkpoint_matches_the_text_encoder(pair, tmp_path):
    _, directory = pair
    vl, text = weight_files(directory / "vl"), weight_files(directory / "text")
    assert check_language_match(vl, text) == 46
    tensors = {n: t for f in text for n, t in load_file(f).items()}
    causal = {f"model.{n}": t for n, t in tensors.items()} | {"lm_head.weight": np.zeros((128, 32))}
    save_file(causal, tmp_path / "causal.safetensors")
    assert check_language_match(vl, [tmp_path / "causal.safetensors"]) == 46

    del tensors["norm.weight"]
    tensors["layers.0.mlp.up_proj.weight"] = np.zeros((63, 32), np.float32)
    tensors["layers.4.mlp.up_proj.weight"] = np.zeros((64, 32), np.float32)
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(WeightsError, match=r"46 and 46 tensors, 3 problems") as e:
        check_language_match(vl, [tmp_path / "wrong.safetensors"])
    for line in ("norm.weight: (32,) in Qwen3-VL, missing",
                 "layers.0.mlp.up_proj.weight: (64, 32) in Qwen3-VL, (63, 32) in",
                 "layers.4.mlp.up_proj.weight: missing in Qwen3-VL, (64, 32) in"):
        assert line in str(e.value)
    with pytest.raises(WeightsError, match="no tensor of the Qwen3-VL files is called"):
        check_language_match(text, text)


def test_the_config_is_read_and_unsupported_values_are_named(pair):
    values = json.loads((pair[1] / "vl/config.json").read_text())
    config = Qwen3VLConfig.from_json(values)
    assert (config.image_token_id, config.mrope_section, config.rope_theta) == (120, (4, 2, 2), 5e6)
    assert config.vision == VisionConfig(3, 32, 64, 2, 3, 4, 2, 2, 32, 36, (0, 2))
    with pytest.raises(ValueError, match="is this a Qwen3-VL checkpoint"):
        Qwen3VLConfig.from_json({})
    values["text_config"]["rope_parameters"] = {"rope_theta": 5e6, "mrope_section": [8]}
    with pytest.raises(ValueError, match=r"mrope_interleaved.*mrope_section: expected 3"):
        Qwen3VLConfig.from_json(values)
    with pytest.raises(ValueError, match=r"depth: missing.*hidden_act"):
        VisionConfig.from_json({"hidden_act": "relu"})


def test_a_grid_that_does_not_fit_is_an_error():
    config = VisionConfig(3, 32, 64, 2, 3, 4, 2, 2, 32, 36, (0, 2))
    patches = jnp.zeros((1, 12, 96))
    with pytest.raises(ValueError, match="expected a grid in multiples of 2"):
        VisionTower(config).init(jax.random.key(0), patches, (3, 4))
    with pytest.raises(ValueError, match="B 16 96"):
        VisionTower(config).init(jax.random.key(0), patches, (4, 4))

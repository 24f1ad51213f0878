"""Qwen3 beside transformers' own, through the real loader."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dopsd_jax.core import trees
from dopsd_jax.models.qwen3 import Qwen3, Qwen3Config
from dopsd_jax.weights.load import load_tree, weight_files
from dopsd_jax.weights.names import WeightsError, export_names, resolve
from dopsd_jax.weights.qwen3_names import qwen3_table

TINY = dict(
    vocab_size=128, hidden_size=32, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
LENGTHS = (19, 7)


@pytest.fixture(autouse=True)
def exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


def shapes_of(config, depth):
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 4), jnp.bool_)
    return jax.eval_shape(Qwen3(config, depth).init, jax.random.key(0), ids, mask)["params"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny torch model with random norms, large enough attention logits, and its directory."""
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY)).eval()
    for name, p in model.named_parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1.0, 0.3)
        elif "embed" not in name:
            torch.nn.init.normal_(p, 0.0, 0.15)
    directory = tmp_path_factory.mktemp("qwen3")
    model.model.save_pretrained(directory / "base", max_shard_size="100KB")
    model.save_pretrained(directory / "causal")
    assert len(list((directory / "base").glob("*.safetensors"))) > 1
    return model.model, directory


def batch():
    ids = np.random.default_rng(0).integers(1, 128, (2, max(LENGTHS))).astype(np.int32)
    return ids, np.arange(ids.shape[1]) < np.asarray(LENGTHS)[:, None]


def run_torch(model, ids, mask):
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
            output_hidden_states=True,
        )
    return [h.float().numpy() for h in out.hidden_states]


@functools.cache
def load(directory, depth, dtype=None):
    """(apply under jit, variables, network)."""
    config = Qwen3Config.from_json(json.loads((directory / "config.json").read_text()))
    table = qwen3_table(config, depth)
    params = load_tree(weight_files(directory), table, shapes_of(config, depth), dtype=dtype)
    net = Qwen3(config, depth, dtype or jnp.float32)
    return jax.jit(net.apply, static_argnames=("taps", "method")), {"params": params}, net


def error(got, want):
    return np.abs(np.asarray(got, np.float32) - want).max() / np.abs(want).max()


def rms_error(got, want):
    return np.sqrt(np.mean((np.asarray(got, np.float32) - want) ** 2) / np.mean(want**2))


@pytest.mark.parametrize("kind", ["base", "causal"])
def test_equals_transformers_on_a_ragged_batch_pads_included(pair, kind):
    model, directory = pair
    ids, mask = batch()
    want = run_torch(model, ids, mask)
    apply, variables, _ = load(directory / kind, 3)
    got = apply(variables, ids, mask)
    assert error(got, want[-2]) < 2e-5


def test_taps_are_concatenated_in_the_order_asked_for(pair):
    model, directory = pair
    ids, mask = batch()
    hidden = run_torch(model, ids, mask)
    apply, variables, _ = load(directory / "base", 3)
    got = apply(variables, ids, mask, taps=(1, 3, 2))
    want = np.concatenate([hidden[1], hidden[3], hidden[2]], axis=-1)
    assert got.shape == (2, max(LENGTHS), 96)
    assert error(got, want) < 2e-5


def test_depth_does_not_change_a_tap(pair):
    ids, mask = batch()
    shallow, deep = load(pair[1] / "base", 2), load(pair[1] / "base", 4)
    a = shallow[0](shallow[1], ids, mask)
    np.testing.assert_array_equal(a, deep[0](deep[1], ids, mask, taps=(2,)))


def test_features_of_real_tokens_ignore_what_stands_behind_them(pair):
    ids, mask = batch()
    apply, variables, _ = load(pair[1] / "base", 3)
    other = np.where(mask, ids, 5)
    a, b = apply(variables, ids, mask), apply(variables, other, mask)
    np.testing.assert_array_equal(np.asarray(a)[mask], np.asarray(b)[mask])
    alone = apply(variables, ids[1:, :7], mask[1:, :7])
    assert error(b[1, :7], np.asarray(alone[0])) < 2e-5


def test_bfloat16_is_as_close_to_float32_as_torchs_bfloat16(pair):
    model, directory = pair
    ids, mask = batch()
    exact = run_torch(model, ids, mask)[-2][mask]
    copy = transformers.Qwen3Model.from_pretrained(directory / "base", dtype=torch.bfloat16)
    theirs = rms_error(run_torch(copy.eval(), ids, mask)[-2][mask], exact)
    apply, variables, _ = load(directory / "base", 3, jnp.bfloat16)
    ours = rms_error(apply(variables, ids, mask)[mask], exact)
    assert ours < 1.3 * theirs, (ours, theirs)
    assert theirs < 0.03


def test_deepstack_is_added_after_its_layer(pair):
    ids, mask = batch()
    apply, variables, _ = load(pair[1] / "base", 4)
    x = apply(variables, ids, method="embed")
    angles = jnp.zeros((*ids.shape, 8))
    extra = jax.random.normal(jax.random.key(1), (2, *x.shape))

    def run(deepstack, *taps):
        return np.asarray(apply(
            variables, x, mask, angles, taps=taps, deepstack=deepstack, method="run"
        ))

    plain = run(None, 1, 2)
    got = run(extra.at[1].set(0.0), 1, 2)
    np.testing.assert_array_equal(got[..., :32], plain[..., :32])
    assert error(got[..., 32:], plain[..., 32:]) > 1e-2
    late = run(extra.at[0].set(0.0), 2, 3)
    np.testing.assert_array_equal(late[..., :32], plain[..., 32:])
    assert error(late[..., 32:], run(None, 3)) > 1e-2
    np.testing.assert_array_equal(run(0 * extra, 4), run(None, 4))


def test_tensors_survive_the_way_in_and_out(pair):
    _, directory = pair
    _, variables, net = load(directory / "base", 4)
    table = qwen3_table(net.config, 4)
    want = {n: p.numpy() for n, p in pair[0].state_dict().items()}
    got = export_names(table, want, trees.flatten(variables["params"]))
    assert sorted(got) == sorted(set(want) - {"norm.weight"})
    for name, value in got.items():
        np.testing.assert_array_equal(value, want[name])


FULL = dict(
    vocab_size=151936, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, rope_theta=1e6,
)
WIDTHS = {
    "qwen3_4b": dict(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True),
    "qwen3_8b": dict(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size,depth", [("qwen3_4b", 27), ("qwen3_4b", 35), ("qwen3_4b", 36),
                                        ("qwen3_8b", 27)])
def test_full_size_names_and_shapes_resolve_completely(size, causal, depth):
    with torch.device("meta"):
        cls = transformers.Qwen3ForCausalLM if causal else transformers.Qwen3Model
        tensors = cls(transformers.Qwen3Config(**FULL, **WIDTHS[size])).state_dict()
    assert len(tensors) == 398 + causal
    config = getattr(Qwen3Config, size)()
    slots, problems = resolve(qwen3_table(config, depth), tensors)
    assert problems == []
    shapes = trees.flatten(shapes_of(config, depth))
    filled = {(s.name, s.layer) for s in slots.values()}
    assert len(filled) == len(slots) == 11 * depth + 1
    assert {name for name, _ in filled} == set(shapes)
    for tensor, slot in slots.items():
        ours = shapes[slot.name].shape[slot.layer is not None :]
        theirs = tuple(tensors[tensor].shape)
        assert ours == (theirs[::-1] if "kernel" in slot.name else theirs)


def test_parameter_counts_of_the_full_models():
    final_norm, head = 2560, 151936 * 4096
    assert trees.count(shapes_of(Qwen3Config.qwen3_4b(), 36)) + final_norm == 4_022_468_096
    assert trees.count(shapes_of(Qwen3Config.qwen3_8b(), 36)) + 4096 + head == 8_190_735_360


def test_a_missing_and_a_foreign_tensor_are_both_reported(pair):
    config = Qwen3Config(128, 32, 96, 3, 4, 2, 16, 1e-6, 1e6)  # the file holds a fourth layer
    with pytest.raises(WeightsError, match=r"layers\.3\.mlp\.down_proj\.weight: expected exactly"):
        load_tree(weight_files(pair[1] / "base"), qwen3_table(config, 3), shapes_of(config, 3))


def test_the_config_is_read_and_its_rope_base_is_never_guessed():
    json_4b = dict(
        model_type="qwen3", vocab_size=151936, hidden_size=2560, intermediate_size=9728,
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        rms_norm_eps=1e-6, rope_theta=1000000, rope_scaling=None, sliding_window=None,
    )
    assert Qwen3Config.from_json(json_4b) == Qwen3Config.qwen3_4b()
    new = {k: v for k, v in json_4b.items() if k != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    assert Qwen3Config.from_json({**new, "rope_parameters": rope}) == Qwen3Config.qwen3_4b()
    with pytest.raises(ValueError, match="found neither rope_theta nor rope_parameters"):
        Qwen3Config.from_json(new)
    bad = {**json_4b, "attention_bias": True, "use_sliding_window": True, "head_dim": None,
           "rope_scaling": {"type": "yarn", "factor": 4.0}, "layer_types": ["sliding_attention"]}
    with pytest.raises(ValueError) as e:
        Qwen3Config.from_json(bad)
    for word in ("attention_bias", "use_sliding_window", "head_dim: missing", "'yarn'",
                 "sliding_attention"):
        assert word in str(e.value)


@pytest.mark.parametrize("taps", [(), (0,), (5,)])
def test_a_tap_out_of_reach_is_an_error(taps):
    config = Qwen3Config(128, 32, 96, 4, 4, 2, 16, 1e-6, 1e6)
    ids = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=re.escape("expected taps from 1 to 4")):
        Qwen3(config, 4).init(jax.random.key(0), ids, ids > 0, taps)
    with pytest.raises(ValueError, match="expected a depth of 1 to 4, got 5"):
        Qwen3(config, 5).init(jax.random.key(0), ids, ids > 0)

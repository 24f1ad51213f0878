"""Streaming of safetensors into parameter trees: values, refusals, memory."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dopsd_jax.core import trees
from dopsd_jax.weights.load import load_tree, map_safetensors, weight_files
from dopsd_jax.weights.names import CONV, LINEAR, Rule, WeightsError, export_names, rule

TABLE = [
    rule("embed.weight", "embed/kernel", LINEAR),
    rule("conv.weight", "conv/kernel", CONV),
    rule("layers.{layer}.fc.weight", "layers/fc/kernel", LINEAR),
    rule("layers.{layer}.{p}.weight", "layers/{p}/scale", p="norm1|norm2"),
    rule("count", "count"),
    Rule(r"rotary\..*", None),
]
LAYERS = 3


def tensors(dtype=np.float32):
    """A checkpoint of a toy network; one tensor of it is deliberately left unused."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    out = {"embed.weight": normal(5, 7), "conv.weight": normal(6, 4, 3, 3),
           "count": np.int32(7), "rotary.freqs": normal(4)}
    for i in range(LAYERS):
        out[f"layers.{i}.fc.weight"] = normal(300, 260)  # more than one block of columns
        out[f"layers.{i}.norm1.weight"] = normal(9)
        out[f"layers.{i}.norm2.weight"] = normal(9)
    return {k: np.asarray(v) for k, v in out.items()}


SHAPES = jax.eval_shape(lambda: {
    "embed": {"kernel": jnp.zeros((7, 5))},
    "conv": {"kernel": jnp.zeros((3, 3, 4, 6))},
    "layers": {
        "fc": {"kernel": jnp.zeros((LAYERS, 260, 300))},
        "norm1": {"scale": jnp.zeros((LAYERS, 9))},
        "norm2": {"scale": jnp.zeros((LAYERS, 9))},
    },
    "count": jnp.zeros((), jnp.int32),
})


def write(directory, data, shards=2, index=True):
    """The checkpoint as `shards` files with an index, as diffusers writes it."""
    names = sorted(data)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save_file({n: data[n] for n in names[i::shards]}, directory / file)
    if index:
        weight_map = {n: files[names.index(n) % shards] for n in names}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    return [directory / f for f in files]


def load(directory, **kwargs):
    return load_tree(weight_files(directory), TABLE, SHAPES, **kwargs)


def expected(data):
    want = {
        "embed/kernel": data["embed.weight"].T,
        "conv/kernel": data["conv.weight"].transpose(2, 3, 1, 0),
        "layers/fc/kernel": np.stack([data[f"layers.{i}.fc.weight"].T for i in range(LAYERS)]),
    }
    for p in ("norm1", "norm2"):
        scales = [data[f"layers.{i}.{p}.weight"] for i in range(LAYERS)]
        want[f"layers/{p}/scale"] = np.stack(scales)
    return want


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16"])
def test_shards_stream_into_stacked_layers_in_the_asked_dtype(tmp_path, stored, asked):
    data = tensors(stored)
    write(tmp_path, data)
    got = trees.flatten(load(tmp_path, dtype=asked and jnp.dtype(asked)))
    assert set(got) == set(trees.flatten(SHAPES))
    for name, want in expected(data).items():
        dtype = jnp.dtype(asked or stored)
        assert got[name].dtype == dtype, name
        np.testing.assert_array_equal(np.asarray(got[name]), want.astype(dtype), err_msg=name)


def test_integers_keep_their_dtype(tmp_path):
    data = tensors() | {"count": np.array(2**24 + 1, np.int32)}
    write(tmp_path, data)
    got = load(tmp_path, dtype=jnp.bfloat16)["count"]
    assert got.dtype == jnp.int32 and int(got) == 2**24 + 1


def test_integers_for_floats_are_refused(tmp_path):
    data = tensors()
    data["embed.weight"] = np.zeros(data["embed.weight"].shape, np.int8)
    write(tmp_path, data)
    with pytest.raises(WeightsError, match="embed.weight: expected floats for embed/kernel, found "
                                           "int8; quantised weights are not read"):
        load(tmp_path)


def test_what_is_loaded_does_not_hang_on_the_file(tmp_path):
    data = tensors()
    (file,) = write(tmp_path, data, shards=1)
    got = load(tmp_path)
    file.write_bytes(b"\0" * file.stat().st_size)
    for name, want in expected(data).items():
        np.testing.assert_array_equal(np.asarray(trees.flatten(got)[name]), want)


def test_exported_names_and_tensors_are_those_that_were_loaded(tmp_path):
    data = tensors()
    write(tmp_path, data)
    flat = {k: np.asarray(v) for k, v in trees.flatten(load(tmp_path)).items()}
    out = export_names(TABLE, [n for n in data if n != "rotary.freqs"], flat)
    assert set(out) == set(data) - {"rotary.freqs"}
    for name, value in out.items():
        np.testing.assert_array_equal(value, data[name], err_msg=name)


def test_progress_counts_every_tensor(tmp_path):
    write(tmp_path, tensors())
    seen = []
    load(tmp_path, report=lambda done, of: seen.append((done, of)))
    assert seen == [(i + 1, 12) for i in range(12)]


def test_a_single_file_needs_no_index(tmp_path):
    write(tmp_path, tensors(), shards=1, index=False)
    assert load(tmp_path)["embed"]["kernel"].shape == (7, 5)


def test_unaligned_tensors_are_read(tmp_path):
    # Old writers did not pad the header, so that floats may start at an odd byte.
    header = json.dumps(
        {"embed.weight": {"dtype": "F32", "shape": [5, 7], "data_offsets": [0, 140]}}
    ).encode()
    header += b" " * (len(header) % 2 == 0)
    value = tensors()["embed.weight"]
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + value.tobytes())
    got = load_tree([path], TABLE[:1], {"embed": SHAPES["embed"]})
    np.testing.assert_array_equal(np.asarray(got["embed"]["kernel"]), value.T)


def test_every_violation_stands_in_one_error(tmp_path):
    data = tensors()
    del data["layers.1.norm1.weight"]
    data["layers.7.norm1.weight"] = data["layers.0.norm1.weight"]
    data["embed.weight"] = data["embed.weight"].T.copy()
    data["surprise"] = np.zeros(3, np.float32)
    data["conv.weight"] = data["conv.weight"][..., 0]
    write(tmp_path, data)
    with pytest.raises(WeightsError) as e:
        load(tmp_path)
    text = str(e.value)
    assert "5 tensors or parameters do not fit the network" in text
    for part in (
        "surprise: expected exactly one rule of the table, matched none",
        "embed.weight: expected a shape that becomes (7, 5) in embed/kernel, got (7, 5)",
        "conv.weight: expected a shape that becomes (3, 3, 4, 6) in conv/kernel, got (6, 4, 3)",
        "layers.7.norm1.weight: the network has only 3 layers in layers/norm1/scale",
        "parameter layers/norm1/scale, layers [1]: no tensor in the files fills it",
    ):
        assert part in text, text


def test_a_parameter_without_any_tensor_is_named(tmp_path):
    data = tensors()
    del data["embed.weight"]
    write(tmp_path, data)
    with pytest.raises(WeightsError, match="parameter embed/kernel: no tensor in the files"):
        load(tmp_path)


def test_a_tensor_of_a_parameter_that_the_network_lacks_is_named(tmp_path):
    write(tmp_path, tensors())
    shapes = {k: v for k, v in SHAPES.items() if k != "embed"}
    with pytest.raises(WeightsError, match=r"embed\.weight: the network has no parameter embed/k"):
        load_tree(weight_files(tmp_path), TABLE, shapes)


def test_two_rules_for_one_tensor_are_refused(tmp_path):
    write(tmp_path, tensors())
    with pytest.raises(WeightsError, match=r"count: expected exactly one rule .* matched count, c"):
        load_tree(weight_files(tmp_path), [*TABLE, Rule("c.*t", "count")], SHAPES)


def test_two_tensors_for_one_parameter_are_refused(tmp_path):
    data = tensors()
    write(tmp_path, data | {"embed2.weight": data["embed.weight"]})
    table = [*TABLE, rule("embed2.weight", "embed/kernel", LINEAR)]
    with pytest.raises(WeightsError, match=r"embed/kernel is already filled by embed"):
        load_tree(weight_files(tmp_path), table, SHAPES)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    _, second = write(tmp_path, tensors())
    save_file(tensors(), second)
    with pytest.raises(WeightsError, match=(
        r"conv\.weight: stands in more than one file, model-00001-of-00002\.safetensors and "
        r"model-00002"
    )):
        load(tmp_path)


def test_truncated_and_foreign_files_are_named_together(tmp_path):
    first, second = write(tmp_path, tensors())
    first.write_bytes(first.read_bytes()[:-10])
    second.write_bytes(b"<html>not found</html>")
    with pytest.raises(WeightsError) as e:
        load(tmp_path)
    for file in (first, second):
        assert f"{file}: truncated or not a safetensors file" in str(e.value)


def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(WeightsError, match=r"model.safetensors: this is a git-lfs pointer.* pull`"):
        load_tree([file], [], {})


def test_a_file_cut_inside_its_header_is_named(tmp_path):
    (file,) = write(tmp_path, tensors(), shards=1)
    for size in (0, 5, 100):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(WeightsError, match="truncated or not a safetensors file"):
            map_safetensors(file)


def test_a_missing_shard_is_named(tmp_path):
    _, second = write(tmp_path, tensors())
    second.unlink()
    with pytest.raises(WeightsError, match=f"names 2 shards, missing: {second.name}; download"):
        weight_files(tmp_path)


def test_missing_files_and_directories_are_named(tmp_path):
    with pytest.raises(WeightsError, match="nowhere: expected a directory of model weights"):
        weight_files(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"expected one \.safetensors file .* found none"):
        weight_files(tmp_path)
    with pytest.raises(WeightsError, match=r"a\.safetensors: no such file"):
        load_tree([tmp_path / "a.safetensors"], TABLE, SHAPES)


def test_several_files_without_an_index_are_refused(tmp_path):
    write(tmp_path, tensors(), index=False)
    with pytest.raises(WeightsError, match=r"one \.safetensors\.index\.json, found model-"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "model.pt", "model.pth", "model.pkl"])
def test_pickles_are_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(WeightsError, match=f"only pickled weights \\({name}\\); these can"):
        weight_files(tmp_path)
    with pytest.raises(WeightsError, match="can run code when opened and is never read here"):
        load_tree([tmp_path / name], TABLE, SHAPES)


def test_an_index_that_names_a_pickle_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"a": "model.bin"}}')
    with pytest.raises(WeightsError, match="can run code when opened and is never read here"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text,message",
    [
        ('{"weight_map": {"a": ', r"expected JSON with a weight_map .*JSONDecodeError"),
        ("{}", r"expected JSON with a weight_map .*KeyError"),
        ("[]", r"expected JSON with a weight_map .*TypeError"),
        ('{"weight_map": ["a"]}', r"expected JSON with a weight_map .*AttributeError"),
        ('{"weight_map": {"a": 3}}', r"expected JSON with a weight_map .*TypeError"),
        ('{"weight_map": {}}', r"expected a weight_map to plain .* beside it, found \[\]"),
        ('{"weight_map": {"a": "../b.safetensors"}}', r"expected a weight_map to plain .*'\.\./b"),
    ],
)
def test_a_malformed_index_is_named(tmp_path, text, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(WeightsError, match=f"{index.name}: {message}"):
        weight_files(tmp_path)


def run_script(script, *args, **env):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        capture_output=True, text=True, timeout=1800,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_shards_land_on_a_mesh_as_asked(tmp_path):
    script = """
        import json, sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from dopsd_jax.core import trees
        from dopsd_jax.weights.load import load_tree
        from dopsd_jax.weights.names import LINEAR, rule

        table = [rule("layers.{layer}.fc.weight", "layers/fc/kernel", LINEAR),
                 rule("layers.{layer}.norm.weight", "layers/norm/scale"),
                 rule("embed.weight", "embed/kernel", LINEAR)]
        shapes = jax.eval_shape(lambda: {
            "layers": {"fc": {"kernel": jnp.zeros((3, 8, 12))},
                       "norm": {"scale": jnp.zeros((3, 5))}},
            "embed": {"kernel": jnp.zeros((4, 16))}})
        mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
        specs = {"layers": {"fc": {"kernel": P(None, "fsdp", "tensor")}, "norm": {"scale": P()}},
                 "embed": {"kernel": P("fsdp")}}
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs,
                                 is_leaf=lambda s: isinstance(s, P))
        tree = load_tree([sys.argv[1]], table, shapes, shardings=shardings)
        for name, x in trees.flatten(tree).items():
            want = trees.flatten(shardings)[name]
            assert x.sharding.is_equivalent_to(want, x.ndim), (name, x.sharding)
        flat = trees.flatten(tree)
        parts = {n: list(x.addressable_shards[0].data.shape) for n, x in flat.items()}
        values = {n: np.asarray(x).tolist() for n, x in flat.items()}
        print(json.dumps({"parts": parts, "values": values}))
    """
    rng = np.random.default_rng(0)
    data = {"embed.weight": rng.standard_normal((16, 4), np.float32)}
    for i in range(3):
        data[f"layers.{i}.fc.weight"] = rng.standard_normal((12, 8), np.float32)
        data[f"layers.{i}.norm.weight"] = rng.standard_normal(5, np.float32)
    save_file(data, tmp_path / "m.safetensors")
    got = run_script(
        script, tmp_path / "m.safetensors", XLA_FLAGS="--xla_force_host_platform_device_count=4"
    )
    assert got["parts"] == {
        "layers/fc/kernel": [3, 4, 6], "layers/norm/scale": [3, 5], "embed/kernel": [2, 16]
    }
    fc = np.stack([data[f"layers.{i}.fc.weight"].T for i in range(3)])
    np.testing.assert_array_equal(np.array(got["values"]["layers/fc/kernel"], np.float32), fc)
    np.testing.assert_array_equal(
        np.array(got["values"]["embed/kernel"], np.float32), data["embed.weight"].T
    )


MEMORY_SCRIPT = """
    import json, sys, threading, time
    import jax, jax.numpy as jnp
    from dopsd_jax.core import trees
    from dopsd_jax.weights.load import load_tree
    from dopsd_jax.weights.names import LINEAR, rule

    table = [rule("layers.{layer}.fc.weight", "layers/fc/kernel", LINEAR),
             rule("embed.weight", "embed/kernel", LINEAR)]

    def shapes(layers, fan_in, fan_out):
        return jax.eval_shape(lambda: {
            "layers": {"fc": {"kernel": jnp.zeros((layers, fan_in, fan_out))}},
            "embed": {"kernel": jnp.zeros((fan_in, fan_out))}})

    def resident(field):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))

    def load(directory, shapes, dtype):
        files = [f"{directory}/{i}.safetensors" for i in (1, 2)]
        return load_tree(files, table, shapes, dtype=jnp.dtype(dtype))

    small, directory, dtype = sys.argv[1:4]
    jax.block_until_ready(load(small, shapes(2, 8, 8), dtype))  # the backend, its threads
    before, peak, done = resident("RssAnon"), [0, 0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident("RssAnon"))
            peak[1] = max(peak[1], resident("RssFile"))
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    file_before = resident("RssFile")
    thread.start()
    tree = load(directory, shapes(5, 2048, 6144), dtype)
    jax.block_until_ready(tree)
    done.set(), thread.join()
    size = trees.num_bytes(tree)
    print(json.dumps({"final": size, "above": peak[0] - before - size,
                      "mapped": peak[1] - file_before}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """300 MB in float32 (half of it in bfloat16), 50 MB a tensor, and a small one of its kind."""
    def save(directory, layers, fan_in, fan_out, dtype):
        directory.mkdir(parents=True)
        rng = np.random.default_rng(0)

        def weight():
            return rng.standard_normal((fan_out, fan_in), np.float32).astype(dtype)

        fc = {f"layers.{i}.fc.weight": weight() for i in range(layers - 1)}
        save_file(fc, directory / "1.safetensors")
        last = {f"layers.{layers - 1}.fc.weight": weight(), "embed.weight": weight()}
        save_file(last, directory / "2.safetensors")

    root = tmp_path_factory.mktemp("large")
    for name, dtype in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
        save(root / name, 5, 2048, 6144, dtype)
        save(root / f"{name}_small", 2, 8, 8, dtype)
    return root


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "stored,asked", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"),
                     ("float32", "bfloat16")],
)
def test_host_memory_above_the_arrays_is_one_tensor(large, stored, asked):
    got = run_script(MEMORY_SCRIPT, large / f"{stored}_small", large / stored, asked)
    largest = 2048 * 6144 * jnp.dtype(asked).itemsize
    mapped = 2048 * 6144 * jnp.dtype(stored).itemsize
    print(f"{stored} -> {asked}: {got['above'] / 2**20:.1f} MiB above the arrays, largest tensor "
          f"{largest / 2**20:.1f} MiB, mapped pages {got['mapped'] / 2**20:.1f} MiB")
    assert got["final"] == 6 * largest
    slack = 8 * 2**20  # stacks of threads, compiled programs
    assert got["above"] <= 1.1 * largest + slack
    assert got["mapped"] <= 1.1 * mapped + slack

"""A random Z-Image transformer of the published size, 12 GB in bfloat16: here and in diffusers.

    pytest -m slow tests/full_size -s

Needs 13 GB of disk under pytest's temporary directory, 16 GB of free memory and about 20 minutes of
2 CPU cores. The model is written shard by shard; each side then runs in a process of its own, one
after the other, once with float32 and once with bfloat16 activations over the same bfloat16
weights. torch with float32 activations is the truth that the other three are compared with.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

CONFIG = dict(
    all_patch_size=[2], all_f_patch_size=[1], in_channels=16, dim=3840, n_layers=30,
    n_refiner_layers=2, n_heads=30, n_kv_heads=30, norm_eps=1e-5, qk_norm=True, cap_feat_dim=2560,
    rope_theta=256.0, t_scale=1000.0, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512],
)
PARAMETERS = 6_154_908_736
SHARD_BYTES = 10**9
MEMORY_LIMIT = 24 * 10**9
LARGEST_TENSOR = 3840 * 10240 * 2
T, CAPTION = 0.4, 40
# XLA on CPU computes bfloat16 products in float32 and would convert the whole stack of layers
# before the loop over them, another 23 GB; without this pass it converts one layer at a time.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def inputs():
    """Latents [16, 16, 16] channels last and a caption [40, 2560], both exact in bfloat16."""
    rng = np.random.default_rng(7)
    x, text = rng.standard_normal((16, 16, 16)), rng.standard_normal((CAPTION, 2560))
    return [v.astype(ml_dtypes.bfloat16).astype(np.float32) for v in (x, text)]


class Memory:
    """Peak of anonymous memory, which unlike mapped files cannot be given back, by sampling."""

    def __init__(self):
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def now():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))

    def _watch(self):
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)

    def report(self):
        return {
            "anonymous_peak": self.peak,
            "resident_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def write(directory: Path) -> None:
    """config.json, shards and index as diffusers writes them; memory of one shard."""
    import torch
    from diffusers import ZImageTransformer2DModel
    from safetensors.numpy import save_file

    directory.mkdir()
    with torch.device("meta"):
        model = ZImageTransformer2DModel(**CONFIG)
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    model.save_config(directory)
    assert sum(int(np.prod(s)) for s in shapes.values()) == PARAMETERS
    shards, size = [[]], 0
    for name, shape in shapes.items():
        num_bytes = 2 * int(np.prod(shape))
        if size + num_bytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            # Linears keep the scale of their input; norms, biases and pads are not trivial.
            rng = np.random.Generator(np.random.SFC64([*name.encode()]))
            value = rng.standard_normal(shapes[name], np.float32)
            if "norm" in name or name == "cap_embedder.0.weight":
                value = 1 + 0.1 * value
            elif value.ndim == 2 and "pad_token" not in name:
                value *= shapes[name][1] ** -0.5
            else:
                value *= 0.1
            tensors[name] = value.astype(ml_dtypes.bfloat16)
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * PARAMETERS}, "weight_map": weight_map}
    name = "diffusion_pytorch_model.safetensors.index.json"
    (directory / name).write_text(json.dumps(index, indent=2))


def run_torch(directory: Path, out: Path) -> dict:
    """diffusers in bfloat16, then with every module in float32 for the time of its own call."""
    import torch
    from diffusers import ZImageTransformer2DModel

    memory, start = Memory(), time.time()
    model = ZImageTransformer2DModel.from_pretrained(
        directory, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True
    ).eval()
    report = {"load_seconds": time.time() - start}

    def forward(dtype):
        x, text = (torch.from_numpy(v).to(dtype) for v in inputs())
        with torch.no_grad():
            u = model([x.permute(2, 0, 1)[:, None]], torch.tensor([T]), [text], return_dict=False)
        return u[0][0][:, 0].permute(1, 2, 0).float().numpy()

    start = time.time()
    np.save(out / "torch_bfloat16.npy", forward(torch.bfloat16))
    report["bfloat16_seconds"] = time.time() - start

    kept = {}

    def widen(module, *_):
        for p in module.parameters():
            kept[p] = p.data
            p.data = p.data.float()

    def restore(module, *_):
        for p in module.parameters():
            p.data = kept.pop(p)

    stacks = ("layers", "noise_refiner", "context_refiner")
    for name, child in model.named_children():
        if name not in stacks:
            child.float()
        for block in child if name in stacks else ():
            block.register_forward_pre_hook(widen)
            block.register_forward_hook(restore)
    for name in ("x_pad_token", "cap_pad_token"):
        p = getattr(model, name)
        p.data = p.data.float()
    start = time.time()
    np.save(out / "torch_float32.npy", forward(torch.float32))
    return report | {"float32_seconds": time.time() - start} | memory.report()


def run_ours(directory: Path, out: Path) -> dict:
    import jax
    import jax.numpy as jnp

    from dopsd_jax.core import trees
    from dopsd_jax.models.z_image import ZImageConfig, ZImageTransformer
    from dopsd_jax.weights.load import load_tree, weight_files
    from dopsd_jax.weights.z_image_names import z_image_table

    config = ZImageConfig.from_json(json.loads((directory / "config.json").read_text()))
    x, caption = inputs()
    text = np.zeros((1, 64, caption.shape[1]), np.float32)
    text[0, :CAPTION] = caption
    mask = np.arange(64)[None] < CAPTION
    args = (jnp.asarray(x)[None], jnp.asarray([T], jnp.float32), jnp.asarray(text), mask)
    shapes = jax.eval_shape(ZImageTransformer(config).init, jax.random.key(0), *args)["params"]

    memory, before, start = Memory(), Memory.now(), time.time()
    params = jax.block_until_ready(
        load_tree(weight_files(directory), z_image_table(config), shapes)
    )
    report = {
        "load_seconds": time.time() - start,
        "parameters": trees.count(params),
        "load_above_arrays": memory.peak - before - trees.num_bytes(params),
    }
    for name, dtype in (("bfloat16", jnp.bfloat16), ("float32", jnp.float32)):
        net = ZImageTransformer(config, dtype)
        start = time.time()
        forward = jax.jit(
            lambda params, *args, net=net: net.apply({"params": params}, *args),
            compiler_options=COMPILER_OPTIONS,
        )
        u = np.asarray(forward(params, *args)[0], np.float32)
        np.save(out / f"ours_{name}.npy", u)
        report[f"{name}_seconds"] = time.time() - start
    return report | memory.report()


def error(got, want):
    """Largest and mean absolute difference, each relative to the same of `want`."""
    difference = np.abs(got - want)
    return {
        "max": float(difference.max() / np.abs(want).max()),
        "mean": float(difference.mean() / np.abs(want).mean()),
    }


@pytest.fixture
def scratch(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path / "transformer", ignore_errors=True)  # 12 GB


@pytest.mark.slow
def test_full_size_transformer_loads_and_equals_diffusers(scratch):
    reports = {}
    for part in ("write", "torch", "ours"):
        result = subprocess.run(
            [sys.executable, __file__, part, str(scratch)], text=True, capture_output=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu",
                 "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert result.returncode == 0, f"{part}: {result.stderr[-4000:]}"
        reports[part] = json.loads(result.stdout.splitlines()[-1])
        print(part, json.dumps(reports[part]), flush=True)
    u = {p.stem: np.load(p) for p in scratch.glob("*.npy")}
    exact = u.pop("torch_float32")
    errors = {name: error(value, exact) for name, value in sorted(u.items())}
    print("errors against torch with float32 activations", json.dumps(errors))

    assert reports["ours"]["parameters"] == PARAMETERS
    assert reports["ours"]["load_above_arrays"] <= 1.1 * LARGEST_TENSOR
    for part in ("torch", "ours"):
        assert reports[part]["anonymous_peak"] < MEMORY_LIMIT
    assert errors["ours_float32"]["max"] < 1e-4
    # bfloat16 rounds in every layer: ours may be no further from the truth than torch's, which
    # differs in the order of sums only.
    for kind in ("max", "mean"):
        assert errors["ours_bfloat16"][kind] < 1.5 * errors["torch_bfloat16"][kind]


def main(part: str, scratch: str) -> None:
    out = Path(scratch)
    start = time.time()
    function = {"torch": run_torch, "ours": run_ours}.get(part)
    if part == "write":
        write(out / "transformer")
        report = {"seconds": time.time() - start}
    else:
        report = function(out / "transformer", out)
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])

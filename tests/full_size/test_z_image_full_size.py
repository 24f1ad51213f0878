"""A random Z-Image transformer of full size, 12 GB in bfloat16, loaded and run in both worlds.

    pytest -m slow -s tests/full_size

Three processes one after the other, so that 24 GB of memory do: one writes the checkpoint shard by
shard, diffusers loads and evaluates it, then this project does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PREAMBLE = """
import json, resource, sys, threading, time
from pathlib import Path
import numpy as np

out = Path(sys.argv[1])
began, peak, done = time.time(), [0], threading.Event()

def watch():  # anonymous memory: mapped file pages can be dropped at any time and do not count
    while not done.wait(0.02):
        status = Path("/proc/self/status").read_text()
        kb = int(status.split("RssAnon:")[1].split()[0])
        peak[0] = max(peak[0], kb)

threading.Thread(target=watch, daemon=True).start()

def report(**more):
    done.set()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": round(time.time() - began), "peak_anonymous_gb": peak[0] / 1e6,
                      "peak_resident_gb": resident / 1e6, **more}))

def inputs():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 16, 12, 16), np.float32)
    text = rng.standard_normal((1, 64, 2560), np.float32)
    return x, np.array([0.25], np.float32), text, np.arange(64)[None] < 40
"""
WRITE = """
import ml_dtypes, torch
from diffusers import ZImageTransformer2DModel
from safetensors.numpy import save_file

with torch.device("meta"):
    model = ZImageTransformer2DModel(axes_lens=[1536, 512, 512])
model.save_config(out)
rng = np.random.default_rng(0)
index = {}
names = {k: tuple(v.shape) for k, v in model.state_dict().items()}
total = 2 * sum(int(np.prod(s)) for s in names.values())
count = -(-total // 2_000_000_000)

def flush():
    file = f"diffusion_pytorch_model-{len(done_files) + 1:05d}-of-{count:05d}.safetensors"
    save_file(shard, out / file, metadata={"format": "pt"})
    done_files.append(file)
    index.update({k: file for k in shard})
    shard.clear()

shard, done_files, held = {}, [], 0
for i, (name, shape) in enumerate(names.items()):
    value = rng.standard_normal(shape, np.float32)
    value *= shape[1] ** -0.5 if len(shape) == 2 and "pad" not in name else 0.2
    if "norm" in name or name == "cap_embedder.0.weight":
        value += 1
    shard[name] = value.astype(ml_dtypes.bfloat16)
    held += shard[name].nbytes
    if held >= total * (len(done_files) + 1) / count or i + 1 == len(names):
        flush()
assert len(done_files) == count, (len(done_files), count)
(out / "diffusion_pytorch_model.safetensors.index.json").write_text(
    json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
report(gigabytes=total / 1e9, shards=count)
"""
TORCH = """
import torch
from diffusers import ZImageTransformer2DModel

model = ZImageTransformer2DModel.from_pretrained(out, torch_dtype=torch.bfloat16).eval()
loaded = time.time() - began
x, t, text, mask = inputs()
with torch.no_grad():
    u = model([torch.from_numpy(x[0]).permute(2, 0, 1)[:, None].bfloat16()], torch.from_numpy(t),
              [torch.from_numpy(text[0][mask[0]]).bfloat16()], return_dict=False)[0]
np.save(out / "torch.npy", u[0][:, 0].permute(1, 2, 0).float().numpy())
report(load_seconds=round(loaded))
"""
OURS = """
import jax, jax.numpy as jnp
from dopsd_jax.core import trees
from dopsd_jax.models.z_image import ZImageConfig, ZImageTransformer
from dopsd_jax.weights.load import load_tree, weight_files
from dopsd_jax.weights.pipeline import transformer_shapes
from dopsd_jax.weights.z_image_names import z_image_table

config = ZImageConfig.from_json(json.loads((out / "config.json").read_text()))
net = ZImageTransformer(config, jnp.bfloat16)
params = load_tree(weight_files(out), z_image_table(config), transformer_shapes(net),
                   dtype=jnp.bfloat16)
jax.block_until_ready(params)
loaded, after_load = time.time() - began, peak[0] / 1e6
u = jax.jit(net.apply)({"params": params}, *inputs())
np.save(out / "ours.npy", np.asarray(u[0], np.float32))
report(load_seconds=round(loaded), peak_anonymous_gb_of_loading=after_load,
       arrays_gb=trees.num_bytes(params) / 1e9, parameters=trees.count(params))
"""


def run(name: str, code: str, out: Path) -> dict:
    env = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    done = subprocess.run([sys.executable, "-c", PREAMBLE + code, str(out)], env=env,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"\n{name}: {figures}", flush=True)
    return figures


@pytest.mark.slow
def test_full_size_checkpoint_loads_and_computes_as_in_diffusers(tmp_path):
    run("write", WRITE, tmp_path)
    run("diffusers", TORCH, tmp_path)
    ours = run("dopsd_jax", OURS, tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()  # 12 GB that pytest would keep

    want, got = np.load(tmp_path / "torch.npy"), np.load(tmp_path / "ours.npy")
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    print(f"relative error, both in bfloat16: rms {error:.4f}, max "
          f"{np.abs(got - want).max() / np.abs(want).max():.4f}")
    assert ours["parameters"] == 6_154_908_736
    # Above the arrays: the largest tensor (79 MB), its copy while it is placed, and Python's own.
    assert ours["peak_anonymous_gb_of_loading"] < ours["arrays_gb"] + 1.0
    assert want.std() > 0.1
    assert error < 0.05

"""What the full-size checks of the families share: shards, processes, memory, the comparison."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np

SHARD_BYTES = 10**9
# XLA on CPU computes bfloat16 products in float32 and would convert the whole stack of layers
# before the loop over them, as much memory again twice; without this pass it converts one at a
# time.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


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


def bfloat16_numbers(*shapes):
    """Standard normal float32 arrays that are exact in bfloat16."""
    rng = np.random.default_rng(7)
    return [
        rng.standard_normal(s).astype(ml_dtypes.bfloat16).astype(np.float32) for s in shapes
    ]


def write(directory: Path, make_model, scale, parameters: int) -> None:
    """config.json, shards and index as diffusers writes them; memory of one shard.

    Args:
        directory: Made.
        make_model: () -> the torch model, called where its tensors take no memory.
        scale: (name, shape) -> mean and deviation of a tensor.
        parameters: How many there must be.
    """
    import torch
    from safetensors.numpy import save_file

    directory.mkdir()
    with torch.device("meta"):
        model = make_model()
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    model.save_config(directory)
    assert sum(int(np.prod(s)) for s in shapes.values()) == parameters
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
            rng = np.random.Generator(np.random.SFC64([*name.encode()]))
            value = rng.standard_normal(shapes[name], np.float32)
            mean, deviation = scale(name, shapes[name])
            value *= np.float32(deviation)
            value += np.float32(mean)
            tensors[name] = value.astype(ml_dtypes.bfloat16)
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": weight_map}
    name = "diffusion_pytorch_model.safetensors.index.json"
    (directory / name).write_text(json.dumps(index, indent=2))


def widen_at_call(model, stacks) -> None:
    """Makes torch compute in float32: blocks of the stacks only while they are called."""
    kept = {}

    def widen(module, *_):
        for p in module.parameters():
            kept[p] = p.data
            p.data = p.data.float()

    def restore(module, *_):
        for p in module.parameters():
            p.data = kept.pop(p)

    for name, child in model.named_children():
        if name not in stacks:
            child.float()
        for block in child if name in stacks else ():
            block.register_forward_pre_hook(widen)
            block.register_forward_hook(restore)
    for p in model.parameters(recurse=False):
        p.data = p.data.float()


def run_torch(directory: Path, out: Path, model_class, stacks, forward) -> dict:
    """diffusers in bfloat16, then in float32; `forward`: (model, dtype) -> float32 array."""
    import torch

    memory, start = Memory(), time.time()
    model = model_class.from_pretrained(
        directory, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True
    ).eval()
    report = {"load_seconds": time.time() - start}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        if name == "float32":
            widen_at_call(model, stacks)
        start = time.time()
        with torch.no_grad():
            np.save(out / f"torch_{name}.npy", forward(model, dtype))
        report[f"{name}_seconds"] = time.time() - start
    return report | memory.report()


def run_ours(directory: Path, out: Path, network, table, args) -> dict:
    """Loads and evaluates ours; `network`: dtype -> module; `args`: of its call."""
    import jax
    import jax.numpy as jnp

    from dopsd_jax.core import trees
    from dopsd_jax.weights.load import load_tree, weight_files

    shapes = jax.eval_shape(network(jnp.float32).init, jax.random.key(0), *args)["params"]
    memory, before, start = Memory(), Memory.now(), time.time()
    params = jax.block_until_ready(load_tree(weight_files(directory), table, shapes))
    report = {
        "load_seconds": time.time() - start,
        "parameters": trees.count(params),
        "load_above_arrays": memory.peak - before - trees.num_bytes(params),
    }
    for name, dtype in (("bfloat16", jnp.bfloat16), ("float32", jnp.float32)):
        net = network(dtype)
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


def run_all_and_compare(file, scratch, *, parameters, largest_tensor, memory_limit) -> None:
    """Runs the parts of a test file in processes of their own and compares what they saved."""
    reports = {}
    for part in ("write", "torch", "ours"):
        result = subprocess.run(
            [sys.executable, file, part, str(scratch)], text=True, capture_output=True,
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

    assert reports["ours"]["parameters"] == parameters
    assert reports["ours"]["load_above_arrays"] <= 1.1 * largest_tensor
    for part in ("torch", "ours"):
        assert reports[part]["anonymous_peak"] < memory_limit
    assert errors["ours_float32"]["max"] < 1e-4
    # bfloat16 rounds in every layer: ours may be no further from the truth than torch's, which
    # differs in the order of sums only.
    for kind in ("max", "mean"):
        assert errors["ours_bfloat16"][kind] < 1.5 * errors["torch_bfloat16"][kind]


def main(parts, part: str, scratch: str) -> None:
    """One part as a process: `parts` are functions of (model's directory, where results go)."""
    out, start = Path(scratch), time.time()
    report = parts[part](out / "transformer", out) or {"seconds": time.time() - start}
    print(json.dumps(report))

"""One train step for three commands: what train runs, plan compiles and bench times.

The commands run as ever until they come to what they gave to jax.jit under the name train_step; it
is caught there, with its options and arguments, whoever made it.
"""

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common, flux2_klein_4b_edit
from dopsd_jax import encode as encode_lib
from dopsd_jax import plan as plan_lib
from dopsd_jax import train as train_lib
from dopsd_jax.bench import ours
from dopsd_jax.bench.case import Case
from dopsd_jax.core import child, sharding, trees
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.method import flow, lora
from dopsd_jax.method.baselines import draw_sigma
from dopsd_jax.method.train_step import Method, draw_noise, make_optimizer, method_of
from dopsd_jax.models.layers import Dense
from dopsd_jax.planning import compiler, lowering, phases
from dopsd_jax.run.step import Step, shared_step
from dopsd_jax.run.workdir import flat_config
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.pipeline import load_pipeline
from dopsd_jax.weights.shapes import transformer_shapes
from dopsd_jax.weights.z_image_names import Z_IMAGE_TARGETS
from tests.commands import ROOT, environment

CASE = Case("small", 32, 2, student_tokens=32, teacher_tokens=64)


class Caught(Exception):
    """A train step at its first use: the function, the options of its jit, and its arguments."""

    def __init__(self, function, options, arguments):
        super().__init__("the step was used")
        self.function, self.options, self.arguments = function, options, arguments

    @property
    def method(self):
        return inspect.getclosurevars(self.function).nonlocals["method"]

    def lower(self):
        return jax.jit(self.function, **self.options).lower(*self.arguments)


def catch(command):
    """What the command, a function without arguments, uses as its train step."""
    real = jax.jit

    class Trap:
        def __init__(self, function, options):
            self.function, self.options = function, options

        def __call__(self, *arguments):
            raise Caught(self.function, self.options, arguments)

        lower = __call__

    def jit(*functions, **options):
        if functions and getattr(functions[0], "__name__", "") == "train_step":
            return Trap(functions[0], options)
        return real(*functions, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", jit)
        shared_step.cache_clear()
        with pytest.raises(Caught) as caught:
            command()
    shared_step.cache_clear()
    return caught.value


def of_train(config, workdir):
    return catch(lambda: train_lib.train(config, workdir))


def of_plan(config):
    """What `plan` makes its child lower: by the JSON that it hands over, for this machine."""
    with pytest.MonkeyPatch.context() as patch:
        def compile_here(command, module, *, full=False):
            assert command[1:3] == ["-m", phases.__name__] and module == "train_step"
            patch.setattr(sys, "argv", [command[2], command[3], "directory"])
            phases.main()

        patch.setattr(compiler, "compile_in_child", compile_here)
        patch.setattr(compiler, "has_tpu_compiler", lambda: True)
        patch.setattr(child, "end_with_parent", lambda: None)
        patch.setattr(
            lowering, "topology_mesh",
            lambda config, topology: sharding.make_mesh(**config.mesh.to_dict()),
        )
        topology = {1: "v5e:1x1", 4: "v5e:2x2"}[jax.device_count()]
        return catch(lambda: plan_lib.plan(config, topology))


def of_bench(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "config_of", lambda case: config)
        weights = jax.tree.map(
            lambda s: np.zeros(s.shape, s.dtype),
            transformer_shapes(ours.denoiser_of(CASE).network),
        )
        patch.setattr(ours, "random_weights", lambda *_: weights)
        return catch(lambda: ours.measure(CASE))


def described(tree):
    """Structure of a tree, and shape, dtype and sharding of its arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype, x.sharding) for x in leaves]


def assert_same_step(one, two):
    assert described(one.arguments) == described(two.arguments)
    assert one.options == two.options
    assert one.lower().as_text() == two.lower().as_text()


@pytest.fixture
def config(short_run):
    """A run that draws nothing, and calls its step without a look at what others would need."""
    short_run.sample_every, short_run.remat = 0, "full"
    return short_run


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("keep") / "prompts.txt"
    file.write_text("a red fox\n\na lighthouse\n")
    return file


@pytest.fixture(scope="module")
def cache(make_short_run, prompts, tmp_path_factory):
    """What the encoders make for `config`, whatever it is changed to."""
    config = make_short_run()
    config.states = "noised"  # reads most: two contexts and targets
    config.cache = str(tmp_path_factory.mktemp("step") / "cache")
    encode_lib.encode(config)
    config.states, config.keep_share = "student", 0.5
    config.keep_prompts = str(prompts)
    encode_lib.encode(config)
    return config.cache


@pytest.fixture
def commands(config, cache, prompts, tmp_path):
    """Command -> (changes of its config) -> the step that it then uses."""
    def changed(config, changes):
        config = config.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        if config.keep_share:
            config.keep_prompts = str(prompts)
        return config

    def train(**changes):
        workdir = tmp_path / ("run " + " ".join(map(str, changes.values())))
        return of_train(changed(config, {"cache": cache} | changes), workdir)

    return {
        "train": train, "plan": lambda **changes: of_plan(changed(config, changes)),
        "bench": lambda **changes: of_bench(changed(ours.config_of(CASE), changes)),
    }


def write_lora(config, folder):
    """A LoRA file of the config's model, of rank 2."""
    pipe = load_pipeline(config.model, parts=())
    targets = lora.parse_targets(config.lora.targets, pipe.lora.targets)
    tree = lora.init(jax.random.key(3), transformer_shapes(pipe.denoiser.network), targets, 2)
    file = folder / "lora.safetensors"
    if not file.exists():
        lora_files.save_diffusers(file, tree, lora_files.LoraSpec(2, 2.0), pipe.lora.modules)
    return str(file)


@pytest.mark.parametrize("changes", [
    {}, {"accumulation": 2, "teacher": "live", "moments_dtype": "int8"},
    {"trainable": "full", "moments_dtype": "bfloat16", "ema_dtype": "bfloat16"},
    {"objective": "sft"}, {"states": "noised", "dtype": "bfloat16", "remat": "matmuls"},
    {"num_steps": 8, "schedule": "reference8", "shift": 2.0}, {"anchor": 2.0},
    {"anchor": 2.0, "trainable": "full"}, {"keep_share": 0.5},
    {"anchor": 2.0, "retain": "start", "base_lora": "LORA:0.5", "init_lora": "LORA"},
    {"remat": "auto"},
], ids=str)
def test_a_plan_lowers_the_very_step_that_a_run_calls(
    config, cache, prompts, tmp_path, changes
):
    if "dtype" not in changes:  # in bfloat16 the encoders make something else
        config.cache = cache
    config.update(changes)
    if config.keep_share:
        config.keep_prompts = str(prompts)
    for key in ("base_lora", "init_lora"):
        config[key] = config[key].replace("LORA", write_lora(config, tmp_path))
    of_run = of_train(config, tmp_path / "run")
    assert_same_step(of_run, of_plan(config))
    assert_same_step(of_run, catch(lambda: plan_lib.plan_here(config)))


@pytest.mark.parametrize("recipe", ["edit", "edit_ref"])
def test_a_plan_counts_the_references_of_a_run(tiny_flux2, two_photos, tmp_path, recipe):
    config = flux2_klein_4b_edit.get_config()
    pictures = [str(two_photos / f"{name}.png") for name in ("astronaut", "chelsea")]
    row = {"image_path": pictures if recipe == "edit_ref" else pictures[0], "caption": "a photo"}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 2))
    config.model, config.data, config.recipe = str(tiny_flux2), str(tmp_path / "rows.jsonl"), recipe
    config.update({
        "data_root": str(two_photos), "buckets": "64x64", "batch_size": 2, "dtype": "float32",
        "num_steps": 2, "sample_every": 0, "preflight": "off", "gauge_prompts": (),
        "remat": "full",
    })
    config.lora.rank = 4
    caught = of_train(config, tmp_path / "run")
    assert_same_step(caught, of_plan(config))
    student, teacher = caught.arguments[2].student_ctx, caught.arguments[2].teacher_ctx
    assert (student.ref_tokens is None) == (recipe == "edit") and teacher.ref_tokens is not None


@pytest.mark.parametrize("objective", ["dopsd", "sft"])
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_noise_and_its_levels_follow_the_shift(config, cache, tiny, tmp_path, objective, shift):
    """0 is the model's own shift."""
    config.cache, config.objective, config.shift = cache, objective, shift
    state, _, batch = of_train(config, tmp_path).arguments
    own = load_pipeline(tiny.pipeline, parts=()).shift
    assert own not in (1.0, 2.0)
    want = flow.make_sigmas(config.schedule, config.num_steps, shift or own)
    np.testing.assert_allclose(batch.sigmas, want, rtol=1e-6)
    rng = jax.random.wrap_key_data(state.rng)
    np.testing.assert_array_equal(batch.noise, draw_noise(rng, 0, batch.noise.shape))
    assert (batch.sigma is None) == (objective == "dopsd")
    if objective == "sft":
        sigma = draw_sigma(rng, 0, config.batch_size, shift or own)
        np.testing.assert_allclose(batch.sigma, sigma, rtol=1e-6)


def test_bench_differs_from_the_default_recipe_in_these_keys_alone():
    base, case = (flat_config(c.to_dict()) for c in (common.base(), ours.config_of(CASE)))
    assert base.keys() == case.keys()
    assert {key for key in base if base[key] != case[key]} == {
        "shift", "weight_decay", "text_tokens", "teacher_tokens", "batch_size", "dtype", "remat",
    }


def test_bench_calls_the_step_as_it_is_lowered():
    caught = of_bench(ours.config_of(CASE))
    step, bucket = ours.step_of(CASE), Bucket(CASE.side, CASE.side)
    shapes = step.shapes(bucket)
    assert described(caught.arguments) == described((shapes.state, shapes.base, shapes.batch))
    assert caught.lower().as_text() == step.lower(bucket).as_text()


# Field of Method -> a change of the config that changes it and no other.
FIELDS = {
    "trainable": {"trainable": "full"}, "lora_scale": {"lora.alpha": 3.0},
    "teacher": {"teacher": "frozen"}, "ema_decay": {"ema_decay": 0.5},
    "loss": {"loss": "velocity"}, "states": {"states": "teacher"},
    "accumulation": {"accumulation": 2}, "anchor": {"anchor": 2.0}, "keeps": {"keep_share": 0.5},
}
NO_KEY = {"ema_warmup"}  # for the mini model's stages, which build their steps themselves


def test_every_field_of_the_method_has_a_case():
    assert {f.name for f in dataclasses.fields(Method)} == {*FIELDS, *NO_KEY}


@pytest.mark.parametrize("command", ["train", "plan", "bench"])
def test_every_field_of_the_method_reaches_every_command(commands, command):
    plain, changed = commands[command]().method, {}
    for field, changes in FIELDS.items():
        method = commands[command](**changes).method
        changed[field] = [f.name for f in dataclasses.fields(Method)
                          if getattr(method, f.name) != getattr(plain, f.name)]
    assert changed == {field: [field] for field in FIELDS}


def test_what_has_no_key_is_left_alone(config):
    method = method_of(config)
    assert {name: getattr(method, name) for name in NO_KEY} == {
        f.name: f.default for f in dataclasses.fields(Method) if f.name in NO_KEY
    }


# Parameter of make_optimizer -> another value of the key of its name.
OPTIMIZER = {
    "learning_rate": 1e-3, "warmup_steps": 7, "b1": 0.5, "b2": 0.5, "eps": 1e-3,
    "weight_decay": 0.5, "max_grad_norm": 7.0, "moments_dtype": "bfloat16",
}
OTHERS = {"objective": "sft", "num_steps": 2, "ema_dtype": "bfloat16", "dtype": "bfloat16",
          "lora.rank": 2, "lora.targets": "x_embedder/kernel", "batch_size": 4, "text_tokens": 64}


def test_every_key_of_the_optimizer_has_a_case():
    keys = {*inspect.signature(make_optimizer).parameters} & {*common.base()}
    # The number of steps is for a rate that falls at the end, as in the mini model's stages.
    assert keys == {*OPTIMIZER, "num_train_steps"}


class Network(nn.Module):
    """Two layers: what a step makes of its config does not depend on the network."""

    dtype: Any = jnp.float32
    remat: str = "none"

    def smallest_inputs(self):
        return jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 2, 4))

    @nn.compact
    def __call__(self, x, text):
        text = Dense(4, name="text_embedder")(jnp.mean(text, 1))
        return Dense(4, name="x_embedder")(x) + text[:, None, None]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    network: Network
    mesh: Any = None
    text_width = 4

    def latent_shape(self, height, width):
        return height // 8, width // 8, 4

    def velocity(self, variables, x, sigma, ctx):
        return self.network.apply(variables, x, ctx.text)


def step_of(changes):
    config = ours.config_of(CASE)
    config.update_from_flattened_dict(changes)
    presets = {"published": (".*/kernel",)}
    return Step(config, Denoiser(Network()), presets, sharding.make_mesh())


def test_whatever_changes_the_step_changes_the_program():
    def program(changes):
        return step_of(changes).lower(Bucket(32, 32)).as_text()

    plain = program({})
    cases = [*FIELDS.values(), *({k: v} for k, v in (OPTIMIZER | OTHERS).items())]
    assert program({}) == plain and not [c for c in cases if program(c) == plain]


def test_the_next_run_of_a_process_does_not_trace_the_same_step_again(monkeypatch):
    traced = []
    velocity = Denoiser.velocity

    def noted(self, *args):
        traced.append(self)
        return velocity(self, *args)

    monkeypatch.setattr(Denoiser, "velocity", noted)
    shared_step.cache_clear()
    for seed in (1, 2):
        step = step_of({"seed": seed})
        step.lower(Bucket(32, 32))
        assert len(traced) == 2  # student and teacher
    program = step.compile(Bucket(32, 32))
    assert step_of({"seed": 3}).compile(Bucket(32, 32)) is program
    other = step_of({"learning_rate": 0.5})
    assert other.jitted is not step.jitted and other.compile(Bucket(32, 32)) is not program


@pytest.mark.parametrize("command", ["train", "plan", "bench"])
def test_the_options_of_jit_reach_every_command(commands, command, monkeypatch):
    device = jax.devices()[0].device_kind
    assert commands[command]().options["compiler_options"] is None
    monkeypatch.setitem(sharding.COMPILER_OPTIONS, device, {"xla_an_option": "true"})
    caught = commands[command]()
    state, mesh = caught.arguments[0], jax.tree.leaves(caught.arguments)[0].sharding.mesh
    assert caught.options == {
        "donate_argnums": 0, "compiler_options": {"xla_an_option": "true"},
        "out_shardings": (jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)),
    }


@pytest.mark.parametrize("command", ["train", "plan", "bench"])
def test_the_targets_of_lora_reach_every_command(commands, command):
    target = r"layers/attention/to_q/kernel"
    for changes, want in (({}, None), ({"lora.targets": target}, {"layers/attention/to_q"})):
        state, base, _ = commands[command](**changes).arguments
        found = {name.rpartition("/")[0] for name in trees.flatten(state.student)}
        if want is None:
            kernels = lora.match_targets(base["params"], Z_IMAGE_TARGETS["published"])
            want = {name.removesuffix("/kernel") for name in kernels}
        assert found == want


def test_targets_that_match_nothing_are_refused():
    config = ours.config_of(CASE)
    config.lora.targets = "no_such"
    with pytest.raises(ValueError, match="'no_such' matches no parameter"):
        Step(config, Denoiser(Network()), {}, sharding.make_mesh())


def in_child(config, workdir):
    """On several devices, which need a process of their own."""
    sharding.MIN_SHARDED_SIZE = 1
    config = ConfigDict(json.loads(Path(config).read_text()))
    caught = of_train(config, workdir)
    assert_same_step(caught, of_plan(config))
    split = [x for x in jax.tree.leaves(caught.arguments) if not x.is_fully_replicated]
    print(json.dumps({"split": len(split), "devices": jax.device_count()}))


def test_a_plan_for_a_mesh_lowers_the_very_step_of_a_run_on_it(config, cache, tmp_path):
    config.update({"cache": cache, "batch_size": 4, "small_buckets": "repeat"})
    config.mesh.data, config.mesh.fsdp = 2, 2
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "config.json"), str(tmp_path / "run")], cwd=ROOT,
        capture_output=True, text=True, timeout=1800, check=False,
        env=environment(
            JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=4"
        ),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 4 and found["split"] > 20


if __name__ == "__main__":
    in_child(*sys.argv[1:])

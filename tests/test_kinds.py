"""Runs that train a DoRA or a LoKr: from the first state over a resume to what is exported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopsd_jax import export as export_lib
from dopsd_jax import sample, weights
from dopsd_jax import train as train_lib
from dopsd_jax.core import sharding, trees
from dopsd_jax.core.metrics import read_metrics
from dopsd_jax.method import lora as lora_lib
from dopsd_jax.models import adapters
from dopsd_jax.planning import flops
from dopsd_jax.run import loras
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.config import check_config
from dopsd_jax.run.step import Step
from dopsd_jax.weights.pipeline import transformer_shapes

KINDS = ("dora", "lokr")
DRAW = dict(num_steps=2, height=32, width=32)


@pytest.fixture(scope="module")
def pipe(tiny):
    return weights.load_pipeline(tiny.pipeline, dtype="float32")


@pytest.fixture(scope="module")
def make_config(make_short_run):
    """(kind, **changes) -> a run of two updates that draws nothing.

    Of the objective that compiles fastest; tests/method compares D-OPSD itself.
    """
    def make(kind, **changes):
        config = make_short_run()
        config.objective, config.vlm = "sft", ""
        config.sample_every, config.preflight, config.checkpoint_every = 0, "off", 1
        config.lora.kind, config.lora.factor, config.learning_rate = kind, 4, 2e-1
        config.lora.targets = "layers/attention/to_v/kernel,layers/feed_forward/w2/kernel"
        config.update_from_flattened_dict(changes)
        return config

    return make


@pytest.fixture(scope="module")
def runs(make_config, tmp_path_factory):
    """A run of each kind that was stopped after its first update and went on."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind in KINDS:
        for updates in (1, 2):
            train_lib.train(make_config(kind, num_train_steps=updates), folder / kind)
    return folder


def student(workdir, step=None):
    return trees.flatten(workdir_lib.read_lora(workdir, step=step)[0])


def draw(pipe, lora):
    return sample.generate(pipe, ["a fox"], **DRAW, seed=1, lora=lora).astype(int)


@pytest.mark.parametrize("kind, leaves", [("dora", "a b m"), ("lokr", "w1 w2_down w2_up")])
def test_every_leaf_trains_and_the_file_says_what_it_is(runs, kind, leaves):
    before, after = student(runs / kind, 1), student(runs / kind, 2)
    assert {n.rpartition("/")[2] for n in after} == set(leaves.split())
    assert all(np.abs(after[n] - x).max() > 0 for n, x in before.items())
    assert workdir_lib.read_config(runs / kind)["lora"]["kind"] == kind


def test_both_begin_at_the_untouched_model(runs):
    first = [read_metrics(runs / kind)[0]["loss"] for kind in KINDS]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_a_resumed_dora_is_that_of_a_run_without_a_stop(runs, make_config, tmp_path):
    train_lib.train(make_config("dora"), tmp_path / "run")
    want = student(tmp_path / "run")
    for name, x in student(runs / "dora").items():
        np.testing.assert_array_equal(x, want[name])


def test_the_first_student_changes_nothing_at_all(pipe, make_config):
    for kind, still in (("dora", ("b", "g")), ("lokr", ("w2_down",))):
        step = Step(make_config(kind), pipe.denoiser, pipe.lora.targets, sharding.make_mesh())
        base, state = step.init(pipe.params)
        tree = jax.jit(step.method.assemble)(base, state.student)["lora"]
        for leaves in adapters.sites(tree).values():
            assert all(not np.any(leaves[name]) for name in still)
        # What trains is freed by the step, the norms must outlive it.
        norms = {id(x) for x in jax.tree.leaves(base.get("norms", {}))}
        assert not norms & {id(x) for x in jax.tree.leaves(state)}


def test_a_run_goes_on_from_a_dora_and_can_hold_on_to_it(pipe, runs, make_config):
    config = make_config("dora", **{
        "objective": "dopsd", "init_lora": str(runs / "dora"), "lora.rank": 6, "anchor": 1.0,
        "retain": "start",
    })
    step = Step(config, pipe.denoiser, pipe.lora.targets, sharding.make_mesh(),
                *loras.stands_on(config, pipe))
    base, state = step.init(pipe.params)
    want = changes(loras.take_loras(str(runs / "dora"), pipe), pipe)
    for tree in (step.method.assemble(base, state.student)["lora"], base["start"]["lora"]):
        got = changes(tree, pipe)
        assert got.keys() == want.keys()
        for path, x in want.items():
            np.testing.assert_allclose(got[path], x, atol=1e-5 * np.abs(x).max(), err_msg=path)


def changes(tree, pipe):
    kernels = trees.flatten(pipe.params)
    return {path: np.asarray(adapters.delta(leaves, kernels[f"{path}/kernel"]))
            for path, leaves in adapters.sites(tree).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_draws_the_same(pipe, runs, tiny, tmp_path, kind):
    want = draw(pipe, str(runs / kind))
    assert np.abs(want - draw(pipe, None)).mean() > 2
    export_lib.export(str(runs / kind), "diffusers", str(tmp_path / "x.safetensors"))
    assert np.abs(draw(pipe, str(tmp_path / "x.safetensors")) - want).max() <= 1
    # From one file to another format, and at half its strength in the weights themselves.
    file = str(tmp_path / "x.safetensors")
    export_lib.export_loras(str(tiny.pipeline), [file], "peft", str(tmp_path / "peft"))
    assert np.abs(draw(pipe, str(tmp_path / "peft")) - want).max() <= 1
    export_lib.export_loras(str(tiny.pipeline), [(file, 0.5)], "diffusers",
                            str(tmp_path / "transformer"), full=True)
    for part in ("tokenizer", "text_encoder", "vae", "scheduler", "model_index.json"):
        (tmp_path / part).symlink_to(tiny.pipeline / part)
    full = weights.load_pipeline(tmp_path, dtype="float32")
    assert np.abs(draw(full, None) - draw(pipe, (file, 0.5))).max() <= 1
    with pytest.raises(ValueError, match="rank: expected none with a (DoRA|LoKr), which is writ"):
        export_lib.export_loras(str(tiny.pipeline), [file], "peft", "x", rank=2)


def test_a_lokr_adds_up_with_others_and_a_dora_is_refused_beside_them(pipe, runs, tiny):
    lora = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), lora_lib.init(
        jax.random.key(0), pipe.params, ["layers/attention/to_v/kernel"], 2
    ))
    alone = changes(loras.take_loras(str(runs / "lokr"), pipe), pipe)
    both = changes(loras.take_loras([(str(runs / "lokr"), 0.5), (lora, 3.0)], pipe), pipe)
    for path, x in alone.items():
        added = 0.06 if path.endswith("to_v") else 0.0
        np.testing.assert_allclose(both[path], 0.5 * x + added, atol=1e-6, err_msg=path)
    with pytest.raises(ValueError, match="a DoRA and another adapter at .*draw it alone"):
        loras.take_loras([str(runs / "dora"), str(runs / "lokr")], pipe)
    with pytest.raises(ValueError, match="got DoRA x 0.5; such a sum is no adapter of one kind"):
        export_lib.export_loras(str(tiny.pipeline), [(str(runs / "dora"), 0.5)], "peft", "x")


def test_flops_count_the_factors(pipe):
    """A LoKr of factor 4 with a rank: down, w1 and up of every linear, for each token."""
    shapes = transformer_shapes(pipe.denoiser.network)
    leaves = {"w1": (2, 4, 4), "w2_down": (2, 16, 3), "w2_up": (2, 3, 16)}
    tree = {"layers": {"attention": {"to_q": {
        n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in leaves.items()
    }}}}
    count = flops.forward(pipe.denoiser, shapes, tree, image=32, text=32)
    assert adapters.problem(tree["layers"]["attention"]["to_q"],
                            shapes["layers"]["attention"]["to_q"]["kernel"]) == ""
    assert count.lora == 2 * (32 + 32) * 2 * (4 * 16 * 3 + 4 * 4 * 3 + 4 * 3 * 16)


@pytest.mark.parametrize("changes, text", [
    ({"base_lora": "RUN", "lora.kind": "dora"},
     "base_lora: expected nothing with lora.kind = dora, which sets how long"),
    ({"lora.kind": "loha"}, r"lora.kind: expected one of \('lora', 'dora', 'lokr'\), got 'loha'"),
    ({"lora.factor": 0}, "lora.factor: expected -1, or a whole number from 1"),
])
def test_bad_configs_say_what_is_wrong(make_config, runs, changes, text):
    changes = {k: str(runs / "lokr") if v == "RUN" else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=text):
        check_config(make_config("lokr", **changes))


def test_a_dora_below_and_a_lora_on_top_is_refused_before_anything_compiles(
    pipe, runs, make_config
):
    config = make_config("lora", base_lora=str(runs / "dora"))
    with pytest.raises(ValueError, match="a DoRA and another adapter at"):
        Step(config, pipe.denoiser, pipe.lora.targets, sharding.make_mesh(),
             *loras.stands_on(config, pipe))

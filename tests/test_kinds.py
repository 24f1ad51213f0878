"""Runs that train a DoRA or a LoKr: from the first state over a resume to what is exported."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dopsd_jax import demo, paired, sample, weights
from dopsd_jax import export as export_lib
from dopsd_jax import train as train_lib
from dopsd_jax.core import sharding, trees
from dopsd_jax.core.metrics import read_metrics
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.method import lora as lora_lib
from dopsd_jax.method import sampling
from dopsd_jax.method.contexts import text_context
from dopsd_jax.models import adapters
from dopsd_jax.planning import flops
from dopsd_jax.run import loras, model, pictures
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.config import check_config
from dopsd_jax.run.step import Step
from dopsd_jax.weights.shapes import transformer_shapes

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


@pytest.mark.parametrize("kind", KINDS)
def test_previews_on_another_model_and_the_demo_draw_as_sample_does(
    pipe, runs, make_config, kind
):
    """On other weights; of no strength both are the untouched model."""
    other = dataclasses.replace(pipe, params=jax.tree.map(lambda x: 1.1 * x, pipe.params))
    run = str(runs / kind)
    without, half, full = (draw(other, lora) for lora in (None, (run, 0.5), run))
    assert np.abs(half - without).mean() > 1 and np.abs(half - full).mean() > 1
    player = demo.Player(other, [loras.Named(run)], 32, 32)
    got = player.draw("a fox", seed=1, num_steps=2, strengths=[0.5])
    for picture, want in zip(got, (without, half), strict=True):
        assert np.abs(picture - want[0]).max() <= 1

    config = make_config(kind, preview_model_steps=2)
    step = Step(config, pipe.denoiser, pipe.lora.targets, sharding.make_mesh())
    student = jax.tree.map(jnp.asarray, workdir_lib.read_lora(run)[0])
    noise = sampling.draw_noise([1], pipe.denoiser.latent_shape(32, 32))
    subjects = {"prompts": (noise, text_context(pipe, ["a fox"], length=pipe.text.lengths[0]))}
    moved = pictures.Moved(config, other, sharding.make_mesh(), Bucket(32, 32), step.method,
                           subjects, student)
    for picture, want in ((moved.untuned, without), (moved.drawn(student), full)):
        assert np.abs(picture["prompts"] - want).max() <= 1


def test_the_commands_draw_with_a_dora(pipe, runs, tiny, tmp_path, monkeypatch):
    """They look at LoRAs before weights are read, when a DoRA's norms are not known."""
    lora = [str(runs / "dora")]
    flagged = {"model": str(tiny.pipeline), "lora": lora, "prompt": ["a fox"], "reference": None,
               **DRAW, "seed": 1, "guidance": 0.0, "negative": "", "dtype": "float32",
               "base_dtype": "dtype", "encoder_dtype": "dtype", "cache_quantised": False,
               "out": str(tmp_path / "drawn"), **dict.fromkeys(model.FILES, "")}
    monkeypatch.setattr(sample, "FLAGS", Flags(flagged))
    sample.main()
    (file,) = (tmp_path / "drawn").glob("*.png")
    want = draw(pipe, lora[0])
    assert np.abs(np.asarray(Image.open(file)).astype(int) - want[0]).max() <= 1
    (tmp_path / "prompts.txt").write_text("a fox\n")
    plan = paired.planned(
        tmp_path / "paired", str(tiny.pipeline), None, lora, str(tmp_path / "prompts.txt"),
        first_seed=1, seeds=1, **DRAW, dtype="float32",
    )
    paired.claim(plan)
    paired.draw(plan, 1)
    for side, expected in ((paired.TUNED, want), (paired.BASE, draw(pipe, None))):
        drawn = np.asarray(Image.open(plan.file(side, (0, 1)))).astype(int)
        assert np.abs(drawn - expected[0]).max() <= 1


class Flags(dict):
    """Parsed flags, by attribute, and by name with `.value`."""

    __getattr__ = dict.__getitem__

    def __getitem__(self, name):
        return SimpleNamespace(value=getattr(self, name))


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


def test_a_lora_trains_on_top_of_a_dora_of_other_layers(runs, make_config, tmp_path):
    """Its first loss is that of a run that goes on from the same DoRA."""
    dora, targets = str(runs / "dora"), "layers/attention/to_q/kernel"
    for name, config in {
        "above": make_config("lora", base_lora=dora, **{"lora.targets": targets}),
        "further": make_config("dora", init_lora=dora),
    }.items():
        config.num_train_steps = 1
        train_lib.train(config, tmp_path / name)
    losses = [read_metrics(d)[0]["loss"] for d in (
        tmp_path / "above", tmp_path / "further", runs / "dora")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert abs(losses[0] / losses[2] - 1) > 1e-2


def test_a_dora_below_and_a_lora_on_top_is_refused_before_anything_compiles(
    pipe, runs, make_config
):
    config = make_config("lora", base_lora=str(runs / "dora"))
    with pytest.raises(ValueError, match="a DoRA and another adapter at"):
        Step(config, pipe.denoiser, pipe.lora.targets, sharding.make_mesh(),
             *loras.stands_on(config, pipe))

"""The registry of families, proven by a third one that no file of the package names."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from configs import tiny as tiny_config
from dopsd_jax import export, plan, sample, train
from dopsd_jax.core import sharding, trees
from dopsd_jax.method import lora, train_step
from dopsd_jax.models.family import Family
from dopsd_jax.models.z_image import ZImageConfig
from dopsd_jax.planning import lowering
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights import WeightsError, families, load_pipeline
from dopsd_jax.weights.lora_files import FORMATS
from dopsd_jax.weights.names import stacks_of
from dopsd_jax.weights.random_flux2 import SCHEDULER
from dopsd_jax.weights.random_pipeline import draw, write_json, write_tensors
from dopsd_jax.weights.shapes import transformer_shapes
from tests.toy_family.family import TOY
from tests.toy_family.network import ToyConfig, ToyTransformer

CONFIG = ToyConfig()


@pytest.fixture(scope="module")
def toy_registered():
    """The toy is known while this file's tests run, and forgotten after them."""
    with pytest.MonkeyPatch.context() as context:
        for module, name in ((families, "FAMILIES"), (families, "PUBLISHED"), (sharding, "_ADDED")):
            context.setattr(module, name, dict(getattr(module, name)))
        families.register(TOY)
        yield


def toy_tensors():
    c, shapes = CONFIG, {"pegs.anchor": (1, CONFIG.dim)}
    for name, out, width in (("clock", c.dim, c.dim), ("enter", c.dim, c.in_channels),
                             ("read", c.dim, c.words), ("leave", c.in_channels, c.dim)):
        shapes |= {f"ends.{name}.weight": (out, width), f"ends.{name}.bias": (out,)}
    for i in range(c.depth):
        for name in ("mingle.ask", "mingle.seek", "mingle.give", "mingle.gather", "pulse"):
            shapes[f"trunk.{i}.{name}.weight"] = (c.dim, c.dim)
        shapes[f"trunk.{i}.grow.weight"] = (3 * c.dim, c.dim)
        shapes[f"trunk.{i}.shrink.weight"] = (c.dim, 3 * c.dim)
        shapes |= dict.fromkeys((f"trunk.{i}.calm.scale", f"trunk.{i}.still.scale"), (c.dim,))
    return draw(shapes, np.dtype(np.float32), 0, 20)


@pytest.fixture(scope="module")
def toy(tiny, tmp_path_factory, toy_registered):
    """A pipeline directory of the toy: its own transformer beside the tiny VAE and text encoder."""
    directory = tmp_path_factory.mktemp("toy") / "pipeline"
    shutil.copytree(tiny.pipeline, directory)
    shutil.rmtree(directory / "transformer")
    index = json.loads((directory / "model_index.json").read_text())
    write_json(directory / "model_index.json", index | {"_class_name": TOY.pipeline})
    write_json(directory / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(directory / "transformer" / "config.json", vars(CONFIG))
    write_tensors(directory / "transformer", "diffusion_pytorch_model", toy_tensors())
    return directory


@pytest.fixture(scope="module")
def config(toy, tmp_path_factory):
    data = tmp_path_factory.mktemp("toy_data") / "rows.jsonl"
    rows = [{"caption": f"a {name}", "enhanced_prompt": f"a long tale of a {name}", "w*h": "64*64"}
            for name in ("cat", "dog")]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    c = tiny_config.get_config()
    c.model, c.data, c.recipe, c.buckets = str(toy), str(data), "text", "64x64"
    c.text_tokens = c.teacher_tokens = 64
    c.num_train_steps, c.batch_size, c.sample_every, c.sample_steps = 2, 2, 2, 2
    c.checkpoint_every, c.learning_rate, c.lora.rank, c.remat = 2, 1e-2, 4, "matmuls"
    return c


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("toy_run") / "run"
    train.train(config, workdir)
    return workdir


def test_a_third_family_trains_what_its_preset_names(run):
    tree, _ = workdir_lib.read_lora(run)
    flat = trees.flatten(tree)
    trained = {n.rpartition("/")[0] for n in flat}
    assert trained == {f"strata/{p}" for p in ("ask", "give", "shrink")}
    assert all(np.abs(x).max() > 0 for x in flat.values())
    assert (run / "samples").is_dir()


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_it_exports_is_read_and_draws_the_same_picture(run, toy, tmp_path, fmt):
    out = tmp_path / ("lora" if fmt == "peft" else "lora.safetensors")
    export.export(run, fmt, out)
    pipe = load_pipeline(toy, dtype="float32")
    size = dict(num_steps=2, height=64, width=64)
    ours = sample.generate(pipe, ["a cat"], **size, lora=run)
    np.testing.assert_array_equal(ours, sample.generate(pipe, ["a cat"], **size, lora=out))
    assert (ours != sample.generate(pipe, ["a cat"], **size)).any()


def flops_of(config):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return plan.step_flops(config, lowering.step_of(config, mesh))


def test_it_is_planned_with_its_own_share_computed_again(config):
    assert "FLOPs per picture" in plan.plan_here(config, 2)
    step = flops_of(config)
    whole = step.parts["student forward"]
    config = config.copy_and_resolve_references()
    config.remat = "full"
    assert step.parts["recomputed"] < 0.4 * whole
    assert flops_of(config).parts["recomputed"] == whole
    config.model, config.published = "", "toy"
    assert flops_of(config).parts["student forward"] == whole


def test_its_shift_follows_the_picture(toy):
    pipe = load_pipeline(toy, parts=())
    assert pipe.shift is None and pipe.shift_at(4, 64, 96) == 1 + 8 * 12 / 64


def test_its_arrays_lie_as_its_names_say(toy_registered, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 1)
    mesh = AbstractMesh((1, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    shapes = transformer_shapes(ToyTransformer(CONFIG))
    specs = {k: v.spec for k, v in trees.flatten(sharding.shard(mesh, shapes)).items()}
    for name in ("ask", "seek", "give", "grow"):
        assert specs[f"strata/{name}/kernel"] == P(None, "fsdp", "tensor")
    for name in ("gather", "shrink"):
        assert specs[f"strata/{name}/kernel"] == P(None, "tensor", "fsdp")
    assert specs["strata/pulse/kernel"] == P(None, "fsdp", None)
    assert specs["anchor"] == P()


@pytest.mark.parametrize("remat,grown,gathered", [
    ("attention", 0, 0), ("matmuls", 1, 0), ("linears", 1, 1),
])
def test_remat_keeps_what_its_names_say(remat, grown, gathered):
    network = ToyTransformer(CONFIG, remat=remat)
    params = transformer_shapes(network)
    low_rank = jax.eval_shape(
        lambda: lora.init(jax.random.key(0), params, TOY.targets["all"], 2)
    )

    def residuals(params, low_rank):
        inputs = (jnp.zeros((1, 2, 2, 4)), jnp.zeros(1), jnp.zeros((1, 8, CONFIG.words)),
                  jnp.ones((1, 8), bool))
        return jax.tree.leaves(
            jax.vjp(lambda x: network.apply({"params": params, "lora": x}, *inputs), low_rank)[1]
        )

    kept = [x.shape for x in jax.eval_shape(residuals, params, low_rank)]
    assert kept.count((3, 1, 12, 3 * CONFIG.dim)) == grown
    assert kept.count((3, 1, CONFIG.dim)) == gathered  # of pulse


def test_muon_takes_the_kernels_of_its_stacks():
    stacks = stacks_of(TOY.table(CONFIG))
    assert stacks == ("strata",)
    settings = dict(learning_rate=1e-3, warmup_steps=0, b1=0.9, b2=0.99, eps=1e-8,
                    weight_decay=0.0, max_grad_norm=1.0, optimizer="muon")
    params = transformer_shapes(ToyTransformer(CONFIG))
    chosen = train_step._muon_dimensions(params, stacks)
    names = {"/".join(k.key for k in path) for path, x in jax.tree_util.tree_leaves_with_path(
        chosen, is_leaf=lambda x: isinstance(x, train_step.optax.contrib.MuonDimensionNumbers)
    )}
    kernels = {n for n in trees.flatten(params) if n.startswith("strata") and "kernel" in n}
    assert names == kernels
    train_step.make_optimizer(**settings, stacks=stacks)
    with pytest.raises(ValueError, match="muon: expected the names of the stacks"):
        train_step.make_optimizer(**settings)


def test_an_unknown_family_is_told_with_those_known(toy):
    with pytest.raises(WeightsError, match="expected one of ZImagePipeline, .*, ToyPipeline, got"):
        families.find("FluxPipeline")
    with pytest.raises(WeightsError, match="expected one of ZImagePipeline, .*, got None"):
        families.find(None)
    with pytest.raises(WeightsError, match="expected linear layers of one of .*, got strange"):
        families.family_of_tree({"strange": {"a": np.zeros((2, 2))}})
    assert families.find(ZImageConfig()).pipeline == "ZImagePipeline"


def test_a_family_may_not_take_what_is_anothers(toy_registered):
    def changed(**values):
        return Family(**{**vars(TOY), **values})

    with pytest.raises(ValueError, match="got ToyPipeline, toy, ToyPipeline"):
        families.register(TOY)
    names = type(TOY.names)(rows=("to_q",))
    other = changed(pipeline="Other", config=dict, published={"other": {}}, names=names)
    with pytest.raises(ValueError, match=r"to_q/kernel: expected its place \('fsdp', 'tensor'\)"):
        families.register(other)
    assert "Other" not in families.FAMILIES


def test_a_patch_size_stands_in_the_names_of_lora_files():
    names = {p: {r.template for r in families.Z_IMAGE.modules(ZImageConfig(patch_size=p))}
             for p in (2, 4)}
    assert {n.replace("2-1", "4-1") for n in names[2]} == names[4] != names[2]
    assert "all_final_layer.4-1.adaLN_modulation.0" in names[4]

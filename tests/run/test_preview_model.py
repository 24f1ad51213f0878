"""Previews on a sibling of the model that trains, with the LoRA moved to it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dopsd_jax import plan as plan_lib
from dopsd_jax import report, sample, tasks
from dopsd_jax import train as train_lib
from dopsd_jax.core import sharding, trees
from dopsd_jax.core.metrics import GAUGES, read_metrics
from dopsd_jax.planning import lowering
from dopsd_jax.run import preview_model, previews
from dopsd_jax.run.config import check_config
from dopsd_jax.weights.pipeline import load_pipeline
from dopsd_jax.weights.random_pipeline import write_random_pipeline


@pytest.fixture(scope="module")
def sibling(tiny, tmp_path_factory):
    """The tiny pipeline with another transformer and another shift."""
    other = write_random_pipeline(tmp_path_factory.mktemp("other"), seed=1)[0]
    directory = tmp_path_factory.mktemp("sibling") / "pipeline"
    shutil.copytree(tiny.pipeline, directory)
    shutil.rmtree(directory / "transformer")
    shutil.copytree(other / "transformer", directory / "transformer")
    change(directory / "scheduler/scheduler_config.json", shift=2.0)
    return directory


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def config(short_run, sibling):
    short_run.preview_model, short_run.preview_model_steps = str(sibling), 3
    short_run.sample_guidance, short_run.sample_negative = 1.5, "blurry"
    short_run.sample_prompts, short_run.gauge_prompts = ("a fox",), ("a lighthouse",)
    # Few programs to compile.
    short_run.update({"sample_rows": 1, "preflight": "off", "objective": "sft",
                      "remat": "full"})
    return short_run


def column(file, number):
    """A column of a preview grid of 64 x 64 pictures with one row."""
    x = previews.GAP + number * (64 + previews.GAP)
    return np.asarray(Image.open(file))[previews.HEADER:, x : x + 64][:64].astype(int)


def test_the_pictures_are_those_of_sample_on_either_model(config, sibling, tiny, tmp_path, caplog):
    """Before and after training, with each model's own steps, shift and guidance."""
    run = tmp_path / "run"
    with caplog.at_level("INFO"):
        train_lib.train(config, run)
    assert "its transformer stays in memory beside the run's" in caplog.text
    size = dict(height=64, width=64, seed=config.seed + 1000)
    own = dict(size, num_steps=2, guidance=1.5, negative="blurry")
    for directory, kind, how in (
        (tiny.pipeline, "", own), (sibling, "preview_", dict(size, num_steps=3)),
    ):
        pipe = load_pipeline(directory, dtype="float32")
        for step, lora in ((0, (run, 0)), (2, (run, 1))):
            want = sample.generate(pipe, ["a fox"], **how, lora=lora)[0].astype(int)
            file = run / "samples" / f"{kind}prompts_{step:06d}.png"
            assert np.abs(column(file, 1) - want).max() <= 1, (kind, step)
            if step == 0:
                assert np.abs(column(file, 0) - want).max() <= 1
        assert np.abs(column(file, 0) - column(file, 1)).max() > 4  # it learned something
    rows = read_metrics(run, GAUGES)
    assert rows[0]["preview_drift"] == 0 and rows[0]["preview_sharpness_ratio"] == 1
    assert rows[0]["preview_style"] == rows[0]["preview_untuned_style"] != rows[0]["style"]
    assert rows[1]["preview_drift"] > 0 and rows[1]["drift"] > 0
    page = report.page(run)
    assert f"The same LoRA on preview_model, {sibling}" in page
    assert page.count("<img") == 2 * 6 + 1 + 2  # of six kinds the ends; a trajectory; curves


def copied(sibling, tmp_path):
    shutil.copytree(sibling, tmp_path / "changed")
    return tmp_path / "changed"


@pytest.mark.parametrize("file,values,message", [
    ("transformer/config.json", {"norm_eps": 1e-3}, "another transformer: norm_eps 0.001, config"),
    ("vae/config.json", {"scaling_factor": 0.5}, "another VAE, by its config.json"),
    ("text_encoder/config.json", {"rope_theta": 5e6, "rope_parameters": None},
     "another text encoder, by its config.json"),
])
def test_another_config_is_refused(config, sibling, tmp_path, file, values, message):
    directory = copied(sibling, tmp_path)
    change(directory / file, **values)
    config.preview_model = str(directory)
    with pytest.raises(ValueError, match=f"preview_model: .*all but the tr.*{message}"):
        check_config(config)


def test_other_models_are_refused(config, sibling, tiny_flux2, tmp_path):
    directory = copied(sibling, tmp_path)
    template = directory / "tokenizer/chat_template.jinja"
    file = template if template.is_file() else directory / "tokenizer/tokenizer_config.json"
    file.write_text(file.read_text().replace("assistant", "helper"))
    for place, values, message in (
        (directory, {}, "it has another tokenizer or chat template"),
        (tiny_flux2, {}, "expected a ZImagePipeline as config.model, got a Flux2KleinPipeline"),
        ("nowhere", {}, "preview_model: nowhere: expected a directory"),
        (sibling, {"trainable": "full"}, "preview_model: expected none with trainable = full"),
        (sibling, {"sample_guidance": 0.0}, "sample_negative: expected none with sample_guidance"),
        (sibling, {"sample_negative": "x " * 200}, "sample_negative: .* at most 64 tokens"),
    ):
        changed = config.copy_and_resolve_references()
        changed.update({"preview_model": str(place)} | values)
        with pytest.raises(ValueError, match=message):
            check_config(changed)


@pytest.mark.parametrize("folder,words", preview_model.SHARED.items())
def test_other_weights_are_refused_before_a_workdir_is_made(
    config, sibling, tmp_path, folder, words
):
    directory = copied(sibling, tmp_path)
    file = next((directory / folder).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    config.preview_model = str(directory)
    with pytest.raises(ValueError, match=f"preview_model: .* another {words}, by the weights in"):
        train_lib.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_its_memory(config, tiny, monkeypatch):
    config.dtype = "bfloat16"
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    step, bucket = lowering.step_of(config, mesh), lowering.planned_bucket(config)
    size = lowering.preview_bytes(config, step.shapes(bucket))
    pipe = load_pipeline(tiny.pipeline, parts=("transformer",))
    assert size == trees.num_bytes(pipe.params) > 1e5

    def compiled():  # compiling takes a minute, and says nothing of what is beside the program
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(
            argument_size_in_bytes=2**30, temp_size_in_bytes=2**30,
            output_size_in_bytes=2**29, alias_size_in_bytes=2**29,
        ))

    monkeypatch.setattr(lowering, "preview_bytes", lambda config, shapes: 3 * 2**30)
    monkeypatch.setattr(lowering, "lower", lambda config, mesh: (
        SimpleNamespace(compile=compiled), step.shapes(bucket)
    ))
    told = plan_lib.plan_here(config)
    assert "\n5.00 GiB per device" in told and "preview_model          3.00 GiB" in told


@pytest.mark.parametrize("changes", [{"preview_model": ""}, {"sample_every": 0}])
def test_a_plan_counts_none_where_none_is_loaded(config, changes):
    config.update(changes)
    step = lowering.step_of(config, sharding.make_mesh(**config.mesh.to_dict()))
    assert lowering.preview_bytes(config, step.shapes(lowering.planned_bucket(config))) == 0


def test_a_stack_of_tasks_has_none(tmp_path):
    from configs import mini_tasks

    sequence = mini_tasks.get_config()
    sequence.carry = "stack"
    sequence.changes = {"preview_model": "mini"}
    with pytest.raises(ValueError, match=r"task 2 .*preview_model: expected none with carry"):
        tasks.planned(sequence, tmp_path)

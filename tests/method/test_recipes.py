"""Every recipe through the training command's function: what is seen, resumed and exported."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from configs import flux2_klein_4b_edit, flux2_klein_4b_edit_ref, flux2_klein_9b_edit
from dopsd_jax import encode as encode_lib
from dopsd_jax import export as export_lib
from dopsd_jax import train as train_lib
from dopsd_jax.core import trees
from dopsd_jax.core.metrics import read_metrics
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.datasets import read_data
from dopsd_jax.data.files import DataError
from dopsd_jax.method import contexts, flow
from dopsd_jax.models.flux2 import Flux2Config
from dopsd_jax.run import features as features_lib
from dopsd_jax.run import step as step_lib
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.config import check_config
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.flux2 import FLUX2, empirical_shift
from dopsd_jax.weights.pipeline import load_pipeline

FLUX2_MODULES = FLUX2.modules(Flux2Config.klein_4b())

RECIPES = ("edit", "edit_ref", "text", "subject_ref")  # that FLUX.2 can carry
CAPTION = "a photo of it"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A JSONL for every recipe: two rows of one shape and, with another shape, one more."""
    folder = tmp_path_factory.mktemp("rows")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        picture = Image.fromarray(getattr(photographs, name)())
        picture.resize((80, 80)).save(folder / f"{name}.png")
        picture.resize((130, 90)).save(folder / f"wide_{name}.png")
    squares, wide = ("astronaut", "chelsea"), "wide_coffee"
    made = {"edit": [], "edit_ref": [], "text": [], "subject_ref": []}
    for i, name in enumerate((*squares, wide)):
        target = {"image_path": f"{name}.png", "caption": f"{CAPTION} {i}"}
        before = ["rocket.png", "coffee.png"][: 2 if name == wide else 1]
        made["edit"].append(target)
        made["edit_ref"].append(target | {"image_path": [*before, f"{name}.png"]})
        made["text"].append(target | {"enhanced_prompt": f"a long tale of {name}"})
        made["subject_ref"].append(target | {"subject_images": before})
    for recipe, records in made.items():
        lines = "\n".join(json.dumps(record) for record in records)
        (folder / f"{recipe}.jsonl").write_text(lines)
    return folder


def make_config(model, rows, recipe):
    c = flux2_klein_4b_edit.get_config()
    c.model, c.data, c.recipe = str(model), str(rows / f"{recipe}.jsonl"), recipe
    c.update({
        "buckets": "64x64,96x64", "small_buckets": "repeat", "batch_size": 2, "dtype": "float32",
        "num_steps": 2, "sample_steps": 2, "sample_every": 0, "num_train_steps": 4,
        "checkpoint_every": 4, "learning_rate": 1e-2, "remat": "none", "preflight": "off",
        "gauge_prompts": (), "ema_decay": 0.9,
    })
    c.lora.rank, c.lora.alpha = 4, 8.0
    return c


@pytest.fixture
def config(tiny_flux2, rows):
    return make_config(tiny_flux2, rows, "edit_ref")


def final(workdir):
    student, _ = workdir_lib.read_lora(workdir)
    losses = [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(workdir)]
    return trees.flatten(student), losses


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_trains_resumes_and_exports(tiny_flux2, rows, tmp_path, recipe):
    config = make_config(tiny_flux2, rows, recipe)
    for config.num_train_steps in (1, 3):  # the second start resumes
        train_lib.train(config, tmp_path / "run")
    student, losses = final(tmp_path / "run")
    assert [step for step, *_ in losses] == [1, 2, 3]
    assert all(loss > 0 and np.isfinite(norm) for _, loss, norm in losses)
    assert len(student) == 16 and all(np.abs(x).max() > 0 for x in student.values())
    export_lib.export(tmp_path / "run", "diffusers", tmp_path / "lora.safetensors")
    read, spec = lora_files.read_lora(tmp_path / "lora.safetensors", FLUX2_MODULES)
    assert (spec.rank, spec.alpha) == (4, 8.0)
    for name, x in trees.flatten(read).items():
        np.testing.assert_allclose(x, student[name], rtol=1e-6)

    if recipe == "edit_ref":  # the others differ in their contexts alone
        train_lib.train(config, tmp_path / "whole")
        whole, at_once = final(tmp_path / "whole")
        assert at_once == losses
        for name, x in whole.items():
            np.testing.assert_array_equal(x, student[name])


def contexts_of(config):
    """Contexts of a run's rows, of the bucket of the first row, and the plan."""
    data = read_data(config, contexts.RECIPES[config.recipe].needs)
    entries = features_lib.Entries(config, data)
    pipe = load_pipeline(config.model, dtype="float32", parts=("text_encoder", "vae"))
    features = {}
    features_lib.encode_all(
        entries.all(), features_lib.load_encoders(config, pipe, data), features.__setitem__
    )
    ctxs = features_lib.BatchFeatures(config, data, entries, features_lib.cached(features))
    batches = {b.bucket: b for b in map(data.plan.at, range(6))}
    return pipe, data, ctxs, batches


@pytest.mark.parametrize("recipe", RECIPES)
def test_roles_see_what_the_recipe_says(tiny_flux2, rows, recipe):
    """Every context beside the one that sampling's own functions build of the same pictures."""
    pipe, data, ctxs, batches = contexts_of(make_config(tiny_flux2, rows, recipe))
    beside = {"edit": 0, "text": 0, "edit_ref": 1, "subject_ref": 1}[recipe]
    assert set(batches) == {Bucket(64, 64, beside), Bucket(96, 64, 2 * beside)}
    words = {
        "edit": " Make the main subject (facial/ip details), background, and overall composition "
                "consistent with the reference image.",
        "edit_ref": " Note that the last image is the output image I expect to be. Your output "
                    "must be as similar as the last reference image, based on the first reference "
                    "image and the editing instructions.",
        "subject_ref": " Make the main subject (facial/ip details) consistent with the reference "
                       "images.",
    }
    for bucket, batch in batches.items():
        student, teacher, targets = ctxs.batch(batch)
        assert targets is None
        members = [data.rows[r] for r in batch.rows]
        captions = [r.captions["caption"] for r in members]
        told = ([r.enhanced for r in members] if recipe == "text"
                else [c + words[recipe] for c in captions])
        references = [
            np.stack([data.pixels(r, i) for r in batch.rows]) for i in range(bucket.references)
        ]
        assert all(x.shape[1:3] == (64, bucket.width) for x in references)
        target = np.stack([data.pixels(r) for r in batch.rows])
        shown = {
            "edit": ([], [target]), "text": ([], []),
            "edit_ref": (references, [*references, target]), "subject_ref": ([], references),
        }[recipe]
        for got, prompts, images in zip(
            (student, teacher), (captions, told), shown, strict=True
        ):
            want = contexts.text_context(pipe, prompts, length=512)
            if images:
                want = contexts.with_references(pipe, want, images)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, atol=2e-5)
            if images:  # t = 10, 20, ..
                assert sorted(set(got.ref_ids[0, :, 0].tolist())) == [
                    10 * (i + 1) for i in range(len(images))
                ]


def test_latents_are_kept_once_whatever_they_serve_for(config):
    """The target of edit_ref is a target for sft and the last reference of the teacher."""
    data = read_data(config, contexts.RECIPES["edit_ref"].needs)
    entries = features_lib.Entries(config, data)
    *_, last = entries.references(0, "teacher")
    assert last.key == entries.target(0).key and last.role == "target"
    assert [e.role for e in entries.references(2, "student")] == ["reference", "reference"]
    found = [(e.role, e.caption) for e in entries.all()]
    # Rows 0 and 1 share their reference; in the wide bucket it is cut otherwise.
    assert [role for role, _ in found].count("reference") == 3
    assert [role for role, _ in found].count("target") == 3
    every = {e.key for e in entries.all()}
    config.objective = "sft"
    sft = features_lib.Entries(config, data).all()
    assert {e.role for e in sft} == {"student", "reference", "target"}
    assert {e.key for e in sft} < every


def test_plain_fine_tuning_sees_the_references_too(config, tmp_path):
    config.update({"objective": "sft", "num_train_steps": 1})
    assert int(train_lib.train(config, tmp_path).step) == 1
    assert read_metrics(tmp_path)[0]["loss"] > 0


def test_a_run_from_a_cache_is_the_same_bit_for_bit(config, tmp_path):
    config.update({"sample_every": 4, "sample_prompts": ("a fox",), "preflight": "on"})
    train_lib.train(config, tmp_path / "uncached")
    config.cache = str(tmp_path / "cache")
    made, total = encode_lib.encode(config)
    assert made == total == 3 + 3 + 3 + 3 + 1
    train_lib.train(config, tmp_path / "cached")
    one, two = final(tmp_path / "uncached"), final(tmp_path / "cached")
    assert one[1] == two[1]
    for name, x in one[0].items():
        np.testing.assert_array_equal(x, two[0][name])
    pictures = sorted(p.name for p in (tmp_path / "cached" / "samples").glob("*.png"))
    assert pictures == ["preflight.png", *(
        f"{name}_{step:06d}.png" for name in ("prompts", "step", "trajectory") for step in (0, 4)
    )]
    for name in pictures:
        first, second = (tmp_path / run / "samples" / name for run in ("uncached", "cached"))
        assert first.read_bytes() == second.read_bytes()


def test_every_bucket_has_the_schedule_of_its_size(config, tmp_path, monkeypatch):
    """mu follows the target's tokens alone, 16 and 24 of them; references do not count."""
    seen = {}
    made = step_lib.make_train_step

    def watched(*args):
        step_fn = made(*args)

        def train_step(state, base, batch):
            jax.debug.callback(
                lambda sigmas, shape=batch.noise.shape[1:3]: seen.setdefault(shape, sigmas),
                batch.sigmas,
            )
            return step_fn(state, base, batch)

        return train_step

    monkeypatch.setattr(step_lib, "make_train_step", watched)
    train_lib.train(config, tmp_path)
    assert set(seen) == {(4, 4), (4, 6)}
    for (h, w), sigmas in seen.items():
        shift = empirical_shift(2, h * w)
        np.testing.assert_array_equal(sigmas, flow.sigmas_shifted(2, shift))
    assert seen[4, 4][1] != seen[4, 6][1]


def refusal(config):
    with pytest.raises(ValueError) as e:
        check_config(config)
    first, *lines = str(e.value).split("\n  ")
    assert first == "config:"
    return lines


def test_a_recipe_that_a_model_cannot_carry_is_refused_with_those_it_can(config, tiny, rows):
    config.update({"recipe": "vlm", "vlm": str(tiny.vlm)})
    assert refusal(config) == [
        "recipe: vlm shows the target through Qwen3-VL as one feature per token, padding masked; "
        "this model reads 3 features per token, padding too; choose one of edit, edit_ref, text, "
        "subject_ref"
    ]
    for recipe in ("edit", "edit_ref", "subject_ref"):
        config.update({"model": str(tiny.pipeline), "recipe": recipe, "vlm": ""})
        assert refusal(config) == [
            f"recipe: {recipe} shows reference images, which this model does not take; choose one "
            "of vlm, text"
        ]
    config.objective = "sft"  # no teacher: what only it sees does not matter
    config.recipe = "edit"
    check_config(config)
    config.recipe = "edit_ref"
    assert refusal(config)[0].startswith("recipe: edit_ref shows reference images")


def test_text_needs_no_vlm_in_the_other_family(tiny, rows, tmp_path):
    config = make_config(tiny.pipeline, rows, "text")
    config.update({"num_train_steps": 1, "buckets": "64x64", "text_tokens": 64,
                   "teacher_tokens": 96, "vlm": ""})
    assert int(train_lib.train(config, tmp_path).step) == 1
    assert read_metrics(tmp_path)[0]["loss"] > 0
    assert set(json.loads((tmp_path / "identity.json").read_text())) == {"model", "data"}


def test_text_needs_no_pictures(tiny, tmp_path):
    """What the untrained teacher draws takes the target's place in previews and gauges."""
    data = tmp_path / "text.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in (
        {"caption": "a cat", "enhanced_prompt": "a tabby cat on a mat", "w*h": "96*64"},
        {"caption": "a dog", "enhanced_prompt": "a black dog in the snow", "h*w": "64*96"},
    )))
    config = make_config(tiny.pipeline, tmp_path, "text")
    config.update({
        "data": str(data), "num_train_steps": 1, "text_tokens": 64, "teacher_tokens": 96,
        "vlm": "", "preflight": "on", "sample_every": 1, "checkpoint_every": 1,
    })
    assert int(train_lib.train(config, tmp_path / "run").step) == 1
    assert not (tmp_path / "run" / "preflight.json").exists()
    before, _ = read_metrics(tmp_path / "run", "gauges.jsonl")
    assert before["style"] > 0 and before["teacher_style"] == 0
    with Image.open(tmp_path / "run" / "samples" / "step_000000.png") as grid:
        assert grid.width > 4 * 96  # target, base, student, teacher
    config.objective = "sft"
    with pytest.raises(DataError, match="text.jsonl:1: expected an image under one of the keys"):
        train_lib.train(config, tmp_path / "sft")


def test_lengths_that_would_change_the_picture_are_refused(config):
    config.update({"text_tokens": 256, "teacher_tokens": 1024})
    assert refusal(config)[:2] == [
        f"{key}: text length: this model attends to padding and was made for 512 tokens, got {n}"
        for key, n in (("text_tokens", 256), ("teacher_tokens", 1024))
    ]


def test_the_shipped_configs_pass(tiny_flux2):
    for module, recipe in (
        (flux2_klein_4b_edit, "edit"), (flux2_klein_9b_edit, "edit"),
        (flux2_klein_4b_edit_ref, "edit_ref"),
    ):
        c = module.get_config()
        assert c.recipe == recipe
        c.model, c.data = str(tiny_flux2), "photos"
        # The tiny model's layers are 48 wide and can express no more.
        c.lora.rank, c.lora.alpha = c.lora.rank // 2, c.lora.alpha / 2
        method = check_config(c)
        assert method.lora_scale == 2.0 and method.ema_decay == 0.9999


def test_rows_that_do_not_fit_the_recipe_are_refused_together(config, rows, tmp_path):
    config.data = str(rows / "edit.jsonl")
    with pytest.raises(DataError) as e:
        train_lib.train(config, tmp_path)
    assert [line.partition(":")[2] for line in str(e.value).splitlines()[1:]] == [
        f"{i}: expected at least 2 image(s) (references first, the target last) per row for this "
        "recipe, got 1; list that many, or choose another recipe" for i in (1, 2, 3)
    ]


def test_more_references_than_a_model_takes_are_refused(config, rows, tmp_path):
    many = {"image_path": ["rocket.png"] * 101 + ["coffee.png"], "caption": "x"}
    (rows / "many.jsonl").write_text(json.dumps(many))
    config.data = str(rows / "many.jsonl")
    with pytest.raises(DataError, match="many.jsonl:1: 102 references, this model takes at most 1"):
        train_lib.train(config, tmp_path)


def test_the_teachers_longer_text_is_measured_too(config, rows, tmp_path):
    config.recipe = "text"
    row = {"image_path": "coffee.png", "caption": "x", "enhanced_prompt": "word " * 600}
    (rows / "long.jsonl").write_text(json.dumps(row))
    config.data = str(rows / "long.jsonl")
    with pytest.raises(DataError, match=r"long.jsonl:1, caption, teacher_tokens = 512: .*at most"):
        train_lib.train(config, tmp_path)

"""The whole recipe on very small networks: every stage hands on what the next one opens.

Its result is a Z-Image pipeline: diffusers opens it, and a LoRA tuned on it.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import mini_style
from configs.mini import turbo as turbo_config
from configs.mini import vae as vae_config
from dopsd_jax import sample, train
from dopsd_jax.core import trees
from dopsd_jax.export import export
from dopsd_jax.method import lora, sampling
from dopsd_jax.mini import base_stage, encoding, judge, make, model, ship, stages, turbo_stage
from dopsd_jax.mini import data as data_lib
from dopsd_jax.mini import rows as rows_lib
from dopsd_jax.mini.before_after import before_and_after
from dopsd_jax.mini.labels import WORLD
from dopsd_jax.models.denoiser import Context
from dopsd_jax.run import loras
from dopsd_jax.run.workdir import flat_config
from dopsd_jax.weights.pipeline import load_pipeline, load_vision_language
from dopsd_jax.weights.save import read_tensors
from dopsd_jax.weights.shipped import MINI_VAE

PROMPTS = ["a red umbrella and a small cat, noto style", "a bell, neon style"]


def load(directory):
    pipe = load_pipeline(directory / model.PIPELINE, dtype="float32", remat="none")
    return pipe, load_vision_language(directory / model.VLM, pipe, dtype="float32")


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(
        jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_what_is_finished_is_not_done_again(recipe, world):
    def written():
        files = (p for p in recipe.rglob("*") if p.is_file())
        return {p: p.stat().st_mtime_ns for p in files
                if p.name not in ("config.json", "identity.json")}

    before = written()
    make.train(recipe, world, "tiny", 0, updates=2)
    assert written() == before


def test_a_stage_goes_on_to_its_own_end_alone(recipe, world):
    """Its rate falls towards the last update."""
    config = make.config_of("vae", "tiny", world, recipe / "blank")
    config.num_train_steps, config.sample_every, config.checkpoint_every = 5, 2, 2
    config.optimizer.decay_steps = 1
    with pytest.raises(ValueError, match="num_train_steps: the run has 2, now 5"):
        stages.train(config, recipe / "vae")


def test_a_blank_world_has_the_shapes_of_a_drawn_one(world, tmp_path):
    counts = dict.fromkeys(("scenes", "pairs", "judge", "judge_test"), 130)
    make.blank_world(tmp_path, ["a cat, ink style", "two keys, noto style"], counts)
    for kind in counts:
        drawn, blank = (data_lib.read_part(folder, kind) for folder in (world, tmp_path))
        assert len(drawn) == len(blank)
        for field in dataclasses.fields(drawn):
            one, other = (getattr(part, field.name) for part in (drawn, blank))
            assert (getattr(one, "shape", None), getattr(one, "dtype", None)) == (
                getattr(other, "shape", None), getattr(other, "dtype", None)), field.name
        assert not blank.pixels.any()


def test_every_budget_names_keys_that_the_stages_have():
    for budget, changes in make.CHANGES.items():
        for stage in make.STAGES:
            config = make.config_of(stage, budget, Path("world"), Path("start"))
            for key, value in changes.get(stage, {}).items():
                assert flat_config(config.to_dict())[key] == value
    assert sum(share for _, share in make.STAGES.values()) == pytest.approx(1)


def test_a_trained_vae_takes_the_place_of_its_stage(recipe, world, tmp_path, monkeypatch):
    configs = {}
    monkeypatch.setattr(
        make.stages, "train", lambda config, out: configs.update({out.name: config})
    )
    shutil.copytree(recipe / "blank", tmp_path / "blank")
    vae = recipe / "vae" / model.PIPELINE / "vae"
    make.train(tmp_path, world, "tiny", 10, vae=vae)
    assert list(configs) == ["base", "turbo", "judge"]
    begun, _ = load(tmp_path / "blank")
    trained, _ = load(recipe / "vae")
    assert same(begun.vae_params, trained.vae_params)
    assert configs["base"].model == str(tmp_path / "blank" / model.PIPELINE)
    # All of the time is shared out among those that are left; nothing here takes any of it.
    shares = [make.STAGES[stage][1] for stage in configs]
    assert configs["base"].seconds == pytest.approx(600 * shares[0] / sum(shares), abs=1)
    assert configs["judge"].seconds == pytest.approx(600, abs=1)


def test_the_shipped_vae_is_of_the_sizes_of_the_recipe():
    config = json.loads((MINI_VAE / "config.json").read_text())
    sizes = model.sizes([]).vae | {k: config[k] for k in ("scaling_factor", "shift_factor")}
    assert {k: config[k] for k in sizes} == sizes
    assert 0.5 < config["scaling_factor"] < 2  # of latents that were trained


def test_every_stage_changes_its_own_weights_alone(recipe):
    (blank, blank_vl), (vae, vae_vl), (base, base_vl), (turbo, turbo_vl) = (
        load(recipe / name) for name in ("blank", "vae", "base", "turbo")
    )
    assert not same(blank.vae_params, vae.vae_params)
    assert same(blank.params, vae.params) and same(blank_vl.params, vae_vl.params)
    assert same(vae.vae_params, base.vae_params)
    assert not same(vae.params, base.params)
    assert not same(vae.text_params, base.text_params)
    assert not same(vae_vl.params, base_vl.params)
    assert same(base.vae_params, turbo.vae_params) and same(base.text_params, turbo.text_params)
    assert same(base_vl.params, turbo_vl.params)
    assert not same(base.params, turbo.params)


def test_latents_have_mean_zero_and_variance_one(recipe, world):
    pipe, _ = load(recipe / "vae")
    images = data_lib.to_float(data_lib.read_part(world, "scenes").pixels[:100])
    z = pipe.vae.apply({"params": pipe.vae_params}, images, method="encode_mode")
    assert abs(float(z.mean())) < 0.1 and abs(float(z.std()) - 1) < 0.1


def test_the_undoing_lora_gives_the_undistilled_transformer_back(recipe):
    (base, _), (turbo, _) = load(recipe / "base"), load(recipe / "turbo")
    tree, scale = loras.read_lora(recipe / "turbo" / turbo_stage.UNDO, turbo)
    undone = trees.flatten(lora.merge(turbo.params, tree, scale))
    for name, want in trees.flatten(base.params).items():
        np.testing.assert_allclose(undone[name], want, atol=1e-6, err_msg=name)


def test_distillation_goes_on_from_the_student_of_an_earlier_run(recipe):
    (base, _), (turbo, _) = load(recipe / "base"), load(recipe / "turbo")
    undo, rank = recipe / "turbo" / turbo_stage.UNDO, turbo_config.get_config().rank
    fresh = lora.init(jax.random.key(0), base.params, turbo_stage.TARGETS, rank)
    student = turbo_stage.earlier_student(undo, base, fresh)
    merged = trees.flatten(lora.merge(base.params, student, 1.0))
    for name, want in trees.flatten(turbo.params).items():
        np.testing.assert_allclose(merged[name], want, atol=1e-6, err_msg=name)
    other = lora.init(jax.random.key(0), base.params, turbo_stage.TARGETS, rank // 2)
    with pytest.raises(ValueError, match="expected the student of an earlier run"):
        turbo_stage.earlier_student(undo, base, other)


def test_the_result_draws(recipe):
    pipe, _ = load(recipe / "turbo")
    pixels = sample.generate(pipe, ["a cat, noto style"], num_steps=2)
    assert pixels.shape == (1, 64, 64, 3) and pixels.std() > 1


def test_shipping_rounds_to_bfloat16_and_keeps_the_card(recipe, tmp_path):
    ship.ship(recipe / "turbo", recipe / "judge", tmp_path)
    (tmp_path / "mini" / "README.md").write_text("card")
    pipeline, vlm, undo, judge_file = ship.ship(recipe / "turbo", recipe / "judge", tmp_path)
    assert (pipeline / "README.md").read_text() == "card"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "mini", "mini_judge.safetensors", "mini_qwen3_vl", "mini_undistilled.safetensors"
    ]
    reports = [judge.read(str(f)).report for f in (judge_file, recipe / "judge" / judge.FILE)]
    assert reports[0] == reports[1]
    (turbo, vl), (base, _) = load(recipe / "turbo"), load(recipe / "base")
    pipe = load_pipeline(pipeline, dtype="float32", remat="none")
    shipped_vl = load_vision_language(vlm, pipe, dtype="float32")
    rounded = trees.cast_floats((turbo.params, turbo.text_params, vl.params), "bfloat16")
    assert same(trees.cast_floats(rounded, "float32"),
                (pipe.params, pipe.text_params, shipped_vl.params))
    tree, scale = loras.read_lora(undo, pipe)
    undone = trees.flatten(lora.merge(pipe.params, tree, scale))
    for name, want in trees.flatten(base.params).items():
        np.testing.assert_allclose(undone[name], want, atol=1e-2, rtol=1e-2, err_msg=name)


def test_a_shipped_vlm_is_whole_by_itself(recipe, tmp_path):
    pipeline, vlm, *_ = ship.ship(recipe / "turbo", recipe / "judge", tmp_path)
    tensors = read_tensors(vlm / "model.safetensors")
    text = read_tensors(pipeline / "text_encoder" / "model.safetensors")
    name = next(n for n in text if n.endswith("layers.0.mlp.up_proj.weight"))
    language = tensors["model.language_model." + name.removeprefix("model.")]
    np.testing.assert_array_equal(language.view(np.uint16), text[name].view(np.uint16))


def test_shipping_an_unfinished_run_says_what_is_missing(tmp_path, recipe):
    with pytest.raises(ValueError, match="finished step_distillation run, .'pipeline'"):
        ship.ship(tmp_path, recipe / "judge", tmp_path / "out")
    with pytest.raises(ValueError, match="finished judge run, .'judge.safetensors'"):
        ship.ship(recipe / "turbo", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_judge_is_measured_and_written(recipe):
    file = judge.read(str(recipe / "judge" / judge.FILE))
    assert set(file.real) == {"trained", *WORLD.styles} and file.labels == WORLD
    assert 0 <= file.report["style"] <= 1 and file.report["frechet_of_two_real_sets"] >= 0
    said = judge.opinion(file.params, np.zeros((3, 64, 64, 3), np.uint8))
    assert said.features.shape == (3, judge.FEATURES)
    assert said.concepts.shape == (3, len(WORLD.concepts)) and set(said.counts) <= {1, 2, 3}
    assert said.middles.shape == (3, 2)


def test_stages_leave_curves_and_pictures(recipe):
    for name in ("vae", "base", "turbo"):
        assert (recipe / name / "samples" / "step_000002.png").is_file()
        rows = [json.loads(s) for s in (recipe / name / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in rows] == [1, 2]


def test_the_placement_is_asked_everywhere_but_its_numbers_only_inside_objects():
    hidden = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    reader = {"kernel": np.zeros((4, 7), np.float32), "bias": np.full(7, 0.5, np.float32)}
    placement = np.zeros((2, 3, 7), np.float32)
    empty = base_stage.placement_loss(reader, hidden, placement)
    np.testing.assert_allclose(empty, 0.25 / 7, rtol=1e-6)  # one number of seven is asked
    placement[1, :, 0] = 1
    full = base_stage.placement_loss(reader, hidden, placement)
    np.testing.assert_allclose(full, [0.25 / 7, 0.25], rtol=1e-6)


def test_the_picture_is_read_in_the_image_tokens_in_their_order(recipe):
    """A context that holds, where the picture's tokens are, just what is asked: no loss."""
    _, vl = load(recipe / "base")
    latents = np.random.default_rng(0).standard_normal((2, 16, 16, 16)).astype(np.float32)
    picture = rows_lib.by_token(latents, 4)
    np.testing.assert_array_equal(picture[1, 6], latents[1, 4:8, 8:12].ravel())  # row 1, column 2
    ids, mask = encoding.pair_ids(vl.tokenizer, ["a cat", "a red key, ink style"])
    text = np.zeros((2, 64, 256), np.float32)
    picture /= np.sqrt(np.mean(picture**2, -1, keepdims=True))
    text[ids == vl.config.image_token_id] = 7 * picture.reshape(-1, 256)  # the size does not count
    reader = {"kernel": np.eye(256, dtype=np.float32), "bias": np.zeros(256, np.float32)}
    blank = np.zeros((2, 1), np.float32)
    rows = rows_lib.Rows(latents, latents, blank[:, 0], ids, mask, blank, picture=picture)
    loss = base_stage.picture_loss(
        reader, Context(text, mask), rows, vl.config.image_token_id
    )
    np.testing.assert_allclose(loss, 0, atol=1e-5)
    loss = base_stage.picture_loss(
        reader, Context(np.roll(text, 1, 1), mask), rows, vl.config.image_token_id
    )
    assert np.all(loss > 0.5)


def test_velocity_and_layers_is_the_velocity_and_the_last_layer_makes_it(recipe):
    pipe, _ = load(recipe / "base")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 16, 16, 16)).astype(np.float32)
    ids, mask = encoding.caption_ids(pipe.tokenizer, ["a cat", "a red bell, ink style"])
    ctx = encoding.text_features(pipe, pipe.text_params, ids, mask)
    args = {"params": pipe.params}, x, np.float32([0.3, 0.9]), ctx
    v, layers = pipe.denoiser.velocity_and_layers(*args)
    np.testing.assert_array_equal(v, pipe.denoiser.velocity(*args))
    config = pipe.denoiser.network.config
    assert layers.shape == (config.n_layers, 2, 64 + 32, config.dim)
    assert np.abs(layers).mean() > 0.01


def test_an_unknown_objective_and_missing_data_say_what_is_wrong(tmp_path, recipe):
    c = vae_config.get_config()
    c.objective = "gan"
    with pytest.raises(ValueError, match="objective: expected dopsd or one of .*got 'gan'"):
        stages.train(c, tmp_path / "a")
    c.objective, c.data = "vae", str(tmp_path)
    c.model, c.vlm = str(recipe / "blank" / model.PIPELINE), str(recipe / "blank" / model.VLM)
    with pytest.raises(ValueError, match="make it with python -m dopsd_jax.mini.build"):
        stages.train(c, tmp_path / "b")


@pytest.fixture(scope="module")
def pipe(recipe):
    return load_pipeline(recipe / "turbo" / model.PIPELINE, dtype="float32", remat="none")


@pytest.fixture(scope="module")
def noise(pipe):
    return sampling.draw_noise([3, 4], pipe.denoiser.latent_shape(64, 64))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """The workdir of two updates of configs/mini_style.py."""
    workdir = tmp_path_factory.mktemp("style") / "run"
    c = mini_style.get_config()
    c.model, c.vlm = (str(recipe / "turbo" / name) for name in (model.PIPELINE, model.VLM))
    c.num_train_steps, c.sample_every, c.checkpoint_every, c.warmup_steps = 2, 2, 2, 0
    c.learning_rate = 0.02
    train.train(c, workdir)
    return workdir


def test_diffusers_draws_the_same_picture(pipe, noise, in_diffusers):
    want = in_diffusers(pipe.directory, PROMPTS, noise)
    got = sample.generate(pipe, PROMPTS, num_steps=2, noise=noise)
    off = np.abs(got - want)
    assert want.std() > 5
    assert off.mean() <= 1 and off.max() <= 4


def test_a_lora_trained_on_it_draws_the_same_in_diffusers(
    pipe, noise, run, in_diffusers, tmp_path
):
    file = tmp_path / "lora.safetensors"
    export(str(run), "diffusers", str(file))
    got = sample.generate(pipe, PROMPTS, num_steps=2, noise=noise, lora=run)
    plain = sample.generate(pipe, PROMPTS, num_steps=2, noise=noise)
    assert np.abs(got.astype(int) - plain).mean() > 0.1
    off = np.abs(got - in_diffusers(pipe.directory, PROMPTS, noise, file))
    assert off.mean() <= 1 and off.max() <= 4


def test_before_and_after_shows_base_tuned_and_teacher(recipe, run):
    new, old = before_and_after(
        run, *(recipe / "turbo" / name for name in (model.PIPELINE, model.VLM))
    )
    rows, side = 8, 2 * 64 + 4
    assert new.shape == (16 + rows * side + 4, 4 * side + 4, 3)
    assert old.shape == (16 + 6 * side + 4, 2 * side + 4, 3)
    row = new[16 : 16 + 128]
    real, base, tuned, _ = (row[:, 4 + i * side :][:, :128].astype(int) for i in range(4))
    assert real.std() > 10 and np.any(base != tuned)

"""The encoder cache: what is in it, what invalidates it, and training from it."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from configs import common
from configs import tiny as tiny_config
from dopsd_jax import encode as encode_lib
from dopsd_jax import train as train_lib
from dopsd_jax.core.checkpoints import Checkpoints
from dopsd_jax.core.metrics import read_metrics
from dopsd_jax.data.cache import Cache, CacheError
from dopsd_jax.data.datasets import read_data
from dopsd_jax.data.drafts import Needs
from dopsd_jax.run import features as features_lib
from dopsd_jax.run import keys
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.config import needs_of_rows
from dopsd_jax.weights import load, pipeline
from tests import commands

ROOT = Path(__file__).parents[1]
# Keys that no context follows from, or that are in it by content (data, images, weights, bucket).
OTHER_KEYS = {
    "model", "vlm", "data", "data_weights", "data_root", "cache", "encode",
    "transformer_file", "vae_file", "text_encoder_file",
    "resolution", "buckets", "small_buckets",
    "trainable", "num_steps", "schedule", "shift", "loss", "teacher", "ema_decay", "lora.rank",
    "lora.alpha", "lora.targets", "lora.kind", "lora.factor", "num_train_steps", "batch_size",
    "accumulation",
    "learning_rate", "warmup_steps", "b1", "b2", "eps", "weight_decay", "max_grad_norm", "seed",
    "objective", "states", "teacher_words", "base_lora", "init_lora", "init_full",
    "keep_prompts", "keep_share", "anchor", "retain", "earlier_data", "caption_key", "remat",
    "mesh.data", "mesh.fsdp", "mesh.tensor", "published",
    "sample_guidance", "sample_negative", "preview_model", "preview_model_steps",
    "preview_model_shift", "base_dtype", "cache_quantised",
    "log_every", "sample_every", "sample_steps", "preflight", "moments_dtype", "ema_dtype",
    "sample_rows", "sample_prompts", "gauge_prompts", "checkpoint_every", "keep_checkpoints",
    "trackers",
}


def write_image(file, seed, size=(64, 64)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    directory = tmp_path_factory.mktemp("photos")
    for i, (name, size) in enumerate({"a": (64, 64), "b": (96, 64), "c": (64, 64)}.items()):
        write_image(directory / f"{name}.png", i, size)
        (directory / f"{name}.txt").write_text("the same" if name == "c" else f"a photo of {name}")
    return directory


def make_config(tiny, photos, cache=""):
    c = tiny_config.get_config()
    c.model, c.vlm, c.data, c.cache = str(tiny.pipeline), str(tiny.vlm), str(photos), str(cache)
    c.update({
        "buckets": "64x64,96x64", "num_train_steps": 3, "checkpoint_every": 3, "sample_every": 3,
        "teacher_tokens": 672, "text_tokens": 128, "sample_steps": 2,
        "sample_prompts": ("a fox", "the same"),
    })
    return c


@pytest.fixture(scope="module")
def cached(tiny, photos, tmp_path_factory):
    """A cache of the photographs; nothing may change it."""
    directory = tmp_path_factory.mktemp("cache")
    assert encode_lib.encode(make_config(tiny, photos, directory)) == (7, 7)
    return directory


@pytest.fixture
def cache(cached, tmp_path):
    shutil.copytree(cached, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def config(tiny, photos, cache):
    return make_config(tiny, photos, cache)


def final(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints")
    state = checkpoints.restore_part(("student", "teacher", "opt_state", "step"))
    checkpoints.close()
    rows = [{k: v for k, v in r.items() if k != "images_per_second"}
            for r in read_metrics(workdir)]
    pictures = {p.name: p.read_bytes() for p in sorted((workdir / "samples").glob("*.png"))}
    return jax.tree.leaves(state), rows, pictures


@pytest.fixture
def opened(monkeypatch):
    """Weight files that were opened to be loaded."""
    files = []
    read = load.map_safetensors
    monkeypatch.setattr(load, "map_safetensors", lambda f: (files.append(Path(f)), read(f))[1])
    return files


def assert_same_runs(one, two):
    (state, rows, pictures), other = final(one), final(two)
    assert rows and pictures and rows == other[1] and pictures == other[2]
    for a, b in zip(state, other[0], strict=True):
        np.testing.assert_array_equal(a, b)


def test_cached_and_online_training_are_bit_identical(config, tiny, tmp_path, opened):
    train_lib.train(config, tmp_path / "cached")
    assert {f.parent for f in opened} == {tiny.pipeline / "transformer", tiny.pipeline / "vae"}
    opened.clear()
    config.cache = ""
    train_lib.train(config, tmp_path / "uncached")
    assert {f.parent for f in opened} == {
        tiny.pipeline / "transformer", tiny.pipeline / "vae", tiny.pipeline / "text_encoder",
        tiny.vlm,
    }
    assert_same_runs(tmp_path / "cached", tmp_path / "uncached")
    assert len(final(tmp_path / "cached")[1]) == 3 and len(final(tmp_path / "cached")[2]) == 6
    config.encode = "online"
    train_lib.train(config, tmp_path / "online")
    assert_same_runs(tmp_path / "cached", tmp_path / "online")
    # A run may go on with or without the cache.
    assert keys.may_change("cache", encodes_images=True)


def test_online_data_is_not_opened_before_its_turn(config, own_photos, tmp_path, monkeypatch):
    """A bad picture stops the run when it is drawn, by name; put right, the run goes on."""
    whole = (own_photos / "c.png").read_bytes()
    config.update({"cache": "", "encode": "online", "sample_every": 0, "preflight": "off",
                   "buckets": "64x64", "batch_size": 1, "num_train_steps": 3,
                   "checkpoint_every": 1})
    (own_photos / "c.png").write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"c.png: .*c.png: expected a whole"):
        train_lib.train(config, tmp_path / "run")
    (own_photos / "c.png").write_bytes(whole)
    train_lib.train(config, tmp_path / "run")
    assert len(final(tmp_path / "run")[1]) == 3


def test_another_folder_of_the_same_names_is_other_data_online_too(config, tmp_path):
    """Images are not opened ahead, but those of some rows stand for all."""
    rows = [{"image_path": f"{i}.png", "caption": f"number {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    identities = {}
    for folder, colour in (("a", "red"), ("b", "red"), ("c", "blue"), ("repaired", "red")):
        (tmp_path / folder).mkdir()
        for i in range(40):
            Image.new("RGB", (64, 64), colour).save(tmp_path / folder / f"{i}.png")
        if folder == "repaired":
            Image.new("RGB", (64, 64), "green").save(tmp_path / folder / "0.png")
        config.update({"cache": "", "encode": "online", "data": str(tmp_path / "rows.jsonl"),
                       "data_root": str(tmp_path / folder), "batch_size": 2})
        data = read_data(config, needs_of_rows(config))
        identities[folder] = train_lib.identify(config, data)
    run = tmp_path / "run"
    workdir_lib.claim(run, {}, identities["a"])
    (run / "checkpoints" / "1").mkdir(parents=True)
    workdir_lib.claim(run, {}, identities["b"])
    workdir_lib.claim(run, {}, identities["repaired"])
    with pytest.raises(ValueError, match="contents of images: the run has .*, now "):
        workdir_lib.claim(run, {}, identities["c"])
    (run / "identity.json").write_text(json.dumps({
        name: value for name, value in identities["a"].items() if name != "images"
    }))
    workdir_lib.claim(run, {}, identities["c"])  # a run of an earlier version


def test_what_was_encoded_online_is_kept_up_to_a_size():
    made = []

    def encoders(entry):
        made.append(entry.key)
        return np.zeros(256, np.float32)

    online = features_lib.Online(encoders, kept_bytes=2048)
    for key in "abaca":
        online(features_lib.Entry(key, "student", ""))
    assert made == ["a", "b", "c"]  # of two kept, the one asked for last stays
    online(features_lib.Entry("b", "student", ""))
    assert made == ["a", "b", "c", "b"]


def test_without_pictures_the_transformer_alone_is_loaded(config, tiny, tmp_path, opened):
    config.update({"sample_every": 0, "num_train_steps": 1})
    train_lib.train(config, tmp_path / "run")
    assert {f.parent for f in opened} == {tiny.pipeline / "transformer"}


def test_of_the_vae_only_the_decoder_is_read(tiny):
    both = pipeline.load_pipeline(tiny.pipeline, dtype="float32", parts=("vae",)).vae_params
    half = pipeline.load_pipeline(
        tiny.pipeline, dtype="float32", parts=(pipeline.DECODER,)
    ).vae_params
    assert set(both) == {"encoder", "decoder"} and set(half) == {"decoder"}
    jax.tree.map(np.testing.assert_array_equal, half["decoder"], both["decoder"])


def test_a_second_encode_makes_nothing_and_loads_nothing(config, cache, monkeypatch):
    before = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    monkeypatch.setattr(encode_lib, "load_model", None)
    assert encode_lib.encode(config) == (0, 7)
    assert {p.name: p.stat().st_mtime_ns for p in cache.iterdir()} == before


def made_anew(config, cache):
    """Roles and captions of what a config needs and the cache does not have."""
    have = Cache(cache)
    wanted = features_lib.Entries(config, read_data(config, Needs())).all()
    return sorted((e.role, e.caption)
                  for e in wanted if e.key not in have)


EVERY_STUDENT = [("student", c) for c in ("a fox", "a photo of a", "a photo of b", "the same")]
EVERY_TEACHER = [("teacher", c) for c in ("a photo of a", "a photo of b", "the same")]


@pytest.mark.parametrize("changes,anew", [
    ({}, []),
    ({"text_tokens": 160}, EVERY_STUDENT),
    ({"teacher_tokens": 704}, EVERY_TEACHER),
    ({"vlm_rope_theta": 1e6}, EVERY_TEACHER),
    ({"double_template": True}, EVERY_TEACHER),
    ({"vlm_max_pixels": 512 * 512}, EVERY_TEACHER),
    ({"truncate_prompts": True}, EVERY_STUDENT + EVERY_TEACHER),
    ({"dtype": "bfloat16"}, EVERY_STUDENT + EVERY_TEACHER),
    ({"buckets": "64x64,96x80"}, [("teacher", "a photo of b")]),
    ({"sample_prompts": ("a fox", "a dog")}, [("student", "a dog")]),
    ({"seed": 1, "lora.rank": 4, "num_steps": 2, "batch_size": 1, "mesh.fsdp": 1}, []),
])
def test_a_setting_invalidates_exactly_what_follows_from_it(config, cache, changes, anew):
    config.update_from_flattened_dict(changes)
    assert made_anew(config, cache) == anew


@pytest.fixture
def own_photos(config, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "elsewhere")
    config.data = str(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def test_rows_invalidate_exactly_their_entries(config, cache, own_photos):
    assert made_anew(config, cache) == []  # the place does not matter
    (own_photos / "a.txt").write_text("a photo of b")
    assert made_anew(config, cache) == [("teacher", "a photo of b")]
    write_image(own_photos / "c.png", 9)
    assert made_anew(config, cache) == [("teacher", "a photo of b"), ("teacher", "the same")]


@pytest.mark.parametrize("folder,anew", [
    ("vlm", EVERY_TEACHER), ("model/text_encoder", EVERY_STUDENT + EVERY_TEACHER),
    ("model/transformer", []), ("model/vae", []),
])
def test_weights_invalidate_exactly_what_they_made(config, cache, tiny, tmp_path, folder, anew):
    shutil.copytree(tiny.pipeline, tmp_path / "model")
    shutil.copytree(tiny.vlm, tmp_path / "vlm")
    config.model, config.vlm = str(tmp_path / "model"), str(tmp_path / "vlm")
    file = sorted((tmp_path / folder).glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert made_anew(config, cache) == anew


def test_another_tokenizer_or_chat_template_invalidates_all(config, cache, tiny, tmp_path):
    shutil.copytree(tiny.pipeline, tmp_path / "model")
    config.model = str(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert made_anew(config, cache) == EVERY_STUDENT + EVERY_TEACHER


def test_every_config_key_is_known_to_matter_or_not():
    """A new key must be said to affect what is encoded, or be put in OTHER_KEYS: else caches go
    stale."""
    matter = {*keys.affecting(keys.STUDENT, keys.TEACHER, keys.VISION, keys.LATENTS)}
    assert not matter & OTHER_KEYS
    assert matter | OTHER_KEYS == set(workdir_lib.flat_config(common.base().to_dict()))


def test_what_is_missing_is_named_and_encode_adds_only_that(config, cache, own_photos, tmp_path):
    write_image(own_photos / "c.png", 9)
    with pytest.raises(CacheError, match=(
        r"1 of 7 entries are not in this cache; run python -m dopsd_jax.encode with the same "
        r"config:\n  c.png, caption 'caption', teacher$"
    )):
        train_lib.train(config, tmp_path / "run")
    before = sorted(cache.iterdir())
    assert encode_lib.encode(config) == (1, 7)
    assert set(before) < set(cache.iterdir()) and made_anew(config, cache) == []


def test_a_truncated_shard_stops_training_and_encode_makes_it_again(config, cache, tmp_path):
    (shard,) = cache.glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CacheError, match=f"{shard}: expected {len(whole)} bytes, found .*trunc"):
        train_lib.train(config, tmp_path / "run")
    assert encode_lib.encode(config) == (7, 7)
    (again,) = cache.glob("*.safetensors")
    assert load_file(again).keys() == Cache(cache).keys() and again.read_bytes() == whole


def test_what_was_done_before_a_failure_is_kept(config, tmp_path, monkeypatch):
    config.cache = str(tmp_path / "new")
    encode = features_lib.Encoders.__call__

    def stop_at_the_third_row(self, entry):
        if entry.row == 2:
            raise KeyboardInterrupt
        return encode(self, entry)

    monkeypatch.setattr(features_lib.Encoders, "__call__", stop_at_the_third_row)
    with pytest.raises(KeyboardInterrupt):
        encode_lib.encode(config)
    assert len(Cache(tmp_path / "new")) == 5  # all but that row's teacher and the other prompt
    monkeypatch.undo()
    assert encode_lib.encode(config) == (2, 7)


def test_captions_are_checked_before_weights_are_read(config, own_photos, monkeypatch):
    (own_photos / "c.txt").write_text("word " * 200)
    monkeypatch.setattr(encode_lib, "Entries", None)
    with pytest.raises(ValueError, match=r"c.png, caption, text_tokens = 128: .*at most 128"):
        encode_lib.encode(config)


def test_the_command_says_what_it_did_and_what_is_wrong(tiny, photos, cache, tmp_path):
    def run(*more):
        return commands.run(
            "dopsd_jax.encode", "--config", "configs/tiny.py", f"--config.model={tiny.pipeline}",
            f"--config.vlm={tiny.vlm}", f"--config.data={photos}",
            "--config.buckets=64x64,96x64", "--config.text_tokens=128",
            "--config.teacher_tokens=672", *more,
        )

    done = run(f"--config.cache={cache}")
    assert done.stdout == f"0 entries made, 6 were there: {cache}\n", done.stderr
    done = run()
    assert done.returncode == 1
    assert done.stderr.endswith("error: cache: expected a folder or gs://.., got nothing "
                                "(--config.cache=..)\n")

"""Numbers told by pictures, on pictures whose answer is known, and in a run."""

import json

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from dopsd_jax import train as train_lib
from dopsd_jax.core.metrics import GAUGES, read_metrics
from dopsd_jax.run import gauges


@pytest.fixture(scope="module")
def photo():
    image = Image.fromarray(photographs.astronaut()).resize((128, 128))
    return np.asarray(image)[None]


def blurred(pixels, radius=2):
    out = pixels.astype(np.float32)
    for axis in (1, 2):
        out = sum(np.roll(out, i, axis) for i in range(-radius, radius + 1)) / (2 * radius + 1)
    return out.astype(np.uint8)


def test_blur_lowers_sharpness_and_a_ramp_has_none(photo):
    assert gauges.sharpness(blurred(photo))[0] < 0.5 * gauges.sharpness(photo)[0]
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (1, 64, 64, 3))
    assert gauges.sharpness(ramp)[0] == 0


def test_distance_grows_with_noise_and_is_zero_to_itself(photo):
    assert gauges.distance(photo, photo)[0] == 0
    darker = (photo * 0.5).astype(np.uint8)
    assert gauges.distance(darker, photo)[0] == pytest.approx(photo.mean() / 2, rel=0.1)
    # Fine grain hardly counts; what is somewhere else does.
    grain = np.random.default_rng(0).integers(-20, 21, photo.shape)
    grainy = np.clip(photo.astype(int) + grain, 0, 255).astype(np.uint8)
    assert gauges.distance(grainy, photo)[0] < 4 < gauges.distance(photo[:, :, ::-1], photo)[0]


def test_look_distance_sees_colours_and_not_places(photo):
    assert gauges.style_distance(photo[:, :, ::-1], photo)[0] == 0
    swapped = photo[..., ::-1]
    assert gauges.style_distance(swapped, photo)[0] > 5
    shifted = np.full((1, 8, 8, 3), 100, np.uint8), np.full((1, 8, 8, 3), 130, np.uint8)
    assert gauges.style_distance(*shifted)[0] == 30


def test_retention_tells_drift_and_the_ratio_of_sharpness(photo):
    told = gauges.retention(photo, photo)
    assert told == {"drift": 0, "sharpness_ratio": 1}
    told = gauges.retention(blurred(photo), photo)
    assert told["sharpness_ratio"] < 0.5 and 0 < told["drift"] < 10


def test_the_best_checkpoint_is_the_nearest_look_that_is_sharp_enough():
    rows = [
        {"step": 0, "style": 9.0, "sharpness_ratio": 1.0},
        {"step": 10, "style": 5.0, "sharpness_ratio": 0.95},
        {"step": 20, "style": 4.0, "sharpness_ratio": 0.85},
        {"step": 30, "style": 1.0, "sharpness_ratio": 0.5},   # nearest, but blurred
        {"step": 40, "style": 2.0, "sharpness_ratio": 0.9},   # not saved
    ]
    assert gauges.best_checkpoint(rows, [0, 10, 20, 30])["step"] == 20
    assert gauges.best_checkpoint(rows, [0, 30]) is None
    assert gauges.best_checkpoint([{"step": 5, "style": 3.0}], [5])["step"] == 5  # no gauge prompts
    rows = [r | {"preview_style": 10 - r["style"], "preview_sharpness_ratio": 1.0}
            for r in rows[:4]] + rows[4:]
    assert gauges.best_checkpoint(rows, [0, 10, 20, 30, 40], moved=True)["step"] == 10


def test_a_run_leaves_gauges_pictures_of_them_and_the_best_checkpoint(short_run, tmp_path):
    c = short_run
    c.sample_every = c.checkpoint_every = 1
    c.gauge_prompts = ("a lighthouse", "a bowl of ramen")
    run = tmp_path / "run"
    train_lib.train(c, run)
    rows = read_metrics(run, GAUGES)
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert rows[0]["drift"] == 0 and rows[0]["sharpness_ratio"] == 1
    assert rows[2]["drift"] > 0 and rows[2]["style"] != rows[0]["style"]
    assert set(rows[2]) == {
        "step", "style", "teacher_style", "untuned_style", "drift", "sharpness_ratio"
    }
    assert rows[0]["untuned_style"] == rows[0]["style"]
    assert (run / "samples" / "gauge_000002.png").is_file()
    best = json.loads((run / gauges.BEST).read_text())
    assert best["best"]["step"] in (1, 2) and "sharpness" in best["rule"]

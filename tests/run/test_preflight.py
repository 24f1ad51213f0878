"""The preflight's findings on pictures that are made to show them."""

import json

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from dopsd_jax import train as train_lib
from dopsd_jax.run import preflight

NAMES = ("astronaut", "chelsea", "coffee", "rocket")


def picture(name, box=None, side=128):
    image = Image.fromarray(getattr(photographs, name)())
    image = image.crop((0, 0, min(image.size), min(image.size)))
    return np.asarray(image.resize((side, side), Image.Resampling.BOX, box=box))


@pytest.fixture(scope="module")
def targets():
    return np.stack([picture(n) for n in NAMES])


def noise(targets, seed=0):
    return np.random.default_rng(seed).integers(0, 256, targets.shape, np.uint8)


def test_a_teacher_nearer_than_the_student_teaches(targets):
    found = preflight.compare(noise(targets), targets, targets)
    assert found.teaches and found.gain == pytest.approx(1) and found.teacher_style == 0
    assert len(found.words()) == 1 and "nearer to your pictures" in found.words()[0]
    assert found.zoom == 1 and found.shift == (0, 0) and found.teacher_sharpness == 1


def test_a_teacher_that_draws_as_the_student_has_nothing_to_teach(targets):
    same = noise(targets)
    found = preflight.compare(same, same, targets)
    assert not found.teaches and found.gain == 0
    assert found.words()[0].startswith("THE TEACHER HAS NOTHING TO TEACH")


def test_few_pictures_that_disagree_are_not_clear(targets):
    student = noise(targets)
    teacher = student.copy()
    teacher[0] = targets[0]  # one of four is much nearer
    found = preflight.compare(student, teacher, targets)
    assert not found.teaches and "not clear" in found.words()[0]


def test_zoom_shift_cast_and_blur_are_told(targets):
    # The middle four fifths of every target, enlarged.
    sides = [min(Image.fromarray(getattr(photographs, n)()).size) for n in NAMES]
    larger = np.stack([
        picture(n, box=(0.1 * s, 0.1 * s, 0.9 * s, 0.9 * s))
        for n, s in zip(NAMES, sides, strict=True)
    ])
    found = preflight.compare(noise(targets), larger, targets)
    assert found.zoom == 1.25 and "at 1.25 of their size" in " ".join(found.words())
    moved = np.roll(targets, (0, 12), (1, 2))
    found = preflight.compare(noise(targets), moved, targets)
    assert found.zoom == 1 and found.shift == (pytest.approx(12 / 128, abs=0.02), 0)
    redder = np.clip(targets.astype(int) + [30, 0, 0], 0, 255).astype(np.uint8)
    found = preflight.compare(noise(targets), redder, targets)
    assert found.cast[0] > 20 and abs(found.cast[1]) < 1 and "+2" in " ".join(found.words())
    soft = np.stack([
        np.asarray(Image.fromarray(p).resize((32, 32)).resize((128, 128))) for p in targets
    ])
    found = preflight.compare(noise(targets), soft, targets)
    assert found.teacher_sharpness < 0.6 and "blurred" in " ".join(found.words())


def test_pictures_of_other_things_have_no_zoom_or_shift(targets):
    assert preflight.framing(targets[0], targets[1]) == (1, 0, 0)
    assert preflight.framing(noise(targets)[0], targets[1]) == (1, 0, 0)


def test_one_picture_is_refused(targets):
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        preflight.compare(targets[:1], targets[:1], targets[:1])


def test_a_run_begins_with_it_and_can_leave_it_out(short_run, tmp_path):
    short_run.num_train_steps, short_run.preflight = 1, "on"
    train_lib.train(short_run, tmp_path / "run")
    found = json.loads((tmp_path / "run" / preflight.FILE).read_text())
    assert found["pictures"] == 8 and found["words"] and found["student_style"] > 0
    assert (tmp_path / "run" / "samples" / "preflight.png").is_file()
    short_run.preflight = "off"
    train_lib.train(short_run, tmp_path / "other")
    assert not (tmp_path / "other" / preflight.FILE).exists()

"""A folder of rows that are as they should be."""

import shutil

import pytest
from PIL import Image
from skimage import data as photographs


@pytest.fixture(scope="session")
def photograph(tmp_path_factory):
    """A real photograph as JPEG, 128x96."""
    path = tmp_path_factory.mktemp("photograph") / "cat.jpg"
    Image.fromarray(photographs.chelsea()).resize((128, 96)).save(path, quality=90)
    return path


@pytest.fixture
def folder(tmp_path, photograph):
    """A folder with two images and their captions."""
    for name, caption in (("b", "a cat\n"), ("a", "the same cat")):
        shutil.copy(photograph, tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.txt").write_text(caption)
    return tmp_path

"""Which picture meets which reference, and where prompts come from."""

import json

import pytest
from PIL import Image

from dopsd_jax.compare.pairs import pair_up, read_folder, read_prompts, replace_words


@pytest.fixture
def folder(tmp_path):
    """folder(name, ..): a folder of small pictures of these names."""
    def make(*names, where="a"):
        (tmp_path / where).mkdir()
        for name in names:
            Image.new("RGB", (8, 8)).save(tmp_path / where / name)
        return tmp_path / where

    return make


def test_pictures_are_read_by_name_and_nothing_else(folder):
    directory = folder("b.png", "a.JPG")
    (directory / "b.json").write_text("{}")
    (directory / "scores.csv").write_text("")
    assert [p.name for p in read_folder(directory)] == ["a.JPG", "b.png"]


def test_folders_that_cannot_be_read(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere: expected a folder of pictures, found nothing"):
        read_folder(tmp_path / "nowhere")
    directory = folder("a.png", "b.png", "c.png")
    with pytest.raises(ValueError, match="expected a folder of pictures, found a file"):
        read_folder(directory / "a.png")
    for name in "ab":
        (directory / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"(?s)a\.png: expected a whole .*\n.*b\.png: expected"):
        read_folder(directory)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found none"):
        read_folder(tmp_path / "empty")


def test_names_pair_one_to_one_whatever_the_extension(folder):
    ours = read_folder(folder("a.png", "b.png"))
    others = read_folder(folder("b.jpg", "a.webp", where="r"))
    assert pair_up(ours, others, "name") == [[0], [1]]
    assert [others[j].stem for (j,) in pair_up(ours, others, "name")] == ["a", "b"]


def test_names_without_a_partner_are_told_on_both_sides(folder):
    ours = read_folder(folder("a.png", "b.png", "b.jpg"))
    others = read_folder(folder("b.jpg", "c.png", where="r"))
    with pytest.raises(ValueError) as e:
        pair_up(ours, others, "name")
    for line in ("picture a.png: no reference a.*", "reference c.png: no picture c.*",
                 "picture b.jpg: another picture has this name too", "pairing=nearest or all"):
        assert line in str(e.value)


def test_other_pairings_take_all(folder):
    ours = read_folder(folder("a.png", "b.png"))
    others = read_folder(folder("x.jpg", "y.jpg", "z.jpg", where="r"))
    for pairing in ("nearest", "all"):
        assert pair_up(ours, others, pairing) == [[0, 1, 2], [0, 1, 2]]
    with pytest.raises(ValueError, match="(?s)expected one of name, nearest, all, got None.*mean"):
        pair_up(ours, others, None)


def test_prompts_come_from_what_lies_beside(folder):
    directory = folder("a.png", "b.png", "c.png")
    (directory / "a.json").write_text(json.dumps({"prompt": "a red fox", "seed": 3}))
    (directory / "a.txt").write_text("not this")
    (directory / "b.txt").write_text("ein Fuchs, müde\n")
    assert read_prompts(read_folder(directory)) == ["a red fox", "ein Fuchs, müde", None]


def test_broken_sidecars_are_told_together(folder):
    directory = folder("a.png", "b.png", "c.png", "d.png")
    (directory / "a.json").write_text("{")
    (directory / "b.json").write_text('{"seed": 1}')
    (directory / "c.json").write_text('{"prompt": 4}')
    (directory / "d.txt").write_text(" \n")
    with pytest.raises(ValueError) as e:
        read_prompts(read_folder(directory))
    assert all(f"{name}: expected" in str(e.value) for name in
               ("a.json", "b.json", "c.json", "d.txt"))


def test_trigger_words_are_replaced_and_never_in_vain():
    prompts = ["a [V] in snow", None, "[V] and [V]"]
    assert replace_words(prompts, ["[V]=dog"]) == ["a dog in snow", None, "dog and dog"]
    with pytest.raises(ValueError, match=r"no prompt has '\[W\]'; the first is 'a \[V\] in snow'"):
        replace_words(prompts, ["[W]=dog"])
    with pytest.raises(ValueError, match="expected OLD=NEW, such as .*, got 'dog'"):
        replace_words(prompts, ["dog"])

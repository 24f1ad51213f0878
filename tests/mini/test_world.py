"""The mini world: what it shows, what it holds back, and that a seed fixes it."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dopsd_jax.mini import build, unnamed_styles, world
from dopsd_jax.mini.emoji import (
    CONCEPTS,
    HELD_OUT_CONCEPTS,
    SETS,
    SHEETS,
    SPRITE,
    load_sprites,
    svg,
    write_sheets,
)


@pytest.fixture(scope="module")
def sprites():
    """A disc for every icon, in its own grey: scenes need shapes, not emoji."""
    made = {}
    for i, name in enumerate(SETS):
        for j, concept in enumerate(CONCEPTS):
            image = Image.new("RGBA", (SPRITE, SPRITE))
            grey = (40 * i + j) % 200
            ImageDraw.Draw(image).ellipse((8, 8, 120, 120), (grey, grey, grey, 255))
            made[name, concept] = np.asarray(image)
    return made


def scene_of(seed, **options):
    return world.draw_scene(np.random.default_rng(seed), **options)


@pytest.mark.parametrize("kind", ["scenes", "pairs", "judge"])
def test_a_sample_is_a_function_of_seed_and_index(sprites, kind):
    build._start(sprites)
    first, again, other = (build.one(kind, seed, 3) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["pixels"], again["pixels"])
    assert first["caption"] == again["caption"]
    assert np.any(first["pixels"] != other["pixels"])


def test_training_scenes_hold_back_styles_and_concepts():
    scenes = [scene_of(i) for i in range(500)]
    assert {s.style for s in scenes} == set(world.TRAINED_STYLES)
    shown = {t.concept for s in scenes for t in s.things}
    assert shown == set(world.TRAINED_CONCEPTS)
    art = {world.STYLES[s].art for s in world.TRAINED_STYLES}
    assert not art & {world.STYLES[s].art for s in world.HELD_OUT_STYLES}
    assert len(HELD_OUT_CONCEPTS) * 10 == len(CONCEPTS)


def test_a_caption_names_style_concepts_and_colours_but_no_place():
    for i in range(300):
        scene = scene_of(i)
        words = scene.caption.replace(",", "").split()
        assert scene.style in words
        for thing in scene.things:
            assert thing.concept in scene.caption
            assert thing.tint is None or thing.tint in words
        assert not {"left", "right", "above", "below"} & set(words)


def test_one_caption_has_many_pictures(sprites):
    scene = scene_of(0, style="noto", concept="car", two=0.0)
    rng = np.random.default_rng(5)
    pictures = [world.render(sprites, world.rearranged(rng, scene), rng) for _ in range(4)]
    for a in range(4):
        for b in range(a):
            assert np.abs(pictures[a].astype(int) - pictures[b]).mean() > 5


def test_two_objects_do_not_cover_each_other():
    scenes = [s for s in (scene_of(i, two=1.0) for i in range(200))]
    assert all(world._apart(s.things) for s in scenes)
    assert all(s.things[0].concept != s.things[1].concept for s in scenes)


def test_placing_puts_the_sprite_where_the_scene_says(sprites):
    thing = world.Thing("car", size=20.0, x=40.0, y=16.0, tilt=10.0, mirrored=True, tint=None)
    alpha = world.place(sprites["noto", "car"], thing)[..., 3]
    y, x = np.argwhere(alpha > 0.5).mean(0) * world.SIZE / world.CANVAS
    assert abs(x - 40) < 0.5 and abs(y - 16) < 0.5
    diameter = 2 * np.sqrt((alpha > 0.5).sum() / np.pi) * world.SIZE / world.CANVAS
    assert abs(diameter - 20 * 112 / 128) < 0.5


def words_of(caption):
    return set(caption.replace(",", "").split())


def test_spare_words_are_no_styles_and_often_made_up():
    words = [unnamed_styles.spare_word(np.random.default_rng(i)) for i in range(400)]
    assert not set(words) & set(world.STYLES)
    made_up = [w for w in words if w not in unnamed_styles.SPARE_WORDS]
    assert 100 < len(made_up) < 300 and len(set(made_up)) > 100


def test_a_pair_is_in_its_style_or_in_a_look_without_a_name(sprites):
    build._start(sprites)
    pairs = [build.one("pairs", 0, i) for i in range(120)]
    named = [p for p in pairs if words_of(p["caption"]) & set(world.STYLES)]
    assert 30 < len(named) < 66
    assert not any(np.array_equal(p["pixels"], p["reference"]) for p in pairs)


def test_naming_a_look_leaves_colour_words_alone(sprites):
    build._start(sprites)
    thing = world.Thing("cat", 30.0, 32.0, 32.0, 0.0, False, "pink")
    scene = world.Scene("ink", (thing,), "a pink cat, ink style")
    captions = {build.pair(scene, np.random.default_rng(i))["caption"] for i in range(20)}
    assert len(captions) > 5 and all(c.startswith("a pink cat, ") for c in captions)


def test_an_invented_look_is_one_look_of_many(sprites):
    def pictures(seed):
        style = unnamed_styles.invented_style(np.random.default_rng(seed))
        assert style.art in {world.STYLES[s].art for s in world.TRAINED_STYLES}
        scene = scene_of(0, style="noto", concept="car", two=0.0)
        rng = np.random.default_rng(9)
        return np.stack([
            world.render(sprites, world.rearranged(rng, scene), rng, style) for _ in range(4)
        ]).mean((1, 2))

    means = [pictures(seed) for seed in range(12)]
    within = np.mean([m.std(0) for m in means])
    between = np.std([m.mean(0) for m in means], axis=0).mean()
    assert between > 2 * within


def test_an_alias_is_followed_and_a_missing_icon_named():
    icons = {"prefix": "noto", "icons": {"a": {"body": "<path/>"}}, "width": 10,
             "aliases": {"b": {"parent": "a"}}}
    assert "<path/>" in svg(icons, "b") and 'viewBox="0 0 10 16"' in svg(icons, "b")
    with pytest.raises(ValueError, match="noto: expected an icon 'c'"):
        svg(icons, "c")


def test_sheets_give_their_sprites_back(sprites, tmp_path):
    write_sheets(sprites, tmp_path)
    again = load_sprites(tmp_path)
    assert again.keys() == sprites.keys()
    assert all(np.array_equal(again[key], sprites[key]) for key in sprites)
    Image.new("RGBA", (9, 9)).save(tmp_path / "noto.png")
    with pytest.raises(ValueError, match="noto.png: expected RGBA, 640x512 .*got RGBA, 9x9"):
        load_sprites(tmp_path)


def test_the_shipped_emoji_are_all_there_with_their_authors():
    shipped = load_sprites()
    coverage = [sprite[..., 3].mean() / 255 for sprite in shipped.values()]
    assert len(coverage) == len(SETS) * len(CONCEPTS) and min(coverage) > 0.1
    credits = (SHEETS / "ATTRIBUTION").read_text()
    assert all(credit in credits for credit in SETS.values())


def test_placement_tells_where_in_the_icon_a_cell_lies():
    """Against pictures of an icon that is redder to its right and greener downwards."""
    ramp = np.arange(SPRITE, dtype=np.uint8)
    icon = np.full((SPRITE, SPRITE, 4), 255, np.uint8)
    icon[..., 0], icon[..., 1] = ramp[None], ramp[:, None]
    for seed in range(20):
        thing = scene_of(seed, two=0.0).things[0]
        told = world.placement(world.Scene("noto", (thing,), ""), 16)
        layer = world.place(icon, thing)
        middle = np.mean([layer[i::8, j::8] for i in (3, 4) for j in (3, 4)], axis=0)
        inside, alpha = told[..., 0] == 1, middle[..., 3]
        assert inside.sum() > 20 and not np.any(inside & (alpha == 0) | ~inside & (alpha == 1))
        assert not told[~inside].any()
        across, down, cos, sin, size, mirror = told[..., 1:].transpose(2, 0, 1)
        clear = inside & (np.maximum(np.abs(across), np.abs(down)) < 0.9)
        seen = middle[..., :2] * 255 / SPRITE * 2 - 1
        np.testing.assert_allclose((across * mirror)[clear], seen[clear][:, 0], atol=0.06)
        np.testing.assert_allclose(down[clear], seen[clear][:, 1], atol=0.06)
        both = inside[:, 1:] & inside[:, :-1]  # a cell and its right neighbour, 4 pixels on
        moved = (told[:, 1:, 1:3] - told[:, :-1, 1:3])[both] * 8
        want = np.stack([cos * size, -sin * size], axis=-1)[:, 1:][both] * 2
        np.testing.assert_allclose(moved, want, atol=1e-4)
    assert not world.placement(world.Scene("noto", (), ""), 8).any()

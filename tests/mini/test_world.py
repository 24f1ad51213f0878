"""The mini world: what it shows, what it holds back, and that a seed fixes it."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dopsd_jax.data import prompts
from dopsd_jax.mini import build, data, encoding, styles, unnamed_styles, world
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
    assert {s.style for s in scenes} == set(styles.TRAINED_STYLES)
    assert len(styles.TRAINED_STYLES) == 10 and len(styles.HELD_OUT_STYLES) == 8
    shown = {t.concept for s in scenes for t in s.things}
    assert shown == set(world.TRAINED_CONCEPTS)
    assert len(world.TRAINED_CONCEPTS) == 44 and len(HELD_OUT_CONCEPTS) == 4
    art = {styles.STYLES[s].art for s in styles.TRAINED_STYLES}
    unseen = {styles.STYLES[s].art for s in styles.HELD_OUT_STYLES[:4]}
    assert not art & unseen and art | unseen == set(SETS)


def test_a_caption_names_style_concepts_colours_and_numbers():
    numbers = []
    for i in range(600):
        scene = scene_of(i)
        words = scene.caption.replace(",", "").split()
        assert scene.style in words
        for thing in scene.things:
            assert {thing.concept, world.plural(thing.concept)} & set(words)
            assert thing.tint is None or thing.tint in words
        same = len(scene.things) > 1 and len({t.concept for t in scene.things}) == 1
        assert same == bool({"two", "three"} & set(words))
        if same:
            numbers.append(len(scene.things))
            assert world.NUMBERS[len(scene.things)] in words
            assert len({t.tint for t in scene.things}) == 1
    assert set(numbers) == {2, 3} and 30 < len(numbers) < 90


def test_a_caption_tells_a_place_only_where_it_is_true_and_it_stays_true():
    scenes = [scene_of(i, two=0.0, counted=0.0) for i in range(400)]
    told = [s for s in scenes if s.place]
    assert {s.place for s in told} == set(world.PLACES) and 60 < len(told) < 140
    for scene in scenes:
        assert [p for p in world.PLACES if p in scene.caption] == [p for p in [scene.place] if p]
    for i, scene in enumerate(told):
        other = world.rearranged(np.random.default_rng(i), scene)
        assert world.place_of(scene.things[0]) == world.place_of(other.things[0]) == scene.place
        assert other.caption == scene.caption and other.things != scene.things


def test_one_caption_has_many_pictures(sprites):
    scene = scene_of(0, style="noto", concept="car", two=0.0, counted=0.0, placed=0.0)
    rng = np.random.default_rng(5)
    pictures = [world.render(sprites, world.rearranged(rng, scene), rng) for _ in range(4)]
    for a in range(4):
        for b in range(a):
            assert np.abs(pictures[a].astype(int) - pictures[b]).mean() > 5


def test_two_objects_do_not_cover_each_other():
    scenes = [scene_of(i, two=1.0) for i in range(200)]
    assert all(s.things[0].concept != s.things[1].concept for s in scenes)
    counted = [scene_of(i, two=0.0, counted=1.0) for i in range(200)]
    assert all(world._apart(s.things) for s in scenes + counted)


def test_a_plain_scene_is_one_thing_of_which_nothing_more_is_told():
    for seed in range(60):
        scene = world.plain_scene(np.random.default_rng(seed), "blueprint", "key")
        (thing,) = scene.things
        assert (thing.concept, thing.tint, scene.place) == ("key", None, None)
        assert not set(scene.caption.replace(",", "").split()) & {"two", "three", "on", "at"}


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
    assert not set(words) & set(styles.STYLES)
    made_up = [w for w in words if w not in unnamed_styles.SPARE_WORDS]
    assert 100 < len(made_up) < 300 and len(set(made_up)) > 100


def test_a_pair_is_in_its_style_or_in_a_look_without_a_name(sprites):
    build._start(sprites)
    pairs = [build.one("pairs", 0, i) for i in range(120)]
    named = [p for p in pairs if words_of(p["caption"]) & set(styles.STYLES)]
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
        assert style.art in {styles.STYLES[s].art for s in styles.TRAINED_STYLES}
        scene = scene_of(0, style="noto", concept="car", two=0.0, counted=0.0, placed=0.0)
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
    with pytest.raises(ValueError, match="noto.png: expected RGBA, 1024x768 .*got RGBA, 9x9"):
        load_sprites(tmp_path)


def test_the_shipped_emoji_are_all_there_with_their_authors():
    shipped = load_sprites()
    coverage = [sprite[..., 3].mean() / 255 for sprite in shipped.values()]
    assert len(coverage) == len(SETS) * len(CONCEPTS) and min(coverage) > 0.05
    credits = (SHEETS / "ATTRIBUTION").read_text()
    assert all(credit in credits for credit in SETS.values())


def test_placement_tells_where_in_the_icon_a_cell_lies():
    """Against pictures of an icon that is redder to its right and greener downwards."""
    ramp = np.arange(SPRITE, dtype=np.uint8)
    icon = np.full((SPRITE, SPRITE, 4), 255, np.uint8)
    icon[..., 0], icon[..., 1] = ramp[None], ramp[:, None]
    for seed in range(20):
        thing = scene_of(seed, two=0.0, counted=0.0).things[0]
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


def test_patches_are_those_of_the_vision_encoders_processor():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    area = dict(min_pixels=64 * 64, max_pixels=64 * 64)
    want = [prompts.image_patches(data.to_float(p), 8, 2, 2, **area)[0] for p in pixels]
    np.testing.assert_allclose(encoding.patches(pixels), want, atol=1e-6)


@pytest.mark.parametrize("name", styles.STYLES)
def test_a_style_draws_the_object_and_stays_in_range(sprites, name):
    """The object's picture differs from its ground, and no style needs much clipping."""
    style, rng = styles.STYLES[name], np.random.default_rng(0)
    thing = world.Thing("car", 40.0, 32.0, 32.0, 0.0, False, None)
    layer = world.place(sprites[style.art, "car"], thing)
    canvas = style.ground(rng)
    drawn = style.draw(canvas, layer, None, rng)
    if style.finish is not None:
        drawn = style.finish(drawn, rng)
    assert drawn.shape == canvas.shape == (styles.CANVAS, styles.CANVAS, 3)
    assert drawn.min() > -0.05 and drawn.max() < 1.1
    inside = layer[..., 3] > 0.5
    assert np.abs(drawn - canvas)[inside].mean() > 2 * np.abs(drawn - canvas)[~inside].mean()

"""The page to play with LoRAs: its pictures are those of `sample`, and no slider compiles."""

import shutil
import socket

import jax
import numpy as np
import pytest

from dopsd_jax import demo, sample, weights
from dopsd_jax.run import loras
from dopsd_jax.weights import lora_files
from tests.test_several_loras import random_lora

SIDE = 32


@pytest.fixture(scope="module")
def pipe(tiny):
    return weights.load_pipeline(tiny.pipeline, dtype="float32")


@pytest.fixture(scope="module")
def files(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for i, where in enumerate(("/attention/", "/feed_forward/")):
        lora_files.save_diffusers(
            folder / f"{i}.safetensors", random_lora(pipe, where, 3, i),
            lora_files.LoraSpec(3, 6.0), pipe.lora.modules,
        )
    return [str(folder / f"{i}.safetensors") for i in range(2)]


@pytest.fixture(scope="module")
def player(pipe, files):
    return demo.Player(pipe, [loras.Named(f) for f in files], SIDE, SIDE)


def test_an_address_where_no_page_can_be_served_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: no page .* in use\\); take another"):
            demo.check_address("127.0.0.1", port)
    demo.check_address("127.0.0.1", port)
    demo.check_address("127.0.0.1", 0)
    with pytest.raises(ValueError, match="--host 203.0.113.1 --port 0: no page can be served"):
        demo.check_address("203.0.113.1", 0)


def test_the_pictures_are_those_of_sample(player, pipe, files):
    base, tuned = player.draw("a fox", seed=3, num_steps=2, strengths=(0.5, -1.0))
    size = dict(num_steps=2, height=SIDE, width=SIDE, seed=3)
    want = sample.generate(pipe, ["a fox"], **size, lora=[(files[0], 0.5), (files[1], -1.0)])[0]
    assert np.abs(tuned.astype(int) - want).max() <= 1
    plain = sample.generate(pipe, ["a fox"], **size, lora=[(files[0], 0), (files[1], 0)])[0]
    np.testing.assert_array_equal(base, plain)
    assert np.abs(tuned.astype(int) - base).max() > 4


def test_no_slider_compiles_anything(player):
    """Strength, seed, prompt and number of steps are arguments of what the first picture made."""
    first = player.draw("a fox", seed=0, num_steps=2, strengths=(1.0, 1.0))
    compiled = []

    def listen(event, *args, **kwargs):
        if "compil" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        moved = [player.draw("a dog", seed=7, num_steps=3, strengths=(0.3, 1.7))]
        moved.append(player.draw("a dog", seed=7, num_steps=8, strengths=(-0.35, 0.0)))
        assert not compiled
        jax.jit(lambda x: x + 41)(1.0)  # the listener hears what it should
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    pictures = [picture for pair in (first, *moved) for picture in pair]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_a_strength_alone_draws_one_picture(player, monkeypatch):
    drawn = []
    generate = sample.generate

    def counted(*args, **kwargs):
        drawn.append(kwargs["lora"])
        return generate(*args, **kwargs)

    monkeypatch.setattr(sample, "generate", counted)
    bases = [player.draw("a cat", seed=1, num_steps=2, strengths=(s, 1.0))[0] for s in (1, 2, 3)]
    assert len(drawn) == 4 and (bases[0] == bases[2]).all()


def test_the_model_is_the_runs_own_or_must_be_given(files, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model": "mini", "trainable": "lora", "teacher": "ema", "lora": {}}'
    )
    (tmp_path / "identity.json").write_text("{}")
    assert demo.model_of([loras.Named(files[0]), loras.Named(str(tmp_path))])["model"] == "mini"
    with pytest.raises(ValueError, match="--model: expected the model's directory .*0.safetensors"):
        demo.model_of([loras.Named(files[0])])


def test_what_cannot_be_drawn_is_refused_at_the_start(pipe, files):
    with pytest.raises(ValueError, match="multiples of 16, got 40x32"):
        demo.Player(pipe, [loras.Named(files[0])], 40, 32)
    with pytest.raises(ValueError, match="given twice"):
        demo.Player(pipe, [loras.Named(files[0])] * 2, SIDE, SIDE)


def test_without_gradio_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"needs the package gradio .*pip install -e '\.\[demo\]'"):
        demo.load_gradio()


BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.mark.slow
@pytest.mark.skipif(not (BROWSER and DRIVER), reason="apt install chromium chromium-driver")
def test_in_a_browser(player, tmp_path):
    pytest.importorskip("gradio", reason="pip install -e '.[demo]'")
    selenium = pytest.importorskip("selenium.webdriver")
    from tests.browser import Page

    blocks = demo.page(player, [1.0, 0.5], 2, False, "a fox")
    address = demo.launch(blocks, "127.0.0.1", 0, prevent_thread_lock=True)
    assert address.startswith("http://127.0.0.1:")
    with Page(selenium, address, BROWSER, DRIVER) as page:
        page.screenshot(tmp_path / "empty.png")
        page.press("draw")
        page.pictures(player.draw("a fox", seed=0, num_steps=2, strengths=(1.0, 0.5)))
        page.screenshot(tmp_path / "first.png")
        page.slide_to_the_left_end("strength0")
        assert page.value("strength0") == -2
        page.pictures(player.draw("a fox", seed=0, num_steps=2, strengths=(-2, 0.5)))
        page.press("next")
        page.pictures(player.draw("a fox", seed=1, num_steps=2, strengths=(-2, 0.5)))
        page.set_text("prompt", " ")
        page.press("draw")
        assert page.told("Not drawn") == "Not drawn: prompt 0 is empty"
        assert page.foreign_requests() == [] and page.console_errors() == []
        page.screenshot(tmp_path / "error.png")
    blocks.close()

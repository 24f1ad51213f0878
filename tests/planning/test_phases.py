"""The phases of a run that are planned for: their programs are those that `train` runs."""

import math

import jax
import numpy as np
import pytest

from configs import z_image_turbo_lora
from dopsd_jax import plan
from dopsd_jax import train as train_lib
from dopsd_jax.core import sharding, trees
from dopsd_jax.core.memory import memory_of
from dopsd_jax.method import contexts, sampling
from dopsd_jax.planning import lowering, phases
from dopsd_jax.planning.chips import GIB
from dopsd_jax.run import loop

PROGRAMS = {phases.CAPTIONS: (contexts, 3), phases.VLM: (contexts, 3),
            phases.LATENTS: (contexts, 1), phases.DRAW: (sampling, 1), phases.DECODE: (sampling, 1)}


def described(args):
    """Structure, shapes and dtypes of arrays or their shapes, and the bytes of all."""
    leaves, structure = jax.tree.flatten(args)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(jax.typeof, leaves)]
    return structure, [(x.shape, str(x.dtype)) for x in shapes], trees.num_bytes(shapes)


class Recorder:
    """In place of a jitted function: notes what it is called with or lowered for.

    A call returns zeros of the right shapes, so that nothing has to be compiled.
    """

    def __init__(self, jitted, statics):
        self._jitted, self._statics, self.called, self.lowered = jitted, statics, [], []

    def __call__(self, *args):
        self.called.append(described(args[self._statics:]))
        return jax.tree.map(
            lambda s: np.zeros(s.shape, s.dtype), self._jitted.eval_shape(*args)
        )

    def lower(self, *args):
        self.lowered.append(described(args[self._statics:]))


@pytest.fixture
def recorders(monkeypatch):
    made = {}
    for name, (module, statics) in PROGRAMS.items():
        attribute = phases.MODULES[name]
        made[name] = Recorder(getattr(module, attribute), statics)
        monkeypatch.setattr(module, attribute, made[name])
    return made


def begun(config, workdir, monkeypatch):
    """A run up to its first update: what `loop.run` was given."""
    given = []
    monkeypatch.setattr(loop, "run", lambda config, workdir, task: given.append(task))
    monkeypatch.setattr(train_lib, "choose_best", lambda *_: None)
    train_lib.train(config, workdir)
    return given[0]


@pytest.mark.parametrize("kind", ["vlm", "edit"])
def test_what_is_planned_for_is_what_a_run_calls(
    kind, short_run, tiny_flux2, recorders, monkeypatch, tmp_path
):
    short_run.update({"remat": "full", "sample_rows": 2, "preflight": "on"} | {
        "vlm": {"encoder_dtype": "nf4", "sample_guidance": 3.0},
        "edit": {"model": str(tiny_flux2), "recipe": "edit", "text_tokens": 512,
                 "teacher_tokens": 512, "base_dtype": "int8"},
    }[kind])
    task = begun(short_run, tmp_path / "run", monkeypatch)
    mesh = sharding.make_mesh(**short_run.mesh.to_dict())
    known = phases.arrays(short_run, mesh)
    assert tuple(known) == phases.of_run(short_run)
    for name in set(known) - {phases.TRAIN}:
        phases.lower(short_run, mesh, name)
        structure, shapes, size = max(recorders[name].called, key=lambda call: call[2])
        (planned,) = recorders[name].lowered
        if name in (phases.LATENTS, phases.DECODE):  # half of the VAE is not read by the program
            assert set(planned[1]) <= set(shapes) and size >= planned[2]
        else:
            assert planned == (structure, shapes, size), name
        assert 0 < known[name].own < planned[2]
    assert known[phases.TRAIN].own >= trees.num_bytes(task.state)
    uncalled = set(recorders) - set(known) - {phases.CAPTIONS}
    assert not [name for name in uncalled if recorders[name].called]


def test_what_lies_beside_a_phase_is_what_the_run_has_loaded(short_run, tiny):
    short_run.update({"remat": "full"})
    mesh = sharding.make_mesh(**short_run.mesh.to_dict())
    pipe = train_lib.load_encoding_parts(short_run, mesh, draws_pictures=True)
    decoder = trees.num_bytes(pipe.vae_params)
    known = phases.arrays(short_run, mesh)
    assert known[phases.VLM].beside == known[phases.TRAIN].beside == decoder
    step = lowering.step_of(short_run, mesh)
    model = trees.num_bytes(step.base_shapes) + trees.num_bytes(step.state_shapes)
    assert known[phases.TRAIN].own == model
    lora = trees.num_bytes(step.state_shapes.student)
    assert known[phases.DECODE].least == model + lora + decoder == known[phases.DRAW].least

    short_run.encode = "online"
    online = phases.arrays(short_run, mesh)
    text = known[phases.VLM].own
    assert online[phases.TRAIN].beside == decoder + text
    assert online[phases.VLM].least == known[phases.VLM].least + model


def test_a_quantised_network_takes_the_bytes_of_its_bits(short_run):
    mesh = sharding.make_mesh(**short_run.mesh.to_dict())
    sizes = {}
    for kind in ("dtype", "int8", "nf4"):
        short_run.update({"remat": "full", "base_dtype": kind, "encoder_dtype": kind,
                          "dtype": "bfloat16", "model": "", "vlm": ""})
        known = phases.arrays(short_run, mesh)
        sizes[kind] = known[phases.TRAIN].own, known[phases.VLM].own
    base = 6.15e9  # parameters; those that stay floats are few
    saved = sizes["dtype"][0] - sizes["int8"][0], sizes["dtype"][0] - sizes["nf4"][0]
    assert saved[0] == pytest.approx(base, rel=0.05)
    assert saved[1] == pytest.approx(1.5 * base, rel=0.08)
    assert sizes["dtype"][1] > sizes["int8"][1] > sizes["nf4"][1] > 2.5 * GIB


@pytest.mark.parametrize("changes,expected", [
    ({}, "vlm train draw decode"),
    ({"cache": "there"}, "train draw decode"),
    ({"recipe": "text"}, "captions train draw decode"),
    ({"objective": "sft", "preflight": "off"}, "captions latents train draw decode"),
    ({"sample_every": 0}, "vlm train draw decode"),
    ({"sample_every": 0, "preflight": "off"}, "vlm train"),
])
def test_a_run_has_the_phases_that_its_config_needs(changes, expected):
    config = z_image_turbo_lora.get_config()
    config.update(changes)
    assert " ".join(phases.of_run(config)) == expected


def test_a_phase_is_counted_with_the_arrays_of_its_program(short_run):
    """Of the smallest program, compiled here: weights, one array of latents, and the picture."""
    short_run.update({"remat": "full"})
    mesh = sharding.make_mesh(**short_run.mesh.to_dict())
    counted = memory_of(phases.lower(short_run, mesh, phases.DECODE).compile())
    known = phases.arrays(short_run, mesh)[phases.DECODE]
    pictures, channels = max(short_run.sample_rows, 0), 16
    assert 0 <= counted["arguments"] - known.own <= 4 * pictures * 8 * 8 * channels + 2**16
    assert counted["results"] >= 4 * pictures * 64 * 64 * 3 and counted["temporaries"] > 0


def test_a_tower_of_another_text_encoder_is_refused(short_run):
    short_run.vlm = ""
    with pytest.raises(ValueError, match=r"vlm: expected a vision tower for a text encoder \d+ "):
        phases.encoders_of(short_run)


def test_a_report_tells_of_every_phase_and_which_needs_most():
    found = [phases.Phase("vlm", 8 * GIB, GIB), phases.Phase("train", 5 * GIB, 0),
             phases.Phase("draw", math.inf, 0)]
    assert max(found, key=lambda p: p.total).name == "draw"
    lines = plan._phase_lines(found)
    assert "encode captions beside pictures" in lines[1] and "9.00 GiB: program 8.00" in lines[1]
    assert "? GiB" in lines[3]

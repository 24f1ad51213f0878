"""Is the shipped mini model a fair test of few-step tuning? An hour or less: pytest -m slow."""

import pytest

from dopsd_jax.mini import build, gates
from dopsd_jax.mini.emoji import load_sprites

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    world = tmp_path_factory.mktemp("world")
    for kind, count in {"scenes": 13_000, "pairs": 100}.items():
        build.build(load_sprites(), world, kind, count, seed=0)
    return gates.measure(data=world)


def test_the_judge_knows_real_pictures(results):
    assert results["judge"]["style"] > 0.9 and results["judge"]["concept"] > 0.9


@pytest.mark.parametrize("gate", "abcde")
def test_gate(results, gate):
    assert results["gates"][gate]["holds"], gates.as_markdown(results)

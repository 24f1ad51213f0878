"""The quickstart: what it does when its training is stopped. The shipped model's tests draw."""

import pytest

from dopsd_jax import quickstart


@pytest.mark.parametrize("saved", [(), (3,)])
def test_a_stopped_training_ends_it(monkeypatch, tmp_path, saved):
    """SIGTERM and Ctrl-C have the training save and return as if it were done."""
    ran = []
    monkeypatch.setattr(quickstart.cli, "run_module", lambda module, *_: ran.append(module))
    monkeypatch.setattr(quickstart.workdir_lib, "read_config", lambda _: {"num_train_steps": 100})
    for step in saved:
        (tmp_path / "run" / "checkpoints" / str(step)).mkdir(parents=True)
    monkeypatch.setattr(quickstart, "FLAGS", type("Flags", (), {"out": str(tmp_path)}))
    step = max(saved, default=0)
    with pytest.raises(SystemExit, match=f"stopped at step {step} of 100; the same command"):
        quickstart.main()
    assert ran == ["dopsd_jax.train"]

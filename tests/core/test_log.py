"""Lines on the way through many things."""

import logging
from types import SimpleNamespace

from dopsd_jax.core import log


def test_a_line_every_ten_seconds_says_how_much_is_left(monkeypatch, caplog):
    now = iter([0.0, 4.0, 8.0, 12.0, 16.0, 20.0])
    # Not the module's own: other threads ask it, too.
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with caplog.at_level(logging.INFO, logger=log.log.name):
        assert list(log.counted("abcde", 10, "pictures", each=2)) == list("abcde")
    # 12 s have gone before "c": two items, which are four pictures.
    assert caplog.messages == ["4 of 10 pictures, 0.333/s, 18 s left"]

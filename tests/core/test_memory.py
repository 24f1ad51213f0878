"""The peak of host memory, in a process of its own: it never falls."""

import subprocess
import sys

import jax

from dopsd_jax.core import memory

CHILD = """
import numpy as np
from dopsd_jax.core import memory
before = memory.peak()
x = np.ones(100_000_000, np.uint8)
during = memory.peak()
del x
print(before, during, memory.peak(), memory.report())
"""


def test_the_peak_grows_with_what_is_taken_and_stays():
    taken = [1] * 40_000_000  # the parent's memory is not the child's
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    before, during, after, words = done.stdout.split(maxsplit=3)
    assert 90e6 < int(during) - int(before) < 150e6
    assert int(after) > int(during) - 1e6  # the kernel counts pages roughly
    assert memory.peak() > int(after) + len(taken)
    assert words.startswith(f"host memory so far at most {int(after) / 1e9:.2f} GB")


def test_what_a_device_held_is_logged_where_it_tells(monkeypatch, caplog):
    class Device:
        stats = {"peak_bytes_in_use": 3 * 2**30, "bytes_limit": 22 * 2**30}

        def memory_stats(self):
            return self.stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with caplog.at_level("INFO", logger="dopsd_jax"):
        memory.log_devices("the data is encoded")
        Device.stats = None  # as a CPU has it
        memory.log_devices("nothing")
    assert [r.getMessage() for r in caplog.records] == [
        "the data is encoded; the device held at most 3.00 of 22.00 GiB so far"
    ]

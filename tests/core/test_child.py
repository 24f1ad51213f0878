"""Commands that must not outlive the one that runs them."""

import subprocess
import sys

from tests.commands import ROOT, environment

PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-m", "dopsd_jax.core.child", "http.server", "0"])
"""


def test_a_module_runs_with_its_arguments():
    done = subprocess.run(
        [sys.executable, "-m", "dopsd_jax.core.child", "timeit", "-n1", "-r1", "print('it ran')"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
    )
    assert done.stdout.startswith("it ran\n")


def test_a_child_ends_when_its_parent_is_killed():
    environ = environment() | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, env=environ,
                          stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline().startswith("Serving HTTP")  # from the child
        parent.kill()
        # The pipe ends when nobody is left who could write to it.
        assert parent.communicate(timeout=1800)[0] == ""

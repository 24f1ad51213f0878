"""Commands of the package as children of a test."""

import functools
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Child:
    """`python -m MODULE ARGV`, as subprocess.Popen is, with stdout and stderr as strings.

    It is not started anew but forked off a process that has imported what the commands import,
    which takes most of the time of one that refuses its input. Variables that a library reads
    while it is imported, such as JAX_PLATFORMS, are those of the test run, and what a library
    does as Python ends is not done.
    """

    def __init__(self, module: str, *argv: object, cwd: Path = ROOT, **variables: str):
        self.args = [module, *map(str, argv)]
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        self._process = _forks().Process(target=_become, args=(
            self.args, str(cwd), environment(**variables), *map(str, self._files)
        ), daemon=True)  # ends with the test run
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for its end.

        Raises:
            subprocess.TimeoutExpired: It has not ended yet.
        """
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.printed()

    def __del__(self):
        self._folder.cleanup()

    def printed(self) -> tuple[str, str]:
        """What it has printed so far."""
        # It may have ended before it opened them.
        return tuple(file.read_text() if file.is_file() else "" for file in self._files)


def run(module: str, *argv: object, **options) -> subprocess.CompletedProcess:
    """A `Child` from start to end."""
    child = Child(module, *argv, **options)
    try:
        out, err = child.communicate(timeout=1800)
    finally:
        child.kill()
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


@functools.cache
def _forks() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def _become(argv: list[str], cwd: str, environ: dict[str, str], out: str, err: str) -> None:
    """Runs a module as this process's only purpose."""
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv, sys.path[0] = argv, cwd
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a command; XLA_FLAGS are added to those of the test run."""
    flags = f"{more.pop('XLA_FLAGS', '')} {os.environ.get('XLA_FLAGS', '')}".strip()
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, **more}


def wrong_flags(text: str) -> list[str]:
    """Commands in a text whose module is missing, and their flags that it does not define."""
    wrong = []
    text = re.sub(r"\\\n\s*", " ", text)
    for module, rest in re.findall(r"python -m (dopsd_jax[\w.]*)([^`\n]*)", text):
        path = ROOT.joinpath(*module.split("."))
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.is_file():
            wrong.append(module)
            continue
        # What defines flags of several commands.
        shared = ("core/distributed.py", "compare/metric_weights.py", "compare/command.py",
                  "run/model.py")
        sources = "".join(p.read_text() for p in (file, *(ROOT / "dopsd_jax" / s for s in shared)))
        wrong += [
            f"{module} --{flag}" for flag in re.findall(r"--([a-z]\w*)(?![\w.])", rest)
            if not re.search(rf'"(--)?{flag}"', sources)
        ]
    return wrong

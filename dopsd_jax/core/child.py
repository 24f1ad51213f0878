"""Commands that a command of this package runs, and that must not outlive it.

    python -m dopsd_jax.core.child dopsd_jax.tasks --config ..

runs a module as `python -m` would, and ends it when its parent is gone, even if that was killed.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time


def end_with_parent() -> None:
    """Ends this child process when its parent is gone, even if the parent was killed."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    end_with_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""What the commands import, without the commands themselves, see `commands.run`."""

import pkgutil
from importlib import import_module

import dopsd_jax

for name in ("data", "run", "weights", "planning"):
    package = import_module(f"{dopsd_jax.__name__}.{name}")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
import_module("dopsd_jax.mini.stages")

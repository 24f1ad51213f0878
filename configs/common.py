"""The config that all others start from: they hold differences only.

Every key with its default, its meaning and whether it may change when a run is continued stands in
docs/keys.md, which is made from the table in dopsd_jax/run/keys.py.
"""

from ml_collections import ConfigDict

from dopsd_jax.run import keys


def base() -> ConfigDict:
    """The published Z-Image recipe, except where docs/keys.md says otherwise."""
    return keys.base()

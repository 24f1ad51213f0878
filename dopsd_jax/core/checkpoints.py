"""Orbax checkpoints of a train state and its data position: asynchronous, atomic, self-resuming."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dopsd_jax.core.distributed import WAIT_S
from dopsd_jax.core.mirror import is_remote
from dopsd_jax.core.trees import Tree


class Checkpoints:
    """Checkpoints below `directory`, one folder per step.

    A save writes to a temporary folder and renames it, so a process killed in the middle leaves
    the previous checkpoint as the latest.
    """

    def __init__(
        self, directory: str | Path, *, keep: int | None = None, read_only: bool = False
    ):
        """Opens or makes the directory.

        Args:
            directory: Where the steps are; may be gs://..
            keep: How many of the latest to keep; None keeps all.
            read_only: Touch nothing: a run may be saving here right now, and what an owner
                clears away as left over from a crash may be its unfinished save.
        """
        # Orbax's own read_only warns at every use. Without it a manager that neither makes nor
        # clears the directory touches nothing before the first save.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, enable_async_checkpointing=True,
            cleanup_tmp_directories=not read_only,
            async_options=ocp.AsyncOptions(timeout_secs=WAIT_S),
        )
        self._read_only = read_only
        if not is_remote(directory):
            directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(directory, options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Tree, meta: dict[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied. A step that exists is left alone."""
        if self._read_only:
            raise RuntimeError(f"{self._manager.directory}: opened to read only")
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
        )

    def restore(self, like: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """State with the shapes, dtypes and shardings of `like`, and its meta.

        Raises:
            ValueError: No checkpoint, a damaged one, or one of another structure or shape.
        """
        step = self._find(step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        self._check(step, abstract)
        with self._reading(step):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
                ),
            )
        return restored.state, restored.meta

    def restore_part(self, names: tuple[str, ...], step: int | None = None) -> dict[str, Tree]:
        """Some top-level entries of a state as NumPy arrays, whatever devices wrote them.

        Raises:
            ValueError: No checkpoint, a damaged one, or one without such an entry.
        """
        step = self._find(step)
        path = self._manager.directory / str(step) / "state"
        tree = self._tree(step)
        if missing := [n for n in names if n not in tree]:
            raise ValueError(f"{path}: expected {missing} in it, found {sorted(tree)}")
        wanted = {n: tree[n] for n in names}
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        with self._reading(step), ocp.PyTreeCheckpointer() as reader:
            return reader.restore(
                path, args=ocp.args.PyTreeRestore(
                    item=wanted, restore_args=args, partial_restore=True
                ),
            )

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns any error of Orbax about the files of a step into one plain ValueError."""
        try:
            yield
        except PermissionError:
            raise
        # KeyError and AttributeError are its answers to folders and files that are not there.
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as e:
            path = self._manager.directory / str(step)
            raise ValueError(f"{path}: damaged ({_first_line(e)}); {self._way_out(step)}") from e

    def _way_out(self, step: int) -> str:
        """What to do about a damaged step."""
        for earlier in reversed([s for s in self.all_steps() if s < step]):
            with contextlib.suppress(ValueError):
                self._tree(earlier)
                return f"delete that folder to continue from step {earlier}"
        return "there is no earlier good step; delete that folder to start again"

    def _tree(self, step: int) -> Tree:
        """Shapes and dtypes of a state as it was saved."""
        with self._reading(step):
            path = self._manager.directory / str(step)
            for item in ("state", "meta"):
                if not (path / item).is_dir():
                    raise FileNotFoundError(f"{item} is missing")
            # A handler by itself: PyTreeCheckpointer looks for files that no save here writes.
            return ocp.PyTreeCheckpointHandler().metadata(path / "state").tree

    def _find(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise ValueError(f"no checkpoint yet in {self._manager.directory}; let the run train "
                             "until its first one (checkpoint_every)")
        if step is not None and step not in steps:
            raise ValueError(
                f"{self._manager.directory}: expected the checkpoint of step {step}, found steps "
                f"{steps}"
            )
        return steps[-1] if step is None else step

    def _check(self, step: int, abstract: Tree) -> None:
        have = _shapes(self._tree(step))
        want = _shapes(ocp.utils.serialize_tree(abstract, keep_empty_nodes=True))
        problems = [
            f"{name}: expected {want.get(name, 'nothing')}, got {have.get(name, 'nothing')}"
            for name in sorted(set(have) | set(want)) if have.get(name) != want.get(name)
        ]
        if problems:
            more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise ValueError(
                f"{self._manager.directory}: the checkpoint of step {step} belongs to another "
                "model, rank or optimizer: " + "; ".join(problems[:10]) + more
            )

    def wait(self) -> None:
        """Waits until the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves if hasattr(leaf, "shape")
    }


def _first_line(error: Exception) -> str:
    """The begin of a message, without the quotes that a KeyError adds."""
    text = str(error.args[0]) if error.args and isinstance(error, KeyError) else str(error)
    return (text.splitlines() or [type(error).__name__])[0][:200]

"""Orbax checkpoints of a train state and its data position: asynchronous, atomic, self-resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

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
            directory: Where the steps are.
            keep: How many of the latest to keep; None keeps all.
            read_only: Touch nothing: a run may be saving here right now, and what an owner
                clears away as left over from a crash may be its unfinished save.
        """
        options = ocp.CheckpointManagerOptions(read_only=True) if read_only else (
            ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            )
        )
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Tree, meta: dict[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied. A step that exists is left alone."""
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
            ValueError: No checkpoint, or one of another structure or shape.
        """
        step = self._find(step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        self._check(step, abstract)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
            ),
        )
        return restored.state, restored.meta

    def restore_part(self, names: tuple[str, ...], step: int | None = None) -> dict[str, Tree]:
        """Some top-level entries of a state as NumPy arrays, whatever devices wrote them.

        Raises:
            ValueError: No checkpoint, or one without such an entry.
        """
        step = self._find(step)
        path = self._manager.directory / str(step) / "state"
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(path).item_metadata.tree
            if missing := [n for n in names if n not in tree]:
                raise ValueError(f"{path}: expected {missing} in it, found {sorted(tree)}")
            wanted = {n: tree[n] for n in names}
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            return reader.restore(
                path, args=ocp.args.PyTreeRestore(
                    item=wanted, restore_args=args, partial_restore=True
                ),
            )

    def _find(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise ValueError(f"no checkpoint yet in {self._manager.directory}")
        if step is not None and step not in steps:
            raise ValueError(
                f"{self._manager.directory}: expected the checkpoint of step {step}, found steps "
                f"{steps}"
            )
        return steps[-1] if step is None else step

    def _check(self, step: int, abstract: Tree) -> None:
        with ocp.PyTreeCheckpointer() as reader:
            path = self._manager.directory / str(step) / "state"
            have = _shapes(reader.metadata(path).item_metadata.tree)
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
        """Until the last save is on disk."""
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

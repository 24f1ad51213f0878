"""A run's directory: config.json, identity.json, metrics.jsonl, checkpoints/, samples/."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from dopsd_jax.core import trees
from dopsd_jax.core.checkpoints import Checkpoints
from dopsd_jax.core.checks import COUNT, OBJECT, SCALE, TEXT, value_problems
from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.log import log
from dopsd_jax.core.mirror import caches, checkpoints_of, is_remote
from dopsd_jax.models import adapters
from dopsd_jax.run import keys
from dopsd_jax.weights.lora_files import LoraSpec

COMMITTED = "commit_success.txt"  # in a finished checkpoint in a bucket, by Orbax
IMAGES = "images"  # in a run's identity: some images of data that is not read ahead


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the second start of a config compiles nothing.

    JAX_COMPILATION_CACHE_DIR chooses the place; the default is ~/.cache/dopsd_jax/xla.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(caches() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def is_workdir(path: str | Path) -> bool:
    """Whether `path` is a run's directory, were it one that has no checkpoint yet."""
    path = Path(path)
    return (path / "config.json").is_file() and (
        (path / "identity.json").is_file() or checkpoints_of(path).is_dir()
    )


def flat_config(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"lora.rank": 64, ..}; tuples become lists, as JSON has them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flat_config(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


_LOCKS: dict[Path, int] = {}  # open files by workdir: closing one would give up its lock


def lock(workdir: str | Path) -> None:
    """Makes the directory and keeps other processes from training there until this one ends.

    Raises:
        ValueError: Another process has it.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if workdir.resolve() in _LOCKS:
        return
    file = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        owner = os.read(file, 200).decode(errors="replace") or "unknown"
        os.close(file)
        raise ValueError(
            f"another process is training in {workdir} (process {owner}); wait for it, stop it, "
            "or choose another --workdir"
        ) from e
    except OSError as e:
        log.warning("%s cannot be locked (%s); start no second run there", workdir, e)
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
    _LOCKS[workdir.resolve()] = file


def saved_steps(workdir: str | Path) -> list[int]:
    """Steps of the finished checkpoints, in order, by their names alone."""
    place = checkpoints_of(workdir)
    # An unfinished save has a longer name. In a bucket, where nothing can be renamed, it has its
    # own, and Orbax marks it in the end.
    steps = sorted(int(p.name) for p in place.glob("*") if p.name.isdigit())
    return [s for s in steps if not is_remote(place) or (place / str(s) / COMMITTED).is_file()]


def _has_checkpoint(workdir: Path) -> bool:
    return bool(saved_steps(workdir))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a run's directory.

    Raises:
        ValueError: Missing, or no JSON object.
    """
    advice = "restore it, or choose another --workdir"
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError as e:
        raise ValueError(f"{file}: missing, but the run has other files here; {advice}") from e
    except ValueError as e:
        raise ValueError(f"{file}: not valid JSON ({e}); {advice}") from e
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got {values!r:.40}; {advice}")
    return values


def claim(
    workdir: str | Path, config: dict[str, Any], identity: dict[str, str], *,
    encodes_images: bool = True, fixed: Collection[str] = (),
) -> None:
    """Writes config.json and identity.json, or checks them against a run that is already there.

    The directory is locked first, for as long as the process lives.

    Args:
        workdir: The run's directory; made if missing.
        config: The resolved config.
        identity: Fingerprints of weights and data, by name.
        encodes_images: Whether the run learns from what the VAE makes of images, or shows it to
            the networks; see `keys.may_change`.
        fixed: Keys that may not change although `keys.may_change` says so of a D-OPSD run.

    Raises:
        ValueError: Another process trains there, or the directory holds a run of another
            config, weights or data, with every difference listed; or a run whose config.json or
            identity.json is lost; or other things than a run.
    """
    workdir = Path(workdir)
    _check_free(workdir, config)
    for name in ("checkpoints", "samples", "tensorboard"):
        if (workdir / name).exists() and not (workdir / name).is_dir():
            raise ValueError(f"{workdir / name}: expected a directory, found a file; move it away")
    lock(workdir)
    file = workdir / "config.json"
    # A start that failed before its first checkpoint has nothing to protect.
    if _has_checkpoint(workdir):
        new = flat_config(config)
        # A run that began before a key was added did what the key's default says.
        defaults = flat_config({k: e.default for k, e in keys.KEYS.items() if k in new})
        old = defaults | flat_config(read_json(file))
        different = [
            f"{k}: the run has {old.get(k)!r}, now {new.get(k)!r}"
            for k in sorted(set(old) | set(new))
            if old.get(k) != new.get(k)
            and (k in fixed or not keys.may_change(k, encodes_images=encodes_images))
        ]
        old = read_json(workdir / "identity.json")
        different += [
            f"contents of {k}: the run has {old.get(k)}, now {identity.get(k)}"
            for k in sorted(set(old) | set(identity)) if not _same(k, old.get(k), identity.get(k))
        ]
        if different:
            raise ValueError(
                f"{workdir}: holds a run of another config; choose another --workdir or the "
                "run's own values:\n  " + "\n  ".join(different)
            )
    write_atomic(workdir / "identity.json", json.dumps(identity, indent=2))
    write_atomic(file, json.dumps(config, indent=2, sort_keys=True))


def _same(name: str, old: str | None, new: str | None) -> bool:
    """Whether a fingerprint is that of the run.

    Of single images, a word for each, some may differ: one that could not be used was put right.
    Runs of earlier versions have none.
    """
    if name != IMAGES or old is None or new is None:
        return old == new or name == IMAGES
    pairs = list(zip(old.split(), new.split(), strict=False))
    return 2 * sum(a == b for a, b in pairs) >= len(pairs)


def _check_free(workdir: Path, config: dict[str, Any]) -> None:
    """Raises ValueError if the workdir holds files of others, or lies in a model or the data."""
    for key in ("model", "vlm", "data", "preview_model"):
        given = Path(config.get(key) or "")
        place = workdir.resolve()
        if config.get(key) and given.is_dir() and given.resolve() in (place, *place.parents):
            raise ValueError(f"{workdir}: lies in {key} = {given}; choose another --workdir")
    if not workdir.is_dir() or (workdir / "identity.json").is_file() or _has_checkpoint(workdir):
        return
    others = sorted(p.name for p in workdir.iterdir() if not p.name.startswith("."))
    if others:
        more = ", .." if len(others) > 5 else ""
        raise ValueError(
            f"{workdir}: holds {', '.join(others[:5])}{more} and no run; choose a new or empty "
            "--workdir"
        )


def read_config(workdir: str | Path) -> dict[str, Any]:
    """config.json of a run.

    Raises:
        ValueError: Not a run's directory, or a config.json that is not one of a run.
    """
    if not is_workdir(workdir):
        raise ValueError(
            f"{workdir}: expected a run's directory with config.json and checkpoints/, found none"
        )
    config = read_json(Path(workdir) / "config.json")
    if missing := sorted({"model", "trainable", "teacher", "lora"} - set(config)):
        raise ValueError(f"{workdir}/config.json: expected the config of a run, found no {missing}")
    kinds = {"model": TEXT, "trainable": TEXT, "teacher": TEXT, "lora": OBJECT}
    if wrong := value_problems(config, kinds):
        raise ValueError(f"{workdir}/config.json: " + "; ".join(wrong.values()))
    return config


def read_identity(workdir: str | Path) -> dict[str, str]:
    """Fingerprints of a run's weights and data, by name: identity.json."""
    return read_json(Path(workdir) / "identity.json")


def fingerprint(workdir: str | Path) -> str:
    """What identifies the latest checkpoint of a run: the run and the step, without reading it."""
    workdir = Path(workdir)
    run = {"config": read_config(workdir), "identity": read_identity(workdir)}
    digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
    return f"{digest} step {saved_steps(workdir)[-1:]}"


def check_same_model(weights: trees.Tree, shapes: trees.Tree, where: str | Path) -> None:
    """Raises ValueError unless all weights have the names and shapes of a model's."""
    found, wanted = (
        {name: tuple(x.shape) for name, x in trees.flatten(tree).items()}
        for tree in (weights, shapes)
    )
    if found != wanted:
        name = next(n for n in wanted | found if found.get(n) != wanted.get(n))
        raise ValueError(
            f"{where}: the weights belong to another model: {name}: expected {wanted.get(name)}, "
            f"got {found.get(name)}"
        )


def read_lora(
    workdir: str | Path, *, step: int | None = None, role: str = "student"
) -> tuple[trees.Tree, LoraSpec]:
    """The LoRA of a run's checkpoint, as NumPy, and its rank and alpha.

    Args:
        workdir: A run's directory.
        step: Which checkpoint; None is the latest.
        role: "student" or "teacher".

    Raises:
        ValueError: Not a run's directory, no such checkpoint, a run without LoRA, or the
            teacher of a run that keeps or trains none.
    """
    config = read_config(workdir)
    if config["trainable"] != "lora":
        raise ValueError(f"{workdir}: this run trains {config['trainable']!r}, it holds no LoRA")
    _check_role(workdir, config, role)
    if wrong := value_problems(config["lora"], {"rank": COUNT, "alpha": SCALE}):
        raise ValueError(f"{workdir}/config.json, lora: " + "; ".join(wrong.values()))
    tree = _restore_role(workdir, step, role)
    lora = config["lora"]
    return tree, LoraSpec(lora["rank"], lora["alpha"], config["model"])


def read_full(
    workdir: str | Path, *, step: int | None = None, role: str = "student"
) -> trees.Tree:
    """All weights that a run of full fine-tuning trains, as NumPy.

    Raises:
        ValueError: Not a run's directory, no such checkpoint, a run that trains a LoRA, or the
            teacher of a run that keeps or trains none.
    """
    config = read_config(workdir)
    if config["trainable"] != "full":
        raise ValueError(
            f"{workdir}: expected a run with trainable=full, got {config['trainable']!r}"
        )
    _check_role(workdir, config, role)
    return _restore_role(workdir, step, role)


def _check_role(workdir: str | Path, config: dict[str, Any], role: str) -> None:
    """Raises ValueError for the teacher of a run that has none of its own."""
    if role != "teacher" or config["teacher"] == "ema":
        return
    untrained = "the untrained LoRA, which changes nothing"
    if config["trainable"] == "full":
        untrained = "the model it began with"
    what = {"live": "the student itself", "untuned": "the model itself"}.get(
        config["teacher"], untrained)
    raise ValueError(
        f"{workdir}: this run has teacher={config['teacher']}, its teacher is {what}; take the "
        "role student"
    )


def _restore_role(workdir: str | Path, step: int | None, role: str) -> trees.Tree:
    directory = checkpoints_of(workdir)
    if not directory.is_dir():
        raise ValueError(f"no checkpoint yet in {directory}; let the run train until its first one "
                         "(checkpoint_every)")
    checkpoints = Checkpoints(directory, read_only=True)
    try:
        return checkpoints.restore_part((role,), step)[role]
    finally:
        checkpoints.close()


def check_fits(lora: trees.Tree, shapes: trees.Tree, where: str | Path) -> None:
    """Raises ValueError unless every adapter fits the kernel at its path."""
    flat = trees.flatten(shapes)
    problems = []
    for path, leaves in adapters.sites(lora).items():
        kernel = flat.get(f"{path}/kernel")
        if kernel is None:
            problems.append(f"{path}: expected a linear layer of the model, there is none")
        elif problem := adapters.problem(leaves, kernel):
            problems.append(f"{path}/{problem}")
    if problems:
        raise ValueError(
            f"{where}: the LoRA belongs to another model: " + "; ".join(problems[:10])
        )

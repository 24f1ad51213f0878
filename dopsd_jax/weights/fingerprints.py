"""What identifies a model: its weights, configs and tokenizer by content, without loading them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from dopsd_jax.weights.names import WeightsError


def fingerprint(
    directory: str | Path, parts: tuple[str, ...] = (), files: Mapping[str, Path] | None = None,
    kinds: tuple[str, ...] = (".json", ".jinja", ".safetensors"),
) -> str:
    """Identifies weights by content without reading all of them; place and dates do not matter.

    Configs, tokenizers and chat templates count in full; of safetensors files the header, the
    size and blocks spread evenly over the rest.

    Args:
        directory: A model's directory.
        parts: Folders in it that count; () is everything.
        files: See `Pipeline`; what they stand in for does not count, be it there or not.
        kinds: Suffixes of the directory's files that count, of the default's.

    Raises:
        WeightsError: No such directory, or no safetensors file in it or below.
    """
    directory, replaced = Path(directory), {
        part: file for part, file in (files or {}).items() if not parts or part in parts
    }
    if not directory.is_dir():
        raise WeightsError(f"{directory}: expected a directory of model weights, found none")
    found = sorted(
        Path(folder, name).relative_to(directory)
        for folder, _, names in os.walk(directory, followlinks=True) for name in names
    )
    found = [
        f for f in found
        if not any(part.startswith(".") for part in f.parts) and (not parts or f.parts[0] in parts)
        and not _is_replaced(f, replaced)
    ]
    if not replaced and not any(f.suffix == ".safetensors" for f in found):
        listed = ", ".join(f.as_posix() for f in found[:10]) or "nothing"
        raise WeightsError(
            f"{directory}: expected .safetensors files in it or below, found {listed}; other "
            "formats are not read"
        )
    digest = hashlib.sha256()
    for file in found:
        if file.suffix not in kinds:
            continue
        if file.suffix == ".safetensors":
            content = _sampled(directory / file)
        else:
            content = hashlib.sha256((directory / file).read_bytes())
        digest.update(f"{file.as_posix()} {content.hexdigest()}\n".encode())
    for part, file in sorted(replaced.items()):
        digest.update(f"{part}_file {_sampled(file).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def of_files(files: Iterable[Path]) -> str:
    """Identifies safetensors files on this machine; their names do not matter.

    By size, header, blocks spread evenly and when they were last changed: what is made from all of
    a file must not outlive an edit that the blocks miss.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(_sampled(file).digest())
        digest.update(str(file.stat().st_mtime_ns).encode())
    return digest.hexdigest()[:16]


def _is_replaced(file: Path, replaced: Mapping[str, Path]) -> bool:
    """Whether a file of a model's directory holds weights that others stand in for."""
    if not file.name.endswith((".safetensors", ".safetensors.index.json")):
        return False
    # A transformer may lie beside the folders.
    return (file.parts[0] if len(file.parts) > 1 else "transformer") in replaced


def _sampled(file: Path):
    """Hash of a safetensors file's size, header and 64 blocks; of all of it if it is small."""
    size, block, count = file.stat().st_size, 1 << 14, 64
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as f:
        begin = 8 + min(int.from_bytes(f.read(8), "little"), 1 << 26)
        f.seek(0)
        digest.update(f.read(begin))
        if size - begin <= block * count:
            digest.update(f.read())
        else:
            for i in range(count):
                f.seek(begin + (size - begin - block) * i // (count - 1))
                digest.update(f.read(block))
    return digest

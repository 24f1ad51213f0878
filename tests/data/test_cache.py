"""Arrays on disk by content: what was written comes back, and damage is named."""

import contextlib
import fnmatch
import io
import json
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from dopsd_jax.core import files, mirror
from dopsd_jax.data.cache import Cache, CacheError, CacheWriter, entry_key

RNG = np.random.default_rng(0)


def array(dtype=np.float32, tokens=5):
    return RNG.standard_normal((tokens, 8)).astype(dtype)


def write(directory, arrays, **kwargs):
    writer = CacheWriter(directory, **kwargs)
    for key, value in arrays.items():
        writer.add(key, value)
    writer.flush()
    return directory


@pytest.fixture
def arrays():
    return {f"{i:032x}": array(tokens=3 + i) for i in range(6)}


def shards(directory):
    return sorted(directory.glob("contexts-*.safetensors"))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_arrays_come_back_as_they_were(tmp_path, dtype):
    value = array(dtype)
    cache = Cache(write(tmp_path, {"a": value}))
    assert list(cache) == ["a"] and cache["a"].dtype == value.dtype
    np.testing.assert_array_equal(cache["a"], value)


def test_shards_are_cut_by_size_and_more_may_be_added(tmp_path, arrays):
    write(tmp_path, arrays, shard_bytes=300)
    assert len(shards(tmp_path)) == 3
    write(tmp_path, {"more": array()})
    cache = Cache(tmp_path)
    assert set(cache) == {*arrays, "more"} and len(cache) == 7
    for key, value in arrays.items():
        np.testing.assert_array_equal(cache[key], value)


def test_other_tools_can_read_a_shard(tmp_path, arrays):
    from safetensors.numpy import load_file

    (file,) = shards(write(tmp_path, arrays))
    loaded = load_file(file)
    assert all((loaded[k] == v).all() for k, v in arrays.items()) and set(loaded) == set(arrays)


def test_a_truncated_shard_is_named(tmp_path, arrays):
    write(tmp_path, arrays, shard_bytes=300)
    first, second, _ = shards(tmp_path)
    size = first.stat().st_size
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    with pytest.raises(CacheError) as e:
        Cache(tmp_path)
    assert f"{first}: expected {size} bytes, found {size - 1}: it is truncated\n" in str(e.value)
    assert f"{second}: expected " in str(e.value) and "found no such file" in str(e.value)


def test_repair_forgets_damaged_shards_and_nothing_else(tmp_path, arrays, caplog):
    write(tmp_path, arrays, shard_bytes=300)
    first, *rest = shards(tmp_path)
    lost = set(json.loads(first.with_suffix(".json").read_text())["entries"])
    first.write_bytes(first.read_bytes()[:-1])
    with caplog.at_level("WARNING", "dopsd_jax"):
        assert set(Cache(tmp_path, repair=True)) == set(arrays) - lost
    assert str(first) in caplog.text
    assert shards(tmp_path) == rest and set(Cache(tmp_path)) == set(arrays) - lost


def test_changed_bytes_are_found_when_they_are_read(tmp_path, arrays):
    (file,) = shards(write(tmp_path, arrays))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    cache = Cache(tmp_path)
    last = max(arrays, key=lambda k: cache._entries[k][3])
    with pytest.raises(CacheError, match=f"{file.name}: .* are not what was written"):
        cache[last]
    np.testing.assert_array_equal(cache[min(arrays)], arrays[min(arrays)])


def test_an_index_that_is_none_is_named(tmp_path, arrays):
    (file,) = shards(write(tmp_path, arrays))
    file.with_suffix(".json").write_text('{"bytes": 3}')
    with pytest.raises(CacheError, match=r"contexts-\w+.json: not an index of a shard"):
        Cache(tmp_path)


@pytest.mark.parametrize("moment", ["shard", "index"])
def test_a_process_killed_while_writing_leaves_the_rest_whole(
    tmp_path, arrays, monkeypatch, moment
):
    write(tmp_path, {"old": array()})
    replace = type(epath.Path(tmp_path)).replace

    def killed(self, target):
        if target.suffix == {"shard": ".safetensors", "index": ".json"}[moment]:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, arrays)
    monkeypatch.undo()
    assert set(Cache(tmp_path)) == {"old"}
    assert set(Cache(write(tmp_path, arrays))) == {"old", *arrays}


def test_a_place_without_a_cache_is_named(tmp_path):
    with pytest.raises(CacheError, match="nowhere: expected the folder of a cache, found nothing"):
        Cache(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for repair in (False, True):
        with pytest.raises(CacheError, match="file: expected the folder of a cache, found a file"):
            Cache(tmp_path / "file", repair=repair)
    assert not Cache(tmp_path / "nowhere", repair=True)


def test_a_key_changes_with_every_part_and_only_with_them():
    parts = {"caption": "a fox", "bucket": [64, 96], "settings": {"a": 1, "b": 2.0}}
    assert entry_key(**parts) == entry_key(**dict(reversed(parts.items())))
    others = [
        {**parts, "caption": "a fox "}, {**parts, "bucket": [96, 64]},
        {**parts, "settings": {"a": 1, "b": 2.5}}, {**parts, "more": None},
    ]
    assert len({entry_key(**p) for p in [parts, *others]}) == 5


class Remote:
    """The part of epath.Path that a cache may use, over a dict of files."""

    files: ClassVar[dict[str, bytes]] = {}

    def __init__(self, path):
        self.path = str(path)

    def __truediv__(self, name):
        return Remote(f"{self.path}/{name}")

    def __str__(self):
        return self.path

    def __lt__(self, other):
        return self.path < other.path

    @property
    def name(self):
        return self.path.rsplit("/", 1)[1]

    def with_name(self, name):
        return Remote(f"{self.path.rsplit('/', 1)[0]}/{name}")

    def with_suffix(self, suffix):
        return Remote(self.path.rsplit(".", 1)[0] + suffix)

    def mkdir(self, **_):
        pass

    def exists(self):
        return self.path in self.files or self.is_dir()

    def is_dir(self):
        return any(p.startswith(f"{self.path}/") for p in self.files)

    def glob(self, pattern):
        names = [p.removeprefix(f"{self.path}/") for p in self.files]
        return [self / n for n in fnmatch.filter(names, pattern)]

    def read_text(self):
        return self.files[self.path].decode()

    def stat(self):
        return epath.stat_utils.StatResult(False, len(self.files[self.path]), 0)

    @contextlib.contextmanager
    def open(self, mode):
        file = io.BytesIO(b"" if mode == "wb" else self.files[self.path])
        yield file
        if mode == "wb":
            self.files[self.path] = file.getvalue()

    def replace(self, target):
        self.files[str(target)] = self.files.pop(self.path)


def test_all_paths_go_through_epath(arrays, monkeypatch):
    """No builtin open, os or pathlib call would understand gs://."""
    def refuse(*args, **kwargs):
        raise AssertionError(f"not through epath: {args}")

    monkeypatch.setattr(epath, "Path", Remote)
    monkeypatch.setattr(mirror.fsspec, "get_filesystem_class", lambda scheme: Remote)
    monkeypatch.setattr(files.os, "fsync", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    cache = Cache(write("gs://bucket/cache", arrays, shard_bytes=300))
    assert all((cache[k] == v).all() for k, v in arrays.items()) and len(cache) == len(arrays)
    assert len(Remote.files) == 6
    assert all(p.startswith("gs://bucket/cache/contexts-") for p in Remote.files)

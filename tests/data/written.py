"""Rows that tests write, and the message for those that are refused."""

import json

import pytest

from dopsd_jax.data.files import DataError
from dopsd_jax.data.rows import read_rows


def write_jsonl(folder, *records, raw=None):
    file = folder / "train.jsonl"
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    file.write_bytes(raw if raw is not None else b"\n".join(lines) + b"\n")
    return file


def record(path="a.jpg", **keys):
    return {"local_path_list": [path], "short_en": "a cat", **keys}


def assert_refused(expected, data, **kwargs):
    """Expects a DataError with each of the texts, whatever lies between them."""
    with pytest.raises(DataError) as caught:
        read_rows(data, **kwargs)
    for text in [expected] if isinstance(expected, str) else expected:
        assert text in str(caught.value)
    return str(caught.value)

"""What the encoders make is named by all that it follows from, and by the same name for ever."""

import types

import pytest

from configs import tiny as tiny_config
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.run import features


class TwoImages:
    """Data of one row with a reference and a target, whose image files are not read."""

    rows = [types.SimpleNamespace(
        captions={"caption": "a red fox"}, enhanced=None, images=("before", "after"), where="row 0"
    )]

    keep_prompts, earlier = (), ()

    def bucket(self, row):
        return Bucket(128, 96, 1)

    def image_digest(self, row, image):
        return f"digest of {self.rows[row].images[image]}"


def entries(monkeypatch, **changes):
    """The entries of a run on models whose weights are known by their folders' names."""
    def named(folder, parts=()):
        return f"{folder} {' '.join(parts)}"

    monkeypatch.setattr(features, "fingerprint", named)
    monkeypatch.setattr(features.model, "fingerprint", lambda c, parts: named(c.model, parts))
    config = tiny_config.get_config()
    config.model, config.vlm = "pipeline", "qwen"
    config.update_from_flattened_dict(changes)
    return {e.role: e.key for e in features.Entries(config, TwoImages()).all()}


# Recorded when caches were first shipped: other keys would make every cache on disk worthless.
RECORDED = [
    ({}, {"student": "61b87b635dc297de3895db0a448bc271",
          "teacher": "c0f2b14704183a94f85fbadb7fbb08fe"}),
    ({"recipe": "edit_ref", "teacher_tokens": 512}, {
        "student": "35cd8c63e46c57a045a07ff8fe3d4cb1",
        "teacher": "feac08397b645510df96c9e0af811701",
        "reference": "63a1fb683dc91f5f25d2e2878ca0c4a0",
        "target": "5d7736318af97ed72e0c73dcc155bb1d",
    }),
    ({"objective": "sft", "vae_dtype": "bfloat16", "dtype": "bfloat16"}, {
        "student": "4af7bfe8a5e1a19ed593c04d54982f11",
        "target": "429296920dd5ac8a29936dd8adecbca1",
    }),
]


@pytest.mark.parametrize("changes,keys", RECORDED)
def test_the_names_of_entries_stay_the_same(monkeypatch, changes, keys):
    assert entries(monkeypatch, **changes) == keys

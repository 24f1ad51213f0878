"""What the styles and things of a world are called, and which of them training held back.

The world that is drawn today may have more of both than the shipped model knows: a judge's file
names those that it was trained on, and figures are taken with its names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dopsd_jax.mini.emoji import CONCEPTS, HELD_OUT_CONCEPTS
from dopsd_jax.mini.styles import HELD_OUT_STYLES, STYLES


@dataclasses.dataclass(frozen=True)
class Labels:
    """The names, in the order of a judge's answers.

    Attributes:
        styles, concepts: All of them.
        held_out_styles, held_out_concepts: Those of them that no training picture of the model
            shows.
    """

    styles: tuple[str, ...]
    concepts: tuple[str, ...]
    held_out_styles: tuple[str, ...]
    held_out_concepts: tuple[str, ...]

    @classmethod
    def from_json(cls, values: dict[str, list[str]]) -> Labels:
        return cls(**{f.name: tuple(values[f.name]) for f in dataclasses.fields(cls)})

    @property
    def trained_styles(self) -> tuple[str, ...]:
        return tuple(s for s in self.styles if s not in self.held_out_styles)

    @property
    def trained_concepts(self) -> tuple[str, ...]:
        return tuple(c for c in self.concepts if c not in self.held_out_concepts)

    def shown(self, concepts: Sequence[str]) -> np.ndarray:
        """bool [all concepts]: which of them are among some."""
        return np.isin(self.concepts, list(concepts))


WORLD = Labels(tuple(STYLES), tuple(CONCEPTS), HELD_OUT_STYLES, HELD_OUT_CONCEPTS)

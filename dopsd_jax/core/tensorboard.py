"""TensorBoard event files through the `tensorboard` package itself.

tensorboardX and torch's writer import torch where it is installed; this imports neither torch nor
TensorFlow.
"""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoard:
    """Writes scalars and images to an event file in `directory`."""

    def __init__(self, directory: str | Path, *, first_step: int):
        """`first_step`: what an earlier start wrote from this step on is hidden."""
        self._writer = EventFileWriter(str(directory))
        start = SessionLog(status=SessionLog.START)
        self._add(Event(session_log=start, step=first_step))

    def scalar(self, step: int, tag: str, value: float) -> None:
        self._add(Event(step=step, summary=_summary(tag=tag, simple_value=float(value))))

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """A picture uint8 [H, W, 3]."""
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "png")
        image = Summary.Image(
            height=pixels.shape[0], width=pixels.shape[1], colorspace=3,
            encoded_image_string=png.getvalue(),
        )
        self._add(Event(step=step, summary=_summary(tag=tag, image=image)))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.add_event(event)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _summary(**value) -> Summary:
    return Summary(value=[Summary.Value(**value)])

"""Watching pictures being written: a view that is redrawn, and the writing as an animation."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jpeglm_jax.sampling import sheets

log = logging.getLogger(__name__)

CHUNK = 16
"""Steps on the device between two looks while somebody watches: a few MCUs."""

PAUSE = 0.3
"""Seconds between two drawings, at least: drawing must not be what the time goes into."""

FRAMES, FRAME_MS, LAST_MS = 64, 100, 2000
"""Frames of an animation, at most, and how long each and the last are seen."""

WIDEST = 768
"""Pixels of an animation's longer side, at most."""

Show = Callable[[np.ndarray], None]
"""Shows a picture, uint8 (height, width, 3), in the place of the one before."""


def in_file(path: Path) -> Show:
    """Shows in a PNG file, which is whole at every moment: for a viewer that follows changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("%s shows the pictures while they are written", path)

    def show(picture: np.ndarray) -> None:
        beside = path.with_name(f".{path.name}")
        Image.fromarray(picture).save(beside, "PNG")
        beside.replace(path)

    return show


def in_notebook() -> Show:
    """Shows in the output of the running cell of a notebook."""
    from IPython.display import DisplayHandle  # there is one wherever there is a notebook

    handle = DisplayHandle()
    handle.display(Image.new("RGB", (1, 1), sheets.BACKGROUND))  # what is updated must have been displayed
    return lambda picture: handle.update(Image.fromarray(picture))


def follow(codec, prompts: Sequence[np.ndarray], show: Show) -> Callable[[dict[int, np.ndarray]], None]:
    """A function that takes the streams that have grown, by number, and shows all as a grid, if it is time to.

    Args:
      prompts: what each picture begins with; may be empty.
    """
    streams = dict(enumerate(prompts))
    drawn = -math.inf

    def grown(changed: dict[int, np.ndarray]) -> None:
        nonlocal drawn
        streams.update(changed)
        if time.monotonic() - drawn >= PAUSE:
            show(sheets.grid([codec.decode(stream).picture for stream in streams.values()]))
            drawn = time.monotonic()

    return grown


def frames(codec, streams: Sequence[np.ndarray], ratio: float = 0.0, most: int = FRAMES) -> Iterator[np.ndarray]:
    """Finished pictures as they were written, MCU by MCU: a grid of all, uint8 (height, width, 3), for each frame.

    The last frame is the pictures as they are; a stream that ends early, as unconstrained ones may, stays as it is.

    Args:
      streams: uint8 (length,) each.
      ratio: part of the MCUs that is there in the first frame: that of the prompt. 0 begins with grey.
      most: frames; where there are more MCUs than that, several are written in a frame.
    """
    steps = min(math.ceil((1 - ratio) * codec.mcu_count - 1e-6), most - 1)
    for part in np.linspace(ratio, 1, steps + 1):
        yield sheets.grid([codec.decode(_cut(codec, stream, part)).picture for stream in streams])


def _cut(codec, stream: np.ndarray, part: float) -> np.ndarray:
    """A part of a stream by its MCUs, or by its bytes where no restart marker says where they end."""
    if not codec.config.restart:
        header = len(codec.header)
        return stream[: header + round(part * (len(stream) - header))]
    try:
        return codec.prefix(stream, part)
    except ValueError:  # it has fewer MCUs
        return stream


def save_gif(path: Path, frames: Iterator[np.ndarray]) -> None:
    """Saves an animation that holds its last frame and begins again.

    Args:
      frames: at least one, uint8 (height, width, 3), all of one shape.
    """
    images = []
    for frame in frames:
        images.append(Image.fromarray(frame))
        images[-1].thumbnail((WIDEST, WIDEST))
    # One palette for all, so that no colour flickers; the first frame brings the grey that the last has no longer.
    both = Image.fromarray(np.concatenate([images[0], images[-1]]))
    palette = both.quantize(256)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [FRAME_MS] * (len(images) - 1) + [LAST_MS]
    images[0].save(path, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)

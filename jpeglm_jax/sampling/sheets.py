"""Sheets of pictures for people: rows of equal squares with a title each."""

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jpeglm_jax.data.pipeline import Data
from jpeglm_jax.model import Llama
from jpeglm_jax.sampling.complete import Sample, complete
from jpeglm_jax.sampling.rules import Sampler

GAP, TITLE, SMALLEST = 8, 24, 96
"""Pixels between pictures, of a title's height, and that small pictures are enlarged to."""

BACKGROUND = (214, 214, 214)
"""Grey, so that the white of a picture is seen."""


def sheet(rows: dict[str, Sequence[np.ndarray]]) -> np.ndarray:
    """Draws rows of pictures, by title; returns uint8 (height, width, 3).

    Args:
      rows: uint8 (size, size, 3) pictures, all of one size.
    """
    size = next(iter(rows.values()))[0].shape[0]
    side = size * max(1, -(-SMALLEST // size))  # whole multiples keep the pixels square
    columns = max(map(len, rows.values()))
    height = len(rows) * (TITLE + side + GAP) + GAP
    canvas = Image.new("RGB", (columns * (side + GAP) + GAP, height), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for number, (title, pictures) in enumerate(rows.items()):
        top = GAP + number * (TITLE + side + GAP)
        draw.text((GAP, top), title, fill="black", font=font)
        for column, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (GAP + column * (side + GAP), top + TITLE))
    return np.asarray(canvas)


def held_out_samples(
    model: Llama, data: Data, count: int, ratio: float, sampler: Sampler, max_tokens: int
) -> tuple[list[np.ndarray], list[Sample], list[Sample]]:
    """Held-out pictures (as the codec shows them), the same completed from their beginnings, and as many from nothing."""
    readable = filter(lambda stream: stream is not None, (data.stream(data.held_out, i) for i in range(len(data.held_out))))
    streams = list(itertools.islice(readable, count))
    if not streams:
        raise ValueError("none of the held-out pictures can be read")
    prompts = [data.codec.prefix(symbols, ratio) for symbols in streams]
    seeds = range(len(streams))
    completed = complete(model, data.codec, data.tokenizer, prompts, seeds, sampler, max_tokens)
    nothing = [symbols[:0] for symbols in streams]
    invented = complete(model, data.codec, data.tokenizer, nothing, seeds, sampler, max_tokens)
    return [data.codec.decode(symbols).picture for symbols in streams], completed, invented


def held_out_sheet(real: list[np.ndarray], completed: list[Sample], invented: list[Sample], ratio: float) -> np.ndarray:
    """The sheet of `held_out_samples`."""
    return sheet({
        "real pictures": real,
        f"completed from their first {ratio:.0%}": [sample.picture for sample in completed],
        "written from nothing": [sample.picture for sample in invented],
    })

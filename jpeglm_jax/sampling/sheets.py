"""Sheets of pictures for people: rows of equal squares with a title each."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jpeglm_jax.data.pipeline import Data
from jpeglm_jax.grammar import Grammar
from jpeglm_jax.model import Llama
from jpeglm_jax.sampling.complete import Sample, beginning, complete, least_tokens
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
    side = _side(next(iter(rows.values()))[0])
    columns = max(map(len, rows.values()))
    height = len(rows) * (TITLE + side + GAP) + GAP
    canvas = Image.new("RGB", (columns * (side + GAP) + GAP, height), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for number, (title, pictures) in enumerate(rows.items()):
        top = GAP + number * (TITLE + side + GAP)
        draw.text((GAP, top), title, fill="black", font=font)
        for column, picture in enumerate(pictures):
            canvas.paste(_enlarged(picture), (GAP + column * (side + GAP), top + TITLE))
    return np.asarray(canvas)


def grid(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Draws pictures as near to a square as they fill, without titles; returns uint8 (height, width, 3).

    Args:
      pictures: uint8 (size, size, 3), all of one size.
    """
    columns = math.ceil(math.sqrt(len(pictures)))
    rows, pitch = -(-len(pictures) // columns), _side(pictures[0]) + GAP
    canvas = Image.new("RGB", (columns * pitch + GAP, rows * pitch + GAP), BACKGROUND)
    for number, picture in enumerate(pictures):
        canvas.paste(_enlarged(picture), (GAP + number % columns * pitch, GAP + number // columns * pitch))
    return np.asarray(canvas)


def _side(picture: np.ndarray) -> int:
    """Pixels of a picture's side on a sheet; whole multiples keep the pixels square."""
    return picture.shape[0] * max(1, -(-SMALLEST // picture.shape[0]))


def _enlarged(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture).resize((_side(picture),) * 2, Image.Resampling.NEAREST)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out pictures and what a model makes of them."""

    ratio: float
    real: list[np.ndarray]
    """As the codec shows them."""
    completed: list[Sample]
    """From their first `ratio`."""
    invented: list[Sample]
    """As many from nothing."""

    @property
    def opening(self) -> float:
        """Share of the samples that open."""
        return float(np.mean([sample.opens for sample in self.completed + self.invented]))

    def rows(self, what: str = "") -> dict[str, list[np.ndarray]]:
        """Rows of samples for `sheet`."""
        return {
            f"completed from their first {self.ratio:.0%}{what}": [sample.picture for sample in self.completed],
            f"written from nothing{what}": [sample.picture for sample in self.invented],
        }


def held_out_samples(
    model: Llama, data: Data, grammar: Grammar, constrained: bool, count: int, ratio: float, sampler: Sampler
) -> HeldOut:
    """Completes held-out pictures, and writes as many from nothing, inside `jax.set_mesh` of the model's mesh.

    Args:
      grammar: gives the shortest budget, also where it does not constrain.
    """
    every = (data.stream(data.held_out, position) for position in range(len(data.held_out)))
    streams = list(itertools.islice((stream for stream in every if stream is not None), count))
    if not streams:
        raise ValueError("none of the held-out pictures can be read")
    prompts = [beginning(data.codec, symbols, ratio) for symbols in streams]
    prompts += [symbols[:0] for symbols in streams]
    least = max(least_tokens(data.tokenizer, prompt, grammar) for prompt in prompts)
    budget = max(data.config.sequence_length, least)
    seeds = [*range(len(streams))] * 2
    only = grammar if constrained else None
    samples = complete(model, data.codec, data.tokenizer, prompts, seeds, sampler, budget, only)
    real = [data.codec.decode(symbols).picture for symbols in streams]
    return HeldOut(ratio, real, samples[: len(streams)], samples[len(streams) :])

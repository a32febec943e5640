"""Invented flags: pictures made from nothing but a number, for a first run without data.

Every edge lies on the 16-pixel grid of the MCUs of 4:2:0, so that equal cells are equal bytes of the JPEG. There are:
  stripes    2 or 3, horizontal or vertical;
  cross      centred, on four quarters of which opposite ones are equal;
  nordic     a cross on 1 or 2 colours whose upright stands half a cell from the hoist: the only edges off the grid;
  frame      a border, plain or of 2 or 3 stripes, around a field;
  quarters   four rectangles around a point off the centre;
  hoist      an upright band, and 2 or 3 stripes beside it;
  canton     2 or 3 stripes with a square in the upper corner;
  checkers   2 or 3 colours in turn;
with every colour drawn anew and neighbours different. A third of the flags with a plain middle (for a canton: corner)
carry a disc, a diamond or a star there, of constant shape, so that it too is always the same few bytes.
"""

import functools
import math
import random

import numpy as np
from PIL import Image, ImageDraw

NATIVE_SIZE = 48
"""Width and height in pixels of the pictures of the built-in source: 3x3 cells."""

COLORS = {
    "white": (255, 255, 255),
    "yellow": (255, 210, 0),
    "red": (215, 20, 40),
    "black": (0, 0, 0),
    "orange": (255, 125, 0),
    "green": (0, 145, 60),
    "sky": (70, 170, 240),
    "blue": (0, 40, 165),
    "purple": (125, 30, 155),
    "maroon": (110, 0, 30),
}
EMBLEM_COLORS = 3
"""Emblems are white, yellow or red, the first of COLORS."""


def flag(index: int, size: int) -> np.ndarray:
    """Flag number `index`, the same at every call.

    Args:
      index: 0 or more; over 100,000 different flags come, those of few colours more than once.
      size: width and height in pixels, 3 or more; a multiple of 16 from 48 on for edges on the grid.

    Returns:
      uint8 (size, size, 3), RGB.
    """
    rng = random.Random(f"flags {_SERIES} {index}")
    cells = max(3, size // 16)
    third = round(cells / 3) * size // cells
    field = np.empty((size, size), np.uint8)
    box = rng.choice(_KINDS)(rng, field, third, size - third)
    if box and rng.random() < 1 / 3:
        start, stop = box
        cell = field[start:stop, start:stop]
        cell[_emblem(rng.choice(list(_EMBLEMS)), stop - start)] = _other(rng, int(cell[0, 0]), among=EMBLEM_COLORS)
    return _PALETTE.take(field, axis=0)  # four times faster than an index


_SERIES = 1
"""Seed of all flags; to be raised when the generator changes what it draws."""

_PALETTE = np.array(list(COLORS.values()), np.uint8)


# Each kind fills `field`, uint8 (size, size), with indices of COLORS. It returns where an emblem may stand: the first
# line of a plain square on the diagonal, and the line after its last. `near` and `far` are the lines at the thirds.


def _stripes(rng, field, near, far):
    field[:] = np.reshape(_bands(rng, near, far, len(field)), rng.choice(((1, -1), (-1, 1))))
    return near, far


def _cross(rng, field, near, far):
    color = _other(rng)
    quarters = _other(rng, color), _other(rng, color)
    field[:near, :near] = field[far:, far:] = quarters[0]
    field[:near, far:] = field[far:, :near] = rng.choice(quarters)
    field[near:far] = field[:, near:far] = color
    return near, far


def _nordic(rng, field, near, far):
    color = _other(rng)
    field[:near] = ground = _other(rng, color)
    field[far:] = rng.choice((ground, _other(rng, color)))
    field[near:far] = field[:, near // 2 : near // 2 + far - near] = color


def _frame(rng, field, near, far):
    border = rng.choice(([_other(rng)] * len(field), _bands(rng, near, far, len(field))))
    field[:] = np.reshape(border, (-1, 1))
    field[near:far, near:far] = _other(rng, *set(border))
    return near, far


def _quarters(rng, field, near, far):
    row, column = rng.choice((near, far)), rng.choice((near, far))
    field[:row, :column] = first = _other(rng)
    field[:row, column:] = second = _other(rng, first)
    field[row:, :column] = third = _other(rng, first)
    field[row:, column:] = _other(rng, second, third)
    return near, far


def _hoist(rng, field, near, far):
    stripes = _bands(rng, near, far, len(field))
    field[:] = np.reshape(stripes, (-1, 1))
    field[:, :near] = _other(rng, *set(stripes))
    return near, far


def _canton(rng, field, near, far):
    stripes = _bands(rng, near, far, len(field))
    field[:] = np.reshape(stripes, (-1, 1))
    field[:near, :near] = _other(rng, *set(stripes))
    return 0, near


def _checkers(rng, field, near, far):
    first = _other(rng)
    second = _other(rng, first)
    colors = rng.choice(((first, second), (first, second, _other(rng, first, second))))
    cells = np.arange(len(field)) // near
    field[:] = np.array(colors)[(cells + cells[:, None]) % len(colors)]


_KINDS = (_stripes, _cross, _nordic, _frame, _quarters, _hoist, _canton, _checkers)


def _bands(rng, near, far, size):
    """The colours of the lines of 2 or 3 stripes, (size,)."""
    cuts = rng.choice(((near, far), (near, far), (near,), (far,)))
    bands = [_other(rng)] * size
    for cut in cuts:
        bands[cut:] = [_other(rng, bands[-1])] * (size - cut)
    return bands


def _other(rng, *taken, among=len(COLORS)):
    """A colour that is not taken, of the first `among`."""
    return rng.choice([color for color in range(among) if color not in taken])


_EMBLEMS = {"disc": (64, 1.0), "diamond": (4, math.cos(math.pi / 4)), "star": (5, 0.42)}
"""Corners, and the distance of the points halfway between them from the centre, in parts of the radius."""


@functools.cache
def _emblem(shape: str, side: int) -> np.ndarray:
    """An emblem in a square, bool (side, side)."""
    corners, waist = _EMBLEMS[shape]
    points = []
    for index in range(2 * corners):
        angle, radius = math.pi * index / corners, 0.46 * side * (waist if index % 2 else 1)
        points.append(((side - 1) / 2 + radius * math.sin(angle), (side - 1) / 2 - radius * math.cos(angle)))
    image = Image.new("1", (side, side))
    ImageDraw.Draw(image).polygon(points, fill=1)
    return np.asarray(image)

"""What the streams of a codec have in common, read from what its encoder writes: never assumed.

Clauses in parentheses are of ITU-T T.81.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

SOI, EOI, SOF0, DHT, DQT, DRI, SOS, RST0 = 0xD8, 0xD9, 0xC0, 0xC4, 0xDB, 0xDD, 0xDA, 0xD0
"""Second bytes of markers (table B.1)."""

DC_SIZES, AC_SIZES = 11, 10
"""Most magnitude bits of a DC difference and of an AC coefficient of 8-bit samples (tables F.1 and F.2)."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One 8x8 block of an MCU."""

    component: str
    """Y, Cb or Cr."""
    dc: dict[str, int]
    """Huffman codes of DC sizes, as strings of 0 and 1."""
    ac: dict[str, int]
    """Huffman codes of AC symbols, 16 * run + size."""
    sizes: tuple[int, ...]
    """Most magnitude bits by zigzag position, 64 of them; the first is of the DC difference."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A codec's streams: `header`, then `mcus` times the blocks of an MCU, then EOI."""

    header: bytes
    """SOI up to the end of the scan header."""
    blocks: tuple[Block, ...]
    """Of one MCU, in the order of coding (A.2)."""
    mcus: int
    restart: bool
    """A restart marker stands between any two MCUs; else there is none."""


def read_layout(tables: bytes, header: bytes, *, caps: bool = False) -> Layout:
    """The layout of an encoder's streams.

    Args:
      tables: the table segments that the streams leave out: DQT and DHT.
      header: what every stream begins with: SOI up to the end of the scan header.
      caps: bound magnitudes by what this quantiser can make of 8-bit samples, not only by what Huffman codes can say.

    Raises:
      ValueError: not the header of a baseline stream, or a restart interval other than none and one MCU.
    """
    found = dict(segments(header))
    if SOF0 not in found or SOS not in found:
        raise ValueError("not a baseline JPEG stream with one scan (SOF0 and SOS): the grammar has no other form")
    interval = int.from_bytes(found.get(DRI, b"\0\0"))
    if interval > 1:
        raise ValueError(f"a restart interval of {interval} MCUs: the grammar knows none and one MCU")

    steps, codes = quantisers(tables), huffman_codes(tables)
    frame, scan = found[SOF0], found[SOS]
    height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    components = [frame[6 + 3 * i : 9 + 3 * i] for i in range(frame[5])]
    factors = [(sampling >> 4, sampling & 15) for _, sampling, _ in components]
    if len(factors) == 1:
        factors = [(1, 1)]  # a scan of one component is not interleaved: its MCU is one block (A.2.2)
    blocks = []
    for index, (_, _, quantiser) in enumerate(components):
        dc, ac = scan[2 + 2 * index] >> 4, scan[2 + 2 * index] & 15
        across, down = factors[index]
        for repeat in range(across * down):
            predicted = repeat > 0 or interval == 0
            sizes = _sizes(steps[quantiser], predicted) if caps else (DC_SIZES,) + (AC_SIZES,) * 63
            blocks.append(Block(("Y", "Cb", "Cr")[index], codes[0, dc], codes[1, ac], sizes))
    mcu_width, mcu_height = (8 * max(side) for side in zip(*factors))
    return Layout(
        header=header,
        blocks=tuple(blocks),
        mcus=math.ceil(width / mcu_width) * math.ceil(height / mcu_height),
        restart=interval == 1,
    )


def segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and content of each segment from SOI up to the scan header (B.1.1.4)."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        length = int.from_bytes(data[place + 2 : place + 4])
        yield data[place + 1], data[place + 4 : place + 2 + length]
        if data[place + 1] == SOS:
            return
        place += 2 + length


def huffman_codes(tables: bytes) -> dict[tuple[int, int], dict[str, int]]:
    """Symbols by code, a string of 0 and 1, by table class (0 is DC, 1 is AC) and destination (B.2.4.2, C.2)."""
    found = {}
    for marker, content in segments(b"\xff\xd8" + tables):
        while marker == DHT and content:
            counts, place, code, codes = content[1:17], 17, 0, {}
            for length, count in enumerate(counts, start=1):
                for symbol in content[place : place + count]:
                    codes[f"{code:0{length}b}"] = symbol
                    code += 1
                place += count
                code <<= 1
            found[content[0] >> 4, content[0] & 15] = codes
            content = content[place:]
    return found


def quantisers(tables: bytes) -> dict[int, np.ndarray]:
    """Steps in zigzag order by destination, int (64,) each, of 8-bit tables (B.2.4.1)."""
    found = {}
    for marker, content in segments(b"\xff\xd8" + tables):
        while marker == DQT and content:
            assert content[0] >> 4 == 0, "baseline streams have 8-bit quantisation tables"
            found[content[0] & 15] = np.frombuffer(content[1:65], np.uint8).astype(int)
            content = content[65:]
    return found


def _sizes(steps: np.ndarray, predicted: bool) -> tuple[int, ...]:
    """Magnitude bits of the largest coefficients that 8-bit samples can have, divided by the steps; int (64,).

    A DCT coefficient is at most 128 times the sum of its basis function's magnitudes (A.3.3); a difference of two DC
    coefficients is at most twice one.
    """
    angles = (2 * np.arange(8) + 1) * np.arange(8)[:, None] * np.pi / 16
    scale = np.where(np.arange(8) == 0, math.sqrt(0.5), 1) / 2
    reach = scale * np.abs(np.cos(angles)).sum(axis=1)
    largest = 128 * np.outer(reach, reach)
    zigzag = sorted(np.ndindex(8, 8), key=lambda p: (sum(p), p[sum(p) % 2 == 0]))
    # One more than the bound leaves room for the rounding of an integer DCT.
    levels = [math.floor((largest[place] + 1) / step + 0.5) for place, step in zip(zigzag, steps)]
    levels[0] *= 2 if predicted else 1
    limits = [DC_SIZES] + [AC_SIZES] * 63
    return tuple(min(int(level).bit_length(), limit) for level, limit in zip(levels, limits))

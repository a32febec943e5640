"""Why a file is not a stream of a codec: `jpeglm check`.

A decoder of bits, with the same rules as the automaton, that knows what to call things. Clauses in parentheses are of
ITU-T T.81.
"""

import dataclasses

import numpy as np

from jpeglm_jax.grammar.layout import DHT, DQT, DRI, EOI, RST0, SOS, Block, Layout, huffman_codes, quantisers, segments

_NAMES = {
    0xC0: "SOF0 (baseline)",
    0xC1: "SOF1 (extended)",
    0xC2: "SOF2 (progressive)",
    0xDA: "SOS",
    0xFE: "COM (a comment)",
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a file is a stream that the encoder can write and, if not, where it ceases to be one and why."""

    problem: str = ""
    """The rule that is broken; empty if the file is valid."""
    byte: int | None = None
    """Offset in the file."""
    mcu: int | None = None
    block: str | None = None
    """Component and number in the MCU, such as `Y 3`."""
    coefficient: int | None = None
    """Zigzag position from 0, the DC coefficient, to 63."""

    @property
    def valid(self) -> bool:
        return not self.problem

    def __str__(self) -> str:
        if self.valid:
            return "valid"
        places = [("byte", self.byte), ("MCU", self.mcu), ("block", self.block), ("coefficient", self.coefficient)]
        where = ", ".join(f"{name} {value}" for name, value in places if value is not None)
        return f"{where}: {self.problem}" if where else self.problem


def diagnose(layout: Layout, tables: bytes, data: bytes) -> Verdict:
    """Checks a file against a codec.

    Args:
      layout: of the codec's streams.
      tables: the table segments that its streams leave out.
      data: an abbreviated stream, or a complete file with equal tables anywhere before the scan.
    """
    try:
        scan = _check_header(layout, tables, data)
        _Scan(layout, data, scan).check()
    except _Invalid as invalid:
        return invalid.args[0]
    return Verdict()


class _Invalid(Exception):
    """Carries a verdict."""


def _check_header(layout: Layout, tables: bytes, data: bytes) -> int:
    """The offset of the first MCU."""
    if not data:
        raise _Invalid(Verdict("the file is empty"))
    if not data.startswith(b"\xff\xd8"):
        raise _Invalid(Verdict("not a JPEG file: it does not begin with SOI (FFD8)", byte=0))
    expected, place = list(segments(layout.header)), 2
    for marker, content in segments(data):
        name = _NAMES.get(marker, f"FF{marker:02X}")
        if place + 4 + len(content) > len(data) or len(content) + 2 != int.from_bytes(data[place + 2 : place + 4]):
            raise _Invalid(Verdict(f"segment {name} is cut off or has a wrong length", byte=place))
        if marker in (DQT, DHT):
            parse, what = (quantisers, "quantisation") if marker == DQT else (huffman_codes, "Huffman")
            segment = data[place : place + 4 + len(content)]
            try:
                found, ours = parse(segment), parse(tables)
            except (ValueError, IndexError):
                raise _Invalid(Verdict(f"damaged {what} tables", byte=place)) from None
            if any(key not in ours or not np.array_equal(found[key], ours[key]) for key in found):
                raise _Invalid(Verdict(f"other {what} tables than this codec's", byte=place))
        elif not expected or (marker, content) != expected[0]:
            raise _Invalid(Verdict(_difference(expected[:1], marker, content), byte=place))
        else:
            expected.pop(0)
        place += 4 + len(content)
    if expected:
        raise _Invalid(Verdict(f"segment {_NAMES.get(expected[0][0], f'FF{expected[0][0]:02X}')} expected", byte=place))
    return place


def _difference(expected: list[tuple[int, bytes]], marker: int, content: bytes) -> str:
    """What sets a segment apart from the one that should stand there."""
    ours, wanted = expected[0] if expected else (None, b"")
    if marker == ours == 0xC0 and len(content) == len(wanted):
        (height, width), (rows, columns) = ((int.from_bytes(c[1:3]), int.from_bytes(c[3:5])) for c in (content, wanted))
        if (width, height) != (columns, rows):
            return f"the picture is {width}x{height}, this codec's are {columns}x{rows}"
        return "other components or subsampling than this codec's"
    if marker == 0xC0 == ours:
        return f"{content[5]} components, this codec has {wanted[5]}" if len(content) > 5 else "damaged SOF0"
    if DRI in (marker, ours):
        return "another restart interval than this codec's"
    name = _NAMES.get(marker, f"FF{marker:02X}")
    return f"segment {name} is not as this codec writes it" if marker == ours else f"segment {name} may not stand here"


class _Scan:
    """Reads the entropy-coded data bit by bit."""

    def __init__(self, layout: Layout, data: bytes, place: int):
        self.layout, self.data, self.place = layout, data, place
        self.bits = ""  # of the byte before `place`, what has not been read
        self.mcu: int | None = None
        self.block: str | None = None
        self.k: int | None = None

    def fail(self, problem: str, byte: int | None = None) -> None:
        where = self.place if byte is None else byte
        raise _Invalid(Verdict(problem, min(where, len(self.data)), self.mcu, self.block, self.k))

    def check(self) -> None:
        names = [block.component for block in self.layout.blocks]
        for self.mcu in range(self.layout.mcus):
            if self.mcu and self.layout.restart:
                self.pad()
                self.marker(RST0 + (self.mcu - 1) % 8)
            for number, block in enumerate(self.layout.blocks):
                self.block = f"{block.component} {names[:number].count(block.component)}"
                self.check_block(block)
            self.block = self.k = None
        self.pad()
        self.mcu = None
        self.marker(EOI)
        if self.place < len(self.data):
            self.fail(f"{len(self.data) - self.place} bytes after the end of the image")

    def check_block(self, block: Block) -> None:
        self.k = 0
        size = self.symbol(block.dc)
        if size > block.sizes[0]:
            self.fail(f"a DC difference of {size} bits: at most {block.sizes[0]}", self.place - 1)
        self.read(size)
        self.k, after_zrl = 1, False
        while self.k <= 63:
            symbol = self.symbol(block.ac)
            run, size = symbol >> 4, symbol & 15
            if symbol == 0:
                if after_zrl:
                    self.fail("EOB after ZRL: no coefficient follows the 16 zeros (F.1.2.2)", self.place - 1)
                return
            if size == 0 and run != 15:
                self.fail(f"symbol {symbol:02X} is not used in baseline coding (F.1.2.2.1)", self.place - 1)
            position = self.k + (16 if size == 0 else run)
            if position > 63:
                self.fail(f"a run of zeros leads to coefficient {position}: a block ends at 63", self.place - 1)
            self.k, after_zrl = position, size == 0
            if size:
                if size > block.sizes[self.k]:
                    self.fail(f"a coefficient of {size} bits: at most {block.sizes[self.k]}", self.place - 1)
                self.read(size)
                self.k += 1

    def symbol(self, codes: dict[str, int]) -> int:
        code = ""
        while code not in codes:
            if len(code) == 16:
                self.fail(f"no Huffman code begins with {code}", self.place - 1)
            code += self.read(1)
        return codes[code]

    def read(self, count: int) -> str:
        while len(self.bits) < count:
            if self.place >= len(self.data):
                self.fail("the file ends here")
            byte = self.data[self.place]
            if byte == 0xFF:
                second = self.data[self.place + 1 : self.place + 2]
                if not second:
                    self.fail("the file ends after FF")
                if second != b"\0":
                    self.fail(f"marker FF{second.hex().upper()} where coded data should go on")
                self.place += 1
            self.place += 1
            self.bits += f"{byte:08b}"
        bits, self.bits = self.bits[:count], self.bits[count:]
        return bits

    def pad(self) -> None:
        if "0" in self.bits:
            self.fail(f"padding bits {self.bits} before a marker: they must be 1 (F.1.2.3)", self.place - 1)
        self.bits = ""

    def marker(self, second: int) -> None:
        found, expected = self.data[self.place : self.place + 2], bytes([0xFF, second])
        if found != expected:
            name = "EOI" if second == EOI else f"restart marker {second - RST0}"
            what = found.hex().upper() if found else "the end of the file"
            self.fail(f"{what} where {name} ({expected.hex().upper()}) must stand")
        self.place += 2

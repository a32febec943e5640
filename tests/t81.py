"""A judge of JPEG streams, written straight from ITU-T T.81 and sharing nothing with the package.

It decodes the coefficients by the procedures of annex F.2 and codes them again by those of F.1: a stream is what an
encoder writes if, and only if, that gives the same bytes. So wrong padding, a ZRL before EOB, an EOB after coefficient
63 or a missing stuffed zero are all the same finding. Slow, and meant to be read.
"""

import dataclasses


class Bad(Exception):
    """Not a stream that a baseline encoder writes."""


class Table:
    """A Huffman table as in C.2 (codes by symbol) and F.2.2.3 (first code, last code and first index by length)."""

    def __init__(self, counts: bytes, symbols: bytes):
        self.symbols = symbols
        self.code_of: dict[int, tuple[int, int]] = {}
        self.mincode, self.maxcode, self.valptr = [0] * 17, [-1] * 17, [0] * 17
        code = index = 0
        for length in range(1, 17):
            self.mincode[length], self.valptr[length] = code, index
            for _ in range(counts[length - 1]):
                self.code_of[symbols[index]] = code, length
                code, index = code + 1, index + 1
            self.maxcode[length] = code - 1 if counts[length - 1] else -1
            code *= 2


@dataclasses.dataclass
class Picture:
    """Coefficients of a scan: for each MCU, for each block of it, 64 integers in zigzag order."""

    mcus: list[list[list[int]]]


def judge(tables: bytes, header: bytes, stream: bytes) -> str:
    """'' if an encoder with these tables and this header writes the stream for some coefficients; else why not."""
    try:
        if not stream.startswith(header):
            raise Bad("header")
        scan = _Scan(tables, header)
        if scan.encode(scan.decode(stream[len(header) :])) != stream[len(header) :]:
            raise Bad("an encoder writes these coefficients in other bytes")
    except Bad as bad:
        return str(bad)
    return ""


class _Scan:
    def __init__(self, tables: bytes, header: bytes):
        self.dc, self.ac = {}, {}
        self.interval = 0
        data, place = tables + header[2:], 0
        while place < len(data):
            marker, length = data[place + 1], data[place + 2] * 256 + data[place + 3]
            body = data[place + 4 : place + 2 + length]
            place += 2 + length
            if marker == 0xC4:
                while body:
                    total = sum(body[1:17])
                    (self.ac if body[0] & 0x10 else self.dc)[body[0] & 15] = Table(body[1:17], body[17 : 17 + total])
                    body = body[17 + total :]
            elif marker == 0xC0:
                self.height, self.width = body[1] * 256 + body[2], body[3] * 256 + body[4]
                self.sampling = {body[6 + 3 * i]: (body[7 + 3 * i] >> 4, body[7 + 3 * i] & 15) for i in range(body[5])}
            elif marker == 0xDD:
                self.interval = body[0] * 256 + body[1]
            elif marker == 0xDA:
                self.selected = [(body[1 + 2 * i], body[2 + 2 * i] >> 4, body[2 + 2 * i] & 15) for i in range(body[0])]
        # A.2: blocks of an MCU, as (component, DC table, AC table); a scan of one component has MCUs of one block.
        self.blocks = []
        for component, dc, ac in self.selected:
            h, v = self.sampling[component] if len(self.selected) > 1 else (1, 1)
            self.blocks += [(component, self.dc[dc], self.ac[ac])] * (h * v)
        widest = max(h for h, _ in self.sampling.values()) if len(self.selected) > 1 else 1
        tallest = max(v for _, v in self.sampling.values()) if len(self.selected) > 1 else 1
        self.count = -(-self.width // (8 * widest)) * -(-self.height // (8 * tallest))

    # Decoding (F.2)

    def decode(self, data: bytes) -> Picture:
        self.data, self.at, self.byte, self.have = data, 0, 0, 0
        mcus, predictions = [], dict.fromkeys(self.sampling, 0)
        for number in range(self.count):
            if number and self.interval and number % self.interval == 0:
                self._marker(0xD0 + (number // self.interval - 1) % 8)
                predictions = dict.fromkeys(self.sampling, 0)
            mcu = []
            for component, dc, ac in self.blocks:
                block = [0] * 64
                predictions[component] += self._extend(self._receive_in(dc, 11))
                block[0] = predictions[component]
                self._decode_ac(block, ac)
                mcu.append(block)
            mcus.append(mcu)
        self._marker(0xD9)
        if self.at != len(data):
            raise Bad("bytes after EOI")
        return Picture(mcus)

    def _decode_ac(self, block: list[int], table: Table) -> None:
        k = 1
        while k <= 63:
            rs = self._symbol(table)
            run, size = rs >> 4, rs & 15
            if size == 0 and run == 0:
                return
            if size == 0 and run != 15:
                raise Bad(f"AC symbol {rs:02x}")
            k += run if size else 16
            if k > 63:
                raise Bad(f"run to coefficient {k}")
            if size:
                if size > 10:
                    raise Bad("AC coefficient of more than 10 bits")
                block[k] = self._extend(size)
                k += 1

    def _receive_in(self, table: Table, most: int) -> int:
        size = self._symbol(table)
        if size > most:
            raise Bad(f"{size} bits")
        return size

    def _symbol(self, table: Table) -> int:
        code = 0
        for length in range(1, 17):
            code = 2 * code + self._bit()
            if table.maxcode[length] >= code >= table.mincode[length]:
                return table.symbols[table.valptr[length] + code - table.mincode[length]]
        raise Bad("no such code")

    def _extend(self, size: int) -> int:
        value = 0
        for _ in range(size):
            value = 2 * value + self._bit()
        return value if not size or value >> (size - 1) else value - (1 << size) + 1

    def _bit(self) -> int:
        if not self.have:
            if self.at >= len(self.data):
                raise Bad("data ends")
            self.byte, self.have = self.data[self.at], 8
            self.at += 1
            if self.byte == 0xFF:
                if self.data[self.at : self.at + 1] != b"\0":
                    raise Bad("marker in coded data")
                self.at += 1
        self.have -= 1
        return self.byte >> self.have & 1

    def _marker(self, second: int) -> None:
        self.have = 0
        if self.data[self.at : self.at + 2] != bytes([0xFF, second]):
            raise Bad(f"not the marker {second:02x}")
        self.at += 2

    # Coding (F.1)

    def encode(self, picture: Picture) -> bytes:
        out, bits = bytearray(), []
        predictions = dict.fromkeys(self.sampling, 0)
        for number, mcu in enumerate(picture.mcus):
            if number and self.interval and number % self.interval == 0:
                self._flush(out, bits)
                out += bytes([0xFF, 0xD0 + (number // self.interval - 1) % 8])
                predictions = dict.fromkeys(self.sampling, 0)
            for (component, dc, ac), block in zip(self.blocks, mcu):
                self._put(bits, dc, 0, block[0] - predictions[component])
                predictions[component] = block[0]
                last = max((k for k in range(64) if block[k] and k), default=0)
                run = 0
                for k in range(1, last + 1):
                    if not block[k]:
                        run += 1
                        continue
                    while run > 15:
                        self._code(bits, ac, 0xF0)
                        run -= 16
                    self._put(bits, ac, run, block[k])
                    run = 0
                if last < 63:
                    self._code(bits, ac, 0)
        self._flush(out, bits)
        return bytes(out) + b"\xff\xd9"

    def _put(self, bits: list[str], table: Table, run: int, value: int) -> None:
        size = abs(value).bit_length()
        self._code(bits, table, 16 * run + size)
        if size:
            bits.append(f"{value if value > 0 else value + (1 << size) - 1:0{size}b}")

    def _code(self, bits: list[str], table: Table, symbol: int) -> None:
        if symbol not in table.code_of:
            raise Bad(f"no code for symbol {symbol:02x}")
        code, length = table.code_of[symbol]
        bits.append(f"{code:0{length}b}")

    def _flush(self, out: bytearray, bits: list[str]) -> None:
        text = "".join(bits)
        bits.clear()
        text += "1" * (-len(text) % 8)
        for byte in (int(text[i : i + 8], 2) for i in range(0, len(text), 8)):
            out.append(byte)
            if byte == 0xFF:
                out.append(0)

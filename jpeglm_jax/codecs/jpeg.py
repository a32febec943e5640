"""Pictures as abbreviated JPEG streams: the published representation (paper, section 3).

A stream is a constant header, the MCUs of the picture in raster order with a restart marker after each but the last,
and the end-of-image marker. The quantisation and Huffman tables, equal in every file, are left out (ITU-T T.81, B.5).
"""

import io
import math

import numpy as np
from PIL import Image

from jpeglm_jax.codecs import Decoded
from jpeglm_jax.config import JpegConfig

MCU_SIZES = {"4:2:0": (16, 16), "4:2:2": (16, 8), "4:4:4": (8, 8), "gray": (8, 8)}
"""Width and height in pixels of the smallest coded unit (ITU-T T.81, A.2)."""

SOI, EOI, FIRST_RST = 0xD8, 0xD9, 0xD0
"""Second bytes of the markers: start and end of image, and the first of the eight restart markers (T.81, table B.1)."""


class Codec:
    """Pictures to the bytes of JPEG files without their tables, and back.

    Attributes:
      header: bytes, what every stream begins with, up to its first MCU.
      tables: bytes, the table segments that a complete file has after its start-of-image marker.
      mcu_size: (width, height) of an MCU in pixels.
      mcu_count: MCUs in a picture.
    """

    alphabet_size = 256

    def __init__(self, config: JpegConfig):
        self.config = config
        self.mcu_size = MCU_SIZES[config.subsampling]
        self.mcu_count = math.prod(math.ceil(config.size / side) for side in self.mcu_size)
        probe = np.full((config.size, config.size, 3), 128, np.uint8)
        self.tables = self._write(probe, streamtype=1)[2:-2]
        stream = self._write(probe, streamtype=2)
        start_of_scan = stream.index(b"\xff\xda")
        self.header = stream[: start_of_scan + 2 + int.from_bytes(stream[start_of_scan + 2 : start_of_scan + 4])]
        self._grey = stream[len(self.header) :]

    def encode(self, picture: np.ndarray) -> np.ndarray:
        """The stream of a picture.

        Args:
          picture: uint8 (size, size, 3), RGB.

        Returns:
          uint8 (length,), read-only.

        Raises:
          ValueError: another shape or dtype.
        """
        shape = (self.config.size, self.config.size, 3)
        if picture.shape != shape or picture.dtype != np.uint8:
            raise ValueError(
                f"a picture must be uint8 {shape}, not {picture.dtype} {picture.shape}; data.pictures.load makes it so"
            )
        return np.frombuffer(self._write(picture, streamtype=2), np.uint8)

    def decode(self, symbols: np.ndarray) -> Decoded:
        """The picture of a stream, whatever its state; what is missing is grey, with restart markers by whole MCUs.

        Args:
          symbols: (length,), integers from 0 to 255.

        Returns:
          The picture, uint8 (size, size, 3), and what its markers show to be lost.
        """
        stream = symbols.astype(np.uint8).tobytes()
        body, lost = self._repair(stream[len(self.header) :])
        if not stream.startswith(self.header[: len(stream)]):
            lost = "; ".join(filter(None, ["header damaged", lost]))
        file = self.header[:2] + self.tables + self.header[2:] + body
        with Image.open(io.BytesIO(file), formats=["JPEG"]) as image:
            return Decoded(np.array(image.convert("RGB")), lost)

    def prefix(self, symbols: np.ndarray, ratio: float) -> np.ndarray:
        """The header and the first floor(ratio * mcu_count) MCUs with their markers: the next byte begins an MCU.

        Args:
          symbols: uint8 (length,), a stream.
          ratio: part of the MCUs to keep, from 0 to 1; 1 keeps the whole stream.

        Raises:
          ValueError: a ratio outside [0, 1], a codec without restart markers, or a stream with too few MCUs.
        """
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must be from 0 to 1, not {ratio}")
        if not self.config.restart:
            raise ValueError("a prefix is cut at a restart marker, which this codec does not write: set restart=True")
        # The small term keeps 0.29 of 100 MCUs at 29: the product of the floats is just below.
        count = math.floor(ratio * self.mcu_count + 1e-6)
        ends = len(self.header) + 2 + _markers(symbols[len(self.header) :])[0]
        if count > len(ends):
            raise ValueError(
                f"ratio {ratio} asks for {count} of {self.mcu_count} MCUs, but the stream ends after {len(ends)}"
            )
        return symbols[: ends[count - 1] if count else len(self.header)]

    def to_file(self, symbols: np.ndarray) -> bytes:
        """A complete .jpg file: the stream as it is, with the tables put back."""
        stream = symbols.astype(np.uint8).tobytes()
        return stream[:2] + self.tables + stream[2:]

    def from_file(self, data: bytes) -> np.ndarray:
        """The stream of a file that `to_file` made, uint8 (length,).

        Raises:
          ValueError: the file has other tables, or has them at another place.
        """
        if not data.startswith(self.tables, 2):
            raise ValueError(f"not a file that this codec wrote ({self.describe()}): encode its picture instead")
        return np.frombuffer(data[:2] + data[2 + len(self.tables) :], np.uint8)

    def describe(self) -> str:
        """One line for people."""
        size, (width, height) = self.config.size, self.mcu_size
        return (
            f"JPEG {size}x{size}, quality {self.config.quality}, {self.config.subsampling}, {self.mcu_count} MCUs of "
            f"{width}x{height}, {'a restart marker after each' if self.config.restart else 'no restart markers'}"
        )

    def _write(self, picture: np.ndarray, streamtype: int) -> bytes:
        # A fresh image has no comment, which Pillow would copy from a source file into the stream.
        image = Image.fromarray(picture)
        options = {"quality": self.config.quality, "streamtype": streamtype}
        if self.config.subsampling == "gray":
            image = image.convert("L")
        else:
            options["subsampling"] = self.config.subsampling
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", restart_marker_blocks=int(self.config.restart), **options)
        return buffer.getvalue()

    def _repair(self, body: bytes) -> tuple[bytes, str]:
        """What follows the header, made such that libjpeg has no reason to refuse it, and what is lost.

        libjpeg bridges damaged MCUs and restart markers by itself, but refuses other markers inside a scan and data
        without an end.
        """
        last = self.mcu_count - 1 if self.config.restart else 0
        places, markers = _markers(np.frombuffer(body, np.uint8))
        expected = [FIRST_RST + index % 8 for index in range(last)] + [EOI]
        good = next((i for i, (a, b) in enumerate(zip(markers, expected)) if a != b), min(len(markers), len(expected)))
        if good == len(expected):
            end = places[last] + 2
            return body[:end], f"{len(body) - end} bytes after the end" if len(body) > end else ""
        if self.config.restart and good == len(markers):
            # Libjpeg would read zeros into the MCU that is not there, which show as a pattern.
            grey = _markers(np.frombuffer(self._grey, np.uint8))[0]
            begun, rest = (places[good - 1] + 2, grey[good - 1] + 2) if good else (0, 0)
            return body[:begun] + self._grey[rest:], f"ends after {good} of {last + 1} MCUs"

        scan = bytearray(body)
        for place, marker in zip(places, markers):
            if marker == EOI:
                del scan[place:]
                break
            if not FIRST_RST <= marker < FIRST_RST + 8:
                scan[place + 1] = 0  # FF00 is the data byte FF
        if good == len(markers) or markers[good] == EOI:
            lost = f"ends after {good} of {last + 1} MCUs" if self.config.restart else "ends without its end marker"
        elif not self.config.restart:
            lost = f"marker FF{markers[good]:02X} inside the scan"
        elif FIRST_RST <= markers[good] < FIRST_RST + 8:
            lost = f"restart markers out of order at MCU {good}"
        else:
            lost = f"marker FF{markers[good]:02X} inside MCU {good}"
        return bytes(scan) + bytes([0xFF, EOI]), lost


def _markers(scan: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the markers in coded data, and their second bytes; FF00 is data (T.81, B.1.1.5)."""
    places = np.flatnonzero((scan[:-1] == 0xFF) & (scan[1:] != 0))
    return places, scan[places + 1]

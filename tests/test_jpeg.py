"""The published representation: golden bytes, plain Pillow, damage, cuts."""

import hashlib
import io

import numpy as np
import pytest
import skimage.data
from PIL import Image

from jpeglm_jax.codecs.jpeg import Codec
from jpeglm_jax.config import JpegConfig
from jpeglm_jax.data import pictures

SUBSAMPLINGS = ["4:2:0", "4:2:2", "4:4:4", "gray"]


def generated(size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return np.stack([x * 255 // size, y * 255 // size, (x * y) // 7 % 256], axis=-1).astype(np.uint8)


def photo(size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(skimage.data.astronaut()).resize((size, size), Image.Resampling.BILINEAR))


def save(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def published():
    return Codec(JpegConfig())


def test_golden_header(published):
    assert published.header.hex() == (
        "ffd8ffe000104a46494600010100000100010000ffc00011080100010003012200021101031101"
        "ffdd00040001ffda000c03010002110311003f00"
    )
    assert len(published.header) == 59
    assert (published.mcu_size, published.mcu_count) == ((16, 16), 256)


def test_golden_bytes(published):
    stream = published.encode(generated(256))
    assert len(stream) == 5290
    assert hashlib.sha256(stream).hexdigest() == "3f077d18dddb765b27a7d5c30f875c8c0c6c7fd778446368d6a41ff1d8a1ee6b"


def test_a_stream_is_what_the_published_settings_of_pillow_give(published):
    for picture in (generated(256), photo(256)):
        expected = save(
            Image.fromarray(picture), quality=25, subsampling="4:2:0", streamtype=2, restart_marker_blocks=1
        )
        assert published.encode(picture).tobytes() == expected


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("size", [1, 37, 48])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_a_file_with_its_tables_shows_the_pixels_of_an_ordinary_encode(subsampling, size, restart):
    codec = Codec(JpegConfig(size=size, quality=60, subsampling=subsampling, restart=restart))
    stream = codec.encode(photo(size))
    assert stream.tobytes().startswith(codec.header)
    assert np.count_nonzero((stream[:-1] == 0xFF) & (stream[1:] >> 3 == 0xD0 >> 3)) == (codec.mcu_count - 1) * restart

    image = Image.fromarray(photo(size))
    if subsampling == "gray":
        ordinary = save(image.convert("L"), quality=60)
    else:
        ordinary = save(image, quality=60, subsampling=subsampling)
    expected = np.asarray(Image.open(io.BytesIO(ordinary)).convert("RGB"))
    file = codec.to_file(stream)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file)).convert("RGB")), expected)
    decoded = codec.decode(stream)
    assert np.array_equal(decoded.picture, expected) and decoded.lost == ""
    assert np.array_equal(codec.from_file(file), stream)


def test_from_file_refuses_the_file_of_another_quality(published):
    file = Codec(JpegConfig(quality=26)).to_file(Codec(JpegConfig(quality=26)).encode(photo(256)))
    with pytest.raises(ValueError, match="quality 25"):
        published.from_file(file)


def test_a_comment_in_the_source_stays_out_of_the_stream(published):
    source = save(Image.fromarray(photo(256)), quality=95, comment=b"made by hand")
    assert b"made by hand" in source
    stream = published.encode(pictures.load(source, 256))
    assert stream.tobytes().startswith(published.header) and b"made by hand" not in stream.tobytes()


def interval(codec: Codec, stream: np.ndarray, index: int) -> slice:
    """Where an MCU and its closing marker lie."""
    return slice(*(len(codec.prefix(stream, (index + end) / codec.mcu_count)) for end in (0, 1)))


def test_a_cut_stream_keeps_what_it_had(published):
    stream = published.encode(photo(256))
    whole = published.decode(stream).picture
    cut = published.decode(stream[: interval(published, stream, 130).start])
    assert cut.lost == "ends after 130 of 256 MCUs"
    # Libjpeg blends colours over the edge of an MCU, hence the one pixel less.
    assert np.array_equal(cut.picture[:127], whole[:127])
    assert len(np.unique(cut.picture[145:])) == 1


def test_an_early_end_marker_counts_as_a_cut(published):
    stream = published.encode(photo(256))
    early = np.concatenate([stream[: interval(published, stream, 7).start], stream[-2:], stream[:100]])
    assert published.decode(early).lost == "ends after 7 of 256 MCUs"


def test_a_damaged_header_is_replaced(published):
    stream = published.encode(photo(256))
    damaged = stream.copy()
    damaged[[3, 30, 50]] ^= 0xFF
    decoded = published.decode(damaged)
    assert decoded.lost == "header damaged"
    assert np.array_equal(decoded.picture, published.decode(stream).picture)


def test_restart_markers_out_of_order_are_told(published):
    stream = published.encode(photo(256))
    without = np.delete(stream, interval(published, stream, 17))
    assert published.decode(without).lost == "restart markers out of order at MCU 17"
    assert published.decode(stream[:-2]).lost == "ends after 255 of 256 MCUs"
    assert published.decode(np.append(stream, stream[:9])).lost == "9 bytes after the end"


@pytest.mark.parametrize("restart", [True, False])
def test_a_foreign_marker_does_not_end_the_scan(restart):
    codec = Codec(JpegConfig(size=64, restart=restart))
    stream = codec.encode(photo(64)).copy()
    start = len(codec.header) + 3
    stream[start : start + 2] = 0xFF, 0xC4
    decoded = codec.decode(stream)
    assert decoded.lost == ("marker FFC4 inside MCU 0" if restart else "marker FFC4 inside the scan")
    if restart:
        assert np.array_equal(decoded.picture[33:], codec.decode(codec.encode(photo(64))).picture[33:])


def test_any_heap_of_markers_decodes():
    codec = Codec(JpegConfig(size=48))
    stream, rng = codec.encode(photo(48)), np.random.default_rng(0)
    menu = np.array([0xFF] * 8 + [0, 0xC0, 0xC4, 0xD0, 0xD1, 0xD8, 0xD9, 0xD9, 0xDA, 0xDB, 0xDD, 0xFE, 1], np.uint8)
    for _ in range(500):
        heap = rng.choice(menu, rng.integers(2, 60))
        place = rng.integers(len(codec.header), len(stream))
        assert codec.decode(np.concatenate([stream[:place], heap, stream[place:]])).picture.shape == (48, 48, 3)


@pytest.mark.parametrize("ratio, mcus", [(0, 0), (0.375, 96), (0.5, 128), (0.29, 74), (1, 256)])
def test_a_prefix_ends_where_an_mcu_begins(published, ratio, mcus):
    stream = published.encode(photo(256))
    prefix = published.prefix(stream, ratio)
    markers = np.flatnonzero((prefix[:-1] == 0xFF) & (prefix[1:] != 0))
    assert np.count_nonzero(markers >= len(published.header)) == mcus
    assert len(prefix) == (markers[-1] + 2 if mcus else 59)


def test_a_prefix_counts_exactly_where_floats_do_not():
    codec = Codec(JpegConfig(size=160))  # 100 MCUs; 0.29 * 100 = 28.999999999999996
    stream = codec.encode(photo(160))
    assert codec.decode(codec.prefix(stream, 0.29)).lost == "ends after 29 of 100 MCUs"


def test_prefix_says_why_it_cannot(published):
    codec = Codec(JpegConfig(restart=False))
    with pytest.raises(ValueError, match="restart=True"):
        codec.prefix(codec.encode(photo(256)), 0.5)
    with pytest.raises(ValueError, match="asks for 128 of 256 MCUs, but the stream ends after 64"):
        published.prefix(published.prefix(published.encode(photo(256)), 0.25), 0.5)

"""Every kind of file that people have in their folders."""

import io
import subprocess
import sys

import numpy as np
import pytest
import skimage.data
from PIL import Image, PngImagePlugin

from jpeglm_jax.data import flags, pictures
from jpeglm_jax.data.pictures import BadPicture

SIZE = 32


def file(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(skimage.data.astronaut()).resize((width, height))


def near(ours: np.ndarray, theirs, tolerance: float) -> bool:
    assert ours.shape == (SIZE, SIZE, 3) and ours.dtype == np.uint8
    return np.abs(ours.astype(int) - theirs).mean() <= tolerance


@pytest.mark.parametrize("width, height, box", [(50, 37, (6, 0, 43, 37)), (37, 50, (0, 6, 37, 43)), (32, 32, None)])
def test_the_centre_square_is_resized(width, height, box):
    expected = photo(width, height).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    assert np.array_equal(pictures.load(file(photo(width, height)), SIZE), np.asarray(expected))


def test_an_array_of_the_right_size_is_left_alone_and_another_resized():
    flag = flags.flag(0, SIZE)
    assert np.array_equal(pictures.load(flag, SIZE), flag)
    assert np.array_equal(pictures.load(np.asarray(photo(50, 37)), SIZE), pictures.load(file(photo(50, 37)), SIZE))


def test_a_large_jpeg_looks_as_if_decoded_whole():
    large = file(photo(700, 600), "JPEG", quality=95)
    whole = np.asarray(Image.open(io.BytesIO(large)))
    difference = pictures.load(large, 128).astype(int) - pictures.load(whole, 128)
    assert 0 < np.abs(difference).mean() < 1  # 0: nothing was saved


@pytest.mark.parametrize("side", [1, 2])
def test_tiny_pictures_are_enlarged(side):
    assert near(pictures.load(file(Image.new("RGB", (side, side), (9, 99, 200))), SIZE), (9, 99, 200), 0)


STORED = {  # EXIF 2.3, tag 274: which sides of the upright picture the first row and column of the file are
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda upright: upright[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_undone(orientation):
    upright = np.asarray(photo(SIZE, SIZE))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    assert np.array_equal(pictures.load(file(stored, exif=exif), SIZE), upright)


def test_cmyk_becomes_rgb():
    colors = Image.new("CMYK", (40, 40), (0, 255, 255, 0))
    assert near(pictures.load(file(colors, "JPEG", quality=95), SIZE), (255, 0, 0), 4)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    ramp = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    assert near(pictures.load(file(Image.fromarray(ramp), format), SIZE), ramp[:, :, None] / 257, 1)


def test_floating_point_is_refused():
    with pytest.raises(BadPicture, match="floating-point"):
        pictures.load(file(Image.new("F", (40, 40), 0.5), "TIFF"), SIZE)


def palette_with_transparency() -> bytes:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (20, 0, 40, 40))
    return file(image, "PNG", transparency=0)


@pytest.mark.parametrize("transparency", [b"\x00\xff", b"\x00"])
def test_transparent_palette_colours_are_white(transparency):
    image = Image.open(io.BytesIO(palette_with_transparency()))
    loaded = pictures.load(file(image, "PNG", transparency=transparency), SIZE)
    assert loaded[5, 5].tolist() == [255, 255, 255] and loaded[5, -5].tolist() == [0, 0, 255]


def test_half_transparent_pixels_mix_with_white():
    assert near(pictures.load(file(Image.new("RGBA", (40, 40), (200, 0, 0, 128))), SIZE), (227, 127, 127), 1)
    assert near(pictures.load(file(Image.new("LA", (40, 40), (0, 128))), SIZE), 127, 1)
    keyed = file(Image.new("RGB", (40, 40), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert near(pictures.load(keyed, SIZE), 255, 0)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (40, 40), color) for color in ("lime", "red", "blue")]
    animation = file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(animation)).n_frames == 3
    assert near(pictures.load(animation, SIZE), (0, 255, 0), 0)


@pytest.mark.parametrize("mode, format", [("1", "TIFF"), ("L", "BMP"), ("P", "BMP"), ("YCbCr", "TIFF"), ("L", "PPM")])
def test_other_modes_and_formats_are_read(mode, format):
    image = photo(50, 37).convert(mode)
    expected = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(6, 0, 43, 37)))
    assert np.array_equal(pictures.load(file(image, format), SIZE), expected)


def test_webp_is_read():
    assert near(pictures.load(file(photo(SIZE, SIZE), "WEBP", lossless=True), SIZE), np.asarray(photo(SIZE, SIZE)), 0)


def damaged_kinds() -> dict[str, bytes]:
    jpeg, png = file(photo(64, 64), "JPEG"), file(photo(64, 64))
    return {
        "empty": b"",
        "text": b"shopping list: milk, eggs\n" * 9,
        "web page": b"<!DOCTYPE html><html><body>404</body></html>",
        "script": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "format that is not read": file(photo(64, 64), "PCX"),
        "truncated JPEG": jpeg[: len(jpeg) // 2],
        "JPEG without its last byte": jpeg[:-1],
        "truncated PNG": png[: len(png) // 2],
        "JPEG start only": jpeg[:3],
        "PNG start only": png[:20],
        "truncated GIF": file(photo(64, 64).convert("P"), "GIF")[:200],
        "truncated TIFF": file(photo(64, 64), "TIFF")[:100],
        "truncated WEBP": file(photo(64, 64), "WEBP")[:100],
        "truncated PPM": file(photo(64, 64), "PPM")[:100],
        "PNG with a bad checksum": png[:60] + b"junk" + png[64:],
        "20000x20000": large_png(20000),
    }


def large_png(side: int) -> bytes:
    """Says that it is large and holds next to nothing: a decompression bomb."""
    buffer = io.BytesIO()
    buffer.write(b"\x89PNG\r\n\x1a\n")
    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    PngImagePlugin.putchunk(buffer, b"IHDR", header)
    PngImagePlugin.putchunk(buffer, b"IDAT", b"")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", damaged_kinds())
def test_a_file_that_is_no_picture_is_refused_in_one_line(kind):
    with pytest.raises(BadPicture) as error:
        pictures.load(damaged_kinds()[kind], SIZE)
    message = str(error.value)
    assert message and "\n" not in message and "BytesIO" not in message and len(message) < 150
    reasons = {"20000x20000": "too large", "empty": "file is empty", "truncated JPEG": "truncated", "text": "format"}
    assert reasons.get(kind, "") in message


@pytest.mark.filterwarnings("ignore")  # pytest takes our filter away; the test below looks at it
def test_no_damage_lets_another_exception_out():
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        options = {"exif": b"Exif\0\0MM\0*"} if format == "JPEG" else {}
        whole = np.frombuffer(file(photo(16, 16), format, **options), np.uint8)
        for _ in range(100):
            damaged = whole.copy()
            damaged[rng.integers(0, min(len(whole), 200), 4)] = rng.integers(0, 256, 4)
            try:
                assert pictures.load(damaged.tobytes(), SIZE).shape == (SIZE, SIZE, 3)
            except BadPicture:
                pass


def test_pillow_prints_nothing(tmp_path):
    """In a fresh process, because pytest keeps warnings to itself."""
    (tmp_path / "palette.png").write_bytes(palette_with_transparency())
    (tmp_path / "large.png").write_bytes(large_png(10000))  # Pillow warns from 9459 pixels a side on
    program = (
        "import sys; from jpeglm_jax.data import pictures\n"
        "for path in sys.argv[1:]:\n"
        "  try: pictures.load(open(path, 'rb').read(), 32)\n"
        "  except pictures.BadPicture: pass\n"
    )
    paths = [tmp_path / "palette.png", tmp_path / "large.png"]
    result = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    assert result.stdout + result.stderr == ""

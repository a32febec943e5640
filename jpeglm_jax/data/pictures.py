"""Picture files to square RGB arrays."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
"""Formats that are read, with the endings of their files; some others that Pillow knows run programs."""

# Set once: `warnings.catch_warnings` is not safe with threads. What Pillow warns of is harmless or an error below.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadPicture(ValueError):
    """A file that is not a readable picture; the message is one line."""


def load(data: bytes | np.ndarray, size: int) -> np.ndarray:
    """The centre square of a picture, upright, in RGB, resized with a triangle filter.

    Args:
      data: a picture file, of which the first frame is taken, or uint8 (height, width, 3).
      size: pixels of a side of the result.

    Returns:
      uint8 (size, size, 3). Transparency lies on white; 16-bit grey is scaled to 8 bits.

    Raises:
      BadPicture: empty, cut, too large (20000x20000) or in no format of EXTENSIONS.
    """
    if isinstance(data, np.ndarray):
        return data if data.shape == (size, size, 3) else _square(Image.fromarray(data), size)
    if not data:
        raise BadPicture("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=list(EXTENSIONS)) as image:
            # Large JPEGs are decoded at 1/2, 1/4 or 1/8; at twice the size, resizing hides which.
            image.draft(None, (2 * size, 2 * size))
            ImageOps.exif_transpose(image, in_place=True)
            return _square(_rgb(image), size)
    except BadPicture:
        raise
    except UnidentifiedImageError as error:
        raise BadPicture(f"not a picture in a format that is read: {', '.join(EXTENSIONS)}") from error
    except Image.DecompressionBombError as error:
        raise BadPicture(f"too large: more than {2 * Image.MAX_IMAGE_PIXELS} pixels") from error
    except Exception as error:  # on damaged files Pillow's readers raise nearly any type: struct.error, SyntaxError
        raise BadPicture(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from error


def _square(image: Image.Image, size: int) -> np.ndarray:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips at 255
        samples = np.asarray(image).clip(0, 65535)
        return Image.fromarray((samples >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadPicture("floating-point samples have no agreed range: convert the picture to 8 or 16 bits")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")

"""Encoded images as 8-bit grey or colour pixels, whatever mode Pillow opens them in.

`Image.convert` destroys some images without a word: it saturates 16-bit and floating-point values, and uncovers the
colours below transparent pixels. Here values are scaled by the range of their mode, and transparent parts show
`BACKGROUND`.
"""

import io
import warnings
from typing import Any

import numpy as np
from PIL import ExifTags, Image

BACKGROUND = (255, 255, 255)
"""Colour behind transparent pixels: white, as web pages and viewers show them."""

# Modes of 8 bits or fewer per channel, with and without transparency, that Pillow converts to RGB without loss.
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")

# File formats whose integers Pillow scales to 16 bits, also where it opens them as 32-bit integers.
_SIXTEEN_BITS = ("PNG", "PPM")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(content: bytes | str, mode: str, *, stored_mode: str | None = None) -> Image.Image:
    """Decode an image upright, as its EXIF orientation says where that can be read.

    Args:
        content: the encoded image, or the path of a file that holds it.
        mode: 'L' or 'RGB'.
        stored_mode: mode that the data set declares for the column; of these 'L' and '1' lose colours.

    Raises:
        Exception: it cannot be decoded. Pillow's decoders share no base class of errors.
        ValueError: the values of its mode have no known range.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, which is not used
        if isinstance(content, str):
            with open(content, "rb") as file:
                image = _load(file)
        else:
            image = _load(io.BytesIO(content))
        if stored_mode in ("L", "1"):
            image = to_mode(image, "L").convert(stored_mode)
        return to_mode(image, mode)


def _load(file: Any) -> Image.Image:
    image = Image.open(file)
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the EXIF block is broken; the pixels are not
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format
    return turned


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert a decoded image to 'L' or 'RGB'.

    Raises:
        ValueError: an unknown mode, or values of a mode without a range of its own.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_eight_bits(image)
    elif image.mode not in _EIGHT_BITS:
        raise ValueError(f"mode is {image.mode!r}; allowed: {', '.join(_EIGHT_BITS)}, I;16, I, F")
    if image.has_transparency_data:
        image = _on_background(image)
    if image.mode == "LAB":
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale values of 16 bits, 32 bits or floating point to grey ones, with transparency where a value stands for it.

    Raises:
        ValueError: the range of the values cannot be told.
    """
    values, mode = np.asarray(image), image.mode
    low, high = values.min(), values.max()
    found = f"mode {mode!r} has values {low:g} to {high:g}"
    if mode.startswith("I;16") or (mode == "I" and image.format in _SIXTEEN_BITS):
        grey = (values.astype(np.uint32) + 128) // 257
    elif mode == "I":
        if not 0 <= low <= high <= 255:
            raise ValueError(f"{found}, whose range is unknown; allowed: 0 to 255, or images of 16 bits")
        grey = values
    elif 0 <= low <= high <= 1:  # not if there is a NaN
        grey = np.rint(values * np.float32(255))
    else:
        if not (0 <= low <= high <= 255 and (values == np.rint(values)).all()):
            allowed = "0 to 1, whole numbers of 0 to 255, or images of 8 or 16 bits"
            raise ValueError(f"{found}, whose range is unknown; allowed: {allowed}")
        grey = values
    scaled = Image.fromarray(grey.astype(np.uint8))
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return scaled
    return Image.merge("LA", (scaled, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))


def _on_background(image: Image.Image) -> Image.Image:
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")

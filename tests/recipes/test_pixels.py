"""Pixels of every mode of Pillow, against formulas in NumPy; broken metadata; decoders that raise anything."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from recipes.images.pixels import _EIGHT_BITS, decode_image, to_mode

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
LUMA = np.array([299, 587, 114]) / 1000


def encode(image, format="png", **arguments):
    image.save(buffer := io.BytesIO(), format, **arguments)
    return buffer.getvalue()


def over_white(colours, alpha):
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def with_alpha(image):
    image.putalpha(Image.fromarray(ALPHA))
    return image


def palette(colours=16):
    return Image.fromarray(COLOURS).quantize(colours)


def rgb_of(mode):
    """An image of a mode, and its colours on white by formula, (H, W, 3), with the tolerance of rounding."""
    colour, grey = Image.fromarray(COLOURS), COLOURS[..., 0]
    spread = np.repeat(grey[..., None], 3, 2)
    index = palette()
    table = np.array(index.getpalette()).reshape(-1, 3)[np.asarray(index)]
    hue = np.stack([grey // 2 + 60, np.full_like(grey, 0), grey], -1)  # without saturation: grey
    return {
        "1": lambda: (Image.fromarray(grey > 127), np.where(spread > 127, 255, 0), 0),
        "L": lambda: (Image.fromarray(grey), spread, 0),
        "LA": lambda: (with_alpha(Image.fromarray(grey)), over_white(spread, ALPHA), 1),
        "La": lambda: (with_alpha(Image.fromarray(grey)).convert("La"), over_white(spread, ALPHA), 3),
        "P": lambda: (index, table, 0),
        "PA": lambda: (index.convert("PA"), table, 0),
        "RGB": lambda: (colour, COLOURS, 0),
        "RGBA": lambda: (with_alpha(colour.copy()), over_white(COLOURS, ALPHA), 1),
        "RGBa": lambda: (with_alpha(colour.copy()).convert("RGBa"), over_white(COLOURS, ALPHA), 3),
        "RGBX": lambda: (colour.convert("RGBX"), COLOURS, 0),
        "CMYK": lambda: (Image.merge("CMYK", (*(ImageOps.invert(colour).split()), Image.new("L", (5, 6)))), COLOURS, 0),
        "YCbCr": lambda: (colour.convert("YCbCr"), COLOURS, 3),
        "LAB": lambda: (
            Image.merge("LAB", (Image.fromarray(grey), *2 * [Image.new("L", (5, 6), 128)])),
            grey_of_lightness(spread),
            2,
        ),
        "HSV": lambda: (Image.frombytes("HSV", (5, 6), hue.tobytes()), spread, 0),
    }[mode]()


def grey_of_lightness(lightness):
    """sRGB grey of CIE L*, stored as 0..255."""
    f = (lightness / 255 * 100 + 16) / 116
    linear = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", _EIGHT_BITS)
def test_modes_of_eight_bits_keep_their_colours_on_white(mode):
    image, colours, tolerance = rgb_of(mode)
    assert image.mode == mode
    seen = np.asarray(to_mode(image, "RGB"), dtype=float)
    assert seen.shape == (6, 5, 3) and abs(seen - colours).max() <= tolerance + 0.5
    grey = np.asarray(to_mode(image, "L"), dtype=float)
    assert grey.shape == (6, 5) and abs(grey - seen @ LUMA).max() <= 1


WIDE = (np.arange(30, dtype=np.uint16) * 2259).reshape(6, 5)  # 0 to 65511


@pytest.mark.parametrize("format", ["png", "tiff", "jpeg2000", "ppm"])
def test_sixteen_bits_are_scaled_by_their_range(format):
    image = Image.fromarray(WIDE)
    content = b"P5 5 6 65535\n" + WIDE.astype(">u2").tobytes() if format == "ppm" else encode(image, format)
    grey = np.asarray(decode_image(content, "L"), dtype=float)
    assert abs(grey - WIDE / 65535 * 255).max() <= 0.5 + (1 if format == "jpeg2000" else 0)
    assert np.array_equal(np.asarray(decode_image(content, "RGB"))[..., 1], grey)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_sixteen_bits_of_any_byte_order(mode):
    order = ">u2" if mode.endswith("B") else "<u2"
    image = Image.frombytes(mode, (5, 6), WIDE.astype(order).tobytes())
    assert np.array_equal(np.asarray(to_mode(image, "L")), np.rint(WIDE / 257))


def test_whole_numbers_in_floating_point_are_grey_values():
    values = np.arange(256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(np.asarray(decode_image(encode(Image.fromarray(values), "tiff"), "L")), values)


def test_floating_point_is_scaled_from_0_to_1():
    values = np.linspace(0, 1, 30, dtype=np.float32).reshape(6, 5)
    content = encode(Image.fromarray(values), "tiff")
    assert np.array_equal(np.asarray(decode_image(content, "L")), np.rint(values.astype(float) * 255))


def test_integers_of_thirty_two_bits_that_are_eight_bits_are_kept():
    values = COLOURS[..., 0].astype(np.int32)
    assert np.array_equal(np.asarray(decode_image(encode(Image.fromarray(values), "tiff"), "L")), values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0.0, 256.0]], np.float32), "mode 'F' has values 0 to 256"),
        (np.array([[0.0, 3.5, 255.0]], np.float32), "mode 'F' has values 0 to 255"),
        (np.array([[-0.5, 0.5]], np.float32), "mode 'F' has values -0.5 to 0.5"),
        (np.array([[np.nan, 0.5]], np.float32), "mode 'F' has values nan"),
        (np.array([[0, 70000]], np.int32), "mode 'I' has values 0 to 70000"),
        (np.array([[-1, 5]], np.int32), "mode 'I' has values -1 to 5"),
    ],
)
def test_values_of_unknown_range_are_refused(values, message):
    with pytest.raises(ValueError, match=f"{message}.*allowed: 0 to"):
        decode_image(encode(Image.fromarray(values), "tiff"), "RGB")


def test_an_unknown_mode_is_refused():
    image = Image.new("L", (2, 2))
    image._mode = "BGR;15"
    with pytest.raises(ValueError, match="mode is 'BGR;15'; allowed: 1, L, "):
        to_mode(image, "RGB")


@pytest.mark.parametrize(
    ("image", "clear"),
    [
        (Image.fromarray(COLOURS[..., 0]), int(COLOURS[2, 3, 0])),
        (Image.fromarray(COLOURS), tuple(map(int, COLOURS[2, 3]))),
        (Image.fromarray(WIDE), int(WIDE[2, 3])),
        (palette(), int(np.asarray(palette())[2, 3])),
    ],
    ids=["L", "RGB", "I;16", "P"],
)
def test_a_colour_that_stands_for_nothing_is_white(image, clear):
    opaque = np.asarray(decode_image(encode(image), "RGB"))
    seen = np.asarray(decode_image(encode(image, transparency=clear), "RGB"))
    raw = np.asarray(image)
    hidden = (raw == clear).all(-1) if raw.ndim == 3 else raw == clear
    assert hidden[2, 3] and not hidden.all() and not (opaque[hidden] == 255).all()
    assert (seen[hidden] == 255).all() and np.array_equal(seen[~hidden], opaque[~hidden])


def test_images_without_transparency_are_not_copied():
    image = Image.fromarray(COLOURS)
    assert to_mode(image, "RGB") is image


@pytest.mark.parametrize("turn", range(1, 9))
def test_images_stand_upright(turn):
    image = Image.fromarray(np.kron(COLOURS, np.ones((8, 8, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = turn
    content = encode(image, "jpeg", exif=exif, quality=95)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.asarray(decode_image(content, "RGB")), np.asarray(wanted.convert("RGB")))


def exif(*entries):
    """An EXIF block of (tag, type, count, content)."""
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    return block + b"".join(struct.pack("<HHI4s", *entry) for entry in entries) + bytes(4)


TURNED = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize("entry", [(0x011A, 2, 4, b"72\0\0"), (0x0100, 2, 4, b"abc\0")])
def test_an_image_stands_upright_beside_a_number_stored_as_text(entry):
    image = Image.fromarray(np.kron(COLOURS, np.ones((8, 8, 1), np.uint8)))
    content = encode(image, "jpeg", exif=exif(TURNED, entry), quality=95)
    with pytest.raises((TypeError, struct.error)):
        ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    seen = np.asarray(decode_image(content, "RGB"), dtype=float)
    assert abs(seen - np.rot90(np.asarray(image), -1)).mean() < 12


@pytest.mark.parametrize("block", [exif(TURNED)[:14], b"Exif\0\0no TIFF", exif((0x0112, 2, 2, b"6\0\0\0"))])
def test_an_image_whose_orientation_cannot_be_read_is_kept_as_it_is(block):
    image = Image.fromarray(np.kron(COLOURS, np.ones((8, 8, 1), np.uint8)))
    seen = np.asarray(decode_image(encode(image, "jpeg", exif=block, quality=95), "RGB"), dtype=float)
    assert abs(seen - np.asarray(image)).mean() < 12


@pytest.mark.parametrize("error", [struct.error, TypeError, SyntaxError, NotImplementedError])
def test_no_error_of_metadata_loses_an_image(monkeypatch, error):
    def broken(image):
        raise error("broken")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    assert np.array_equal(np.asarray(decode_image(encode(Image.fromarray(COLOURS)), "RGB")), COLOURS)


def test_the_grey_mode_that_a_column_declares_is_kept():
    content = encode(Image.fromarray(COLOURS))
    grey = np.asarray(decode_image(content, "RGB", stored_mode="L"), dtype=float)
    assert np.ptp(grey, axis=2).max() == 0 and abs(grey[..., 0] - COLOURS @ LUMA).max() <= 1
    assert np.array_equal(np.asarray(decode_image(content, "RGB", stored_mode="RGB")), COLOURS)

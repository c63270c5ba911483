"""Pictures whose right pixels are known, and bytes that are no picture."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rayrec.config import ImageConfig
from rayrec.data.images import ImageRejected, decode

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)
SMALL = ImageConfig(size=16)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def halves(left: tuple[int, ...], right: tuple[int, ...], mode: str = "RGB", size: int = 16) -> Image.Image:
    """A square, its left half of one colour and its right half of another."""
    image = Image.new(mode, (size, size), left)
    image.paste(right, (size // 2, 0, size, size))
    return image


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def reason(data: bytes, config: ImageConfig = SMALL) -> str:
    with pytest.raises(ImageRejected) as rejected:
        decode(data, config)
    return rejected.value.reason


# ---------------------------------------------------------------- colours and modes


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_exact_formats_keep_every_pixel(format: str) -> None:
    image = halves(RED, BLUE)
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(decode(encoded(image, format, **options), SMALL), np.asarray(image))


def test_jpeg_keeps_colours_nearly() -> None:
    pixels = decode(encoded(halves(RED, BLUE, size=64), "JPEG", quality=95), SMALL)
    assert np.abs(pixels[8, 2].astype(int) - RED).max() < 8
    assert np.abs(pixels[8, 13].astype(int) - BLUE).max() < 8


def test_transparency_is_laid_over_white() -> None:
    pixels = decode(encoded(halves((255, 0, 0, 255), (0, 0, 255, 0), "RGBA")), SMALL)
    assert tuple(pixels[0, 0]) == RED
    assert tuple(pixels[0, 15]) == WHITE


def test_half_transparency_mixes_with_white() -> None:
    pixels = decode(encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 51))), SMALL)
    assert np.unique(pixels).tolist() == [204]  # 255 * (1 - 51 / 255)


def test_colour_below_full_transparency_does_not_bleed_when_shrunk() -> None:
    image = halves((255, 0, 0, 255), (0, 0, 255, 0), "RGBA", size=64)
    pixels = decode(encoded(image), SMALL).astype(int)
    assert (pixels[..., 2] <= pixels[..., 1] + 1).all()  # white mixed into red, no blue


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (8, 0, 16, 16))
    pixels = decode(encoded(image, transparency=1), SMALL)
    assert tuple(pixels[0, 0]) == RED
    assert tuple(pixels[0, 15]) == WHITE


def test_true_colour_png_with_a_transparent_colour() -> None:
    pixels = decode(encoded(halves(RED, BLUE), transparency=BLUE), SMALL)
    assert tuple(pixels[0, 0]) == RED
    assert tuple(pixels[0, 15]) == WHITE


@pytest.mark.parametrize(("mode", "black", "white"), [("1", 0, 1), ("L", 0, 255), ("LA", (0, 255), (255, 255))])
def test_grey_becomes_three_equal_channels(mode: str, black: object, white: object) -> None:
    image = Image.new(mode, (16, 16), black)
    image.paste(white, (8, 0, 16, 16))
    pixels = decode(encoded(image), SMALL)
    assert tuple(pixels[0, 0]) == (0, 0, 0)
    assert tuple(pixels[0, 15]) == WHITE


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_high_byte(format: str) -> None:
    grey = np.full((16, 16), 0x80FF, np.uint16)
    grey[:, 8:] = 0xFFFF
    pixels = decode(encoded(Image.fromarray(grey), format), SMALL)
    assert pixels[0, 0].tolist() == [0x80] * 3
    assert pixels[0, 15].tolist() == [255] * 3


@pytest.mark.parametrize(("value", "expected"), [(0.5, 127), (100.0, 100), (1000.0, 255), (float("nan"), 0)])
def test_grey_of_floats_is_read_as_unit_range_unless_larger(value: float, expected: int) -> None:
    image = Image.fromarray(np.full((16, 16), value, np.float32))
    assert np.unique(decode(encoded(image, "TIFF"), SMALL)).tolist() == [expected]


def test_cmyk_jpeg_keeps_its_colours() -> None:
    pixels = decode(encoded(halves(RED, WHITE, size=64).convert("CMYK"), "JPEG", quality=95), SMALL)
    assert np.abs(pixels[8, 2].astype(int) - RED).max() < 12
    assert np.abs(pixels[8, 13].astype(int) - WHITE).max() < 12


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100, **options)
    assert np.unique(decode(data, SMALL).reshape(-1, 3), axis=0).tolist() == [list(RED)]


# ---------------------------------------------------------------- turning and fitting


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_undone(format: str, orientation: int) -> None:
    """The four quarters of the upright picture are black, red, green, blue; each file stores it turned."""
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32, 32:], upright[32:, :32], upright[32:, 32:] = RED, GREEN, BLUE
    store: dict[int, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),  # to be shown it is turned clockwise
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(store[orientation](upright))), format, exif=exif)
    pixels = decode(data, SMALL).astype(int)
    for row, column, colour in [(3, 3, (0, 0, 0)), (3, 12, RED), (12, 3, GREEN), (12, 12, BLUE)]:
        assert np.abs(pixels[row, column] - colour).max() < 16


def test_a_broken_exif_block_does_not_cost_the_picture() -> None:
    data = encoded(halves(RED, BLUE), "PNG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff\x01")
    np.testing.assert_array_equal(decode(data, SMALL), np.asarray(halves(RED, BLUE)))


def test_letterbox_keeps_the_aspect_and_pads_with_white() -> None:
    pixels = decode(encoded(Image.new("RGB", (32, 8), RED)), SMALL)
    assert (pixels[:6] == 255).all()
    assert (pixels[6:10] == RED).all()
    assert (pixels[10:] == 255).all()


def test_stretch_fills_the_square() -> None:
    pixels = decode(encoded(Image.new("RGB", (32, 8), RED)), ImageConfig(size=16, fit="stretch"))
    assert (pixels == RED).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (7, 5)])
@pytest.mark.parametrize("denoise", ["none", "median", "gaussian"])
def test_odd_sizes(size: tuple[int, int], denoise: str) -> None:
    config = ImageConfig(size=16, fit="letterbox", denoise=denoise, denoise_width=5)
    pixels = decode(encoded(Image.new("RGB", size, RED)), config)
    assert pixels.shape == (16, 16, 3)
    assert (pixels == RED).all(axis=-1).any()


def test_shrinking_averages() -> None:
    checkerboard = np.indices((64, 64)).sum(axis=0) % 2 * 255
    pixels = decode(encoded(Image.fromarray(checkerboard.astype(np.uint8))), SMALL)
    assert np.abs(pixels[4:12, 4:12].astype(int) - 127).max() <= 2


def test_median_removes_a_speck_and_keeps_an_edge() -> None:
    image = halves(RED, BLUE)
    image.putpixel((3, 3), WHITE)
    pixels = decode(encoded(image), ImageConfig(size=16, denoise="median", denoise_width=3))
    np.testing.assert_array_equal(pixels, np.asarray(halves(RED, BLUE)))


def test_gaussian_spreads_a_speck() -> None:
    image = Image.new("RGB", (16, 16))
    image.putpixel((8, 8), WHITE)
    pixels = decode(encoded(image), ImageConfig(size=16, denoise="gaussian", denoise_width=1))
    assert 20 < pixels[8, 8, 0] < 80  # a Gaussian of sigma 1 has 255 / (2 pi) = 41 at its middle
    assert pixels[8, 9, 0] > pixels[8, 10, 0] > 0
    assert pixels[0, 0, 0] == 0


def test_the_result_does_not_depend_on_the_size_a_jpeg_is_drafted_at() -> None:
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp, (1024, 1024)))
    from_jpeg = decode(encoded(image, "JPEG", quality=95), SMALL).astype(int)
    from_png = decode(encoded(image, "PNG"), SMALL).astype(int)
    assert np.abs(from_jpeg - from_png).max() <= 3


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"hello, I am a picture", "not_an_image"),
        (b"<html><body>404 Not Found</body></html>", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not_an_image"),
        (b"\xff\xd8\xff", "not_an_image"),
        (b"\0" * 1000, "not_an_image"),
    ],
)
def test_no_picture(data: bytes, expected: str) -> None:
    assert reason(data) == expected


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_file(format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), format)
    assert reason(data[: int(len(data) * share)]) == "truncated"


def test_the_pixel_limit_is_the_setting() -> None:
    data = encoded(Image.new("RGB", (20, 10)))
    assert decode(data, ImageConfig(size=16, max_pixels=200)).shape == (16, 16, 3)
    assert reason(data, ImageConfig(size=16, max_pixels=199)) == "too_many_pixels"


@pytest.mark.parametrize("size", [(10_000, 10_000), (12_000, 12_000), (40_000, 25_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_without_a_warning(size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(png_header(*size)) == "too_many_pixels"


def test_a_bomb_costs_neither_time_nor_memory() -> None:
    """A header of 10^9 pixels, which would take 3 GB decoded, in a fresh process whose peak memory is measured."""
    code = (
        "import sys, time, resource\n"
        "from rayrec.config import ImageConfig\n"
        "from rayrec.data.images import ImageRejected, decode\n"
        "data = sys.stdin.buffer.read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "started = time.perf_counter()\n"
        "try: decode(data, ImageConfig())\n"
        "except ImageRejected as rejected: print(rejected.reason)\n"
        "print(time.perf_counter() - started)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], input=png_header(40_000, 25_000), capture_output=True, check=True
    )
    rejected, seconds, grown_kib = ran.stdout.decode().split()
    assert rejected == "too_many_pixels"
    assert float(seconds) < 1
    assert int(grown_kib) < 64 * 1024


# ---------------------------------------------------------------- any bytes


def picture_or_rejected(data: bytes) -> None:
    config = ImageConfig(size=16, max_pixels=1_000_000)
    outcome: object
    try:
        pixels = decode(data, config)
        outcome = pixels.shape, pixels.dtype
    except ImageRejected as rejected:
        outcome = rejected.reason
    picture = ((16, 16, 3), np.uint8)
    assert outcome in [picture, "empty", "not_an_image", "too_many_pixels", "truncated", "broken"]


@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    picture_or_rejected(data)


MAGIC = [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF\x40\0\0\0WEBPVP8 "]


@given(st.sampled_from(MAGIC), st.binary(max_size=300))
def test_random_bytes_after_a_magic_number(magic: bytes, data: bytes) -> None:
    picture_or_rejected(magic + data)


_noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), np.uint8))
_exif = Image.Exif()
_exif[0x0112] = 6
SEEDS = [
    encoded(_noise, "JPEG", exif=_exif),
    encoded(_noise, "PNG", exif=_exif),
    encoded(_noise, "WEBP"),
    encoded(_noise, "TIFF"),
    encoded(_noise.quantize(16), "GIF"),
    encoded(_noise.convert("CMYK"), "JPEG"),
]


@settings(max_examples=400)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
    st.floats(0.5, 1),
)
def test_mutated_pictures(seed: bytes, changes: list[tuple[float, int]], keep: float) -> None:
    data = bytearray(seed)
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    picture_or_rejected(bytes(data[: max(1, int(len(data) * keep))]))


@pytest.mark.realdata
def test_real_photos(shared_data: Callable[[str], Path]) -> None:
    files = sorted((shared_data("hm_day1") / "images").glob("*.jpg"))[:200]
    shapes = {decode(file.read_bytes(), ImageConfig()).shape for file in files}
    assert shapes == {(128, 128, 3)}

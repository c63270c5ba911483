"""Product pictures: the bytes of a file to a small square RGB array, or the reason why not.

In: bytes that claim to be a picture. Out: [size, size, 3] uint8. It must not know items, files or Ray.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, UnidentifiedImageError

from rayrec.config import ImageConfig

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is tried; the other decoders of Pillow are old, rare, or start programs (EPS)."""

WHITE = (255, 255, 255)
JPEG_QUALITY = 88

_ORIENTATION_TAG = 0x0112
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation (EXIF 2.3, tag 0x0112)."""


class ImageRejected(Exception):  # noqa: N818 - an outcome, counted and reported, rather than an error
    """A picture that cannot be used. `reason` is one of empty, not_an_image, too_many_pixels, truncated, broken."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(data: bytes, config: ImageConfig) -> npt.NDArray[np.uint8]:
    """Decode a picture to [size, size, 3] uint8 RGB.

    The first frame of an animation; turned as its EXIF says; transparency over white; 16-bit grey down to 8 bits.
    Raises ImageRejected, whatever the bytes; a picture of too many pixels is refused from its header, unread.
    """
    with _rejecting():
        return _fitted(_read(data, config.max_pixels, config.size), config)


def as_jpeg(data: bytes, side: int, max_pixels: int) -> bytes:
    """A picture as a JPEG of at most `side` pixels a side, with nothing but its pixels. Raises as `decode`."""
    with _rejecting():
        image = _over_white(_read(data, max_pixels, side))
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=JPEG_QUALITY)
        return stream.getvalue()


@contextmanager
def _rejecting() -> Iterator[None]:
    """Raise ImageRejected for whatever goes wrong with a picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes within our own limit, and of broken EXIF blocks
            yield
    except ImageRejected:
        raise
    except UnidentifiedImageError:
        raise ImageRejected("not_an_image") from None
    except (Image.DecompressionBombError, MemoryError):
        raise ImageRejected("too_many_pixels") from None
    except Exception as error:  # Pillow's decoders raise errors of every kind on hostile bytes
        raise ImageRejected("truncated" if "truncated" in str(error) else "broken") from error


def _read(data: bytes, max_pixels: int, size: int) -> Image.Image:
    """The picture, upright, RGB or RGBA, to be resized to `size`. Raises ImageRejected if it is empty or too large."""
    if not data:
        raise ImageRejected("empty")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > max_pixels:
        raise ImageRejected("too_many_pixels")
    # A JPEG decodes several times faster to a fraction of its size; twice ours leaves the resize something to average.
    image.draft(None, (2 * size, 2 * size))
    image.load()
    return _upright(_rgb_or_rgba(image))


def _rgb_or_rgba(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _eight_bit_grey(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, read as 0..65535, or of floats, read as 0..1 if none is larger, else as 0..255."""
    grey = np.nan_to_num(np.asarray(image, np.float64))
    if image.mode != "F":
        grey = grey // 256
    elif grey.max() <= 1:
        grey = grey * 255
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURN.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels, which are good
        turn = None
    return image if turn is None else image.transpose(turn)


def _fitted(image: Image.Image, config: ImageConfig) -> npt.NDArray[np.uint8]:
    """An RGB or RGBA picture resized, denoised, and laid centred on a white square."""
    size = config.size
    width, height = size, size
    if config.fit == "letterbox":
        scale = size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size), WHITE)
    place = ((size - width) // 2, (size - height) // 2)
    square.paste(_denoised(_over_white(image), config), place)
    return np.asarray(square)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    white = Image.new("RGB", image.size, WHITE)
    white.paste(image, mask=image.getchannel("A"))
    return white


def _denoised(image: Image.Image, config: ImageConfig) -> Image.Image:
    if config.denoise == "median":
        return image.filter(ImageFilter.MedianFilter(int(config.denoise_width) | 1))
    if config.denoise == "gaussian":
        return image.filter(ImageFilter.GaussianBlur(config.denoise_width))
    return image

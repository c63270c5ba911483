"""Product pictures of the sample shop, drawn so that a glance tells what the item is.

In: an item's category, colour, style, material, brand and tier (indices into the tables of `sample_world`) and a
seed. Out: an RGB image. It must not know visitors, files, or why anyone likes a thing.

Shape tells the category, fill the colour, pattern the style, fabric the material, a small label the brand, and the
backdrop the tier. Shapes are drawn on a square of 100 x 100 units, at twice the size asked for, then averaged down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Mask = Image.Image
Pixels = npt.NDArray[np.float32]
Points = list[tuple[float, float]]

_SAMPLES: Final = 2  # drawn pixels per pixel and side

PALETTE: Final = (
    (208, 38, 46), (240, 128, 32), (246, 205, 52), (52, 148, 76), (44, 100, 190),
    (122, 68, 168), (242, 138, 176), (128, 80, 48), (44, 44, 50), (240, 238, 232),
)  # fmt: skip
"""RGB of sample_world.COLOURS."""
_INK: Final = (
    (255, 236, 220), (255, 244, 214), (120, 72, 20), (222, 244, 206), (220, 234, 255),
    (238, 214, 255), (150, 30, 84), (240, 214, 170), (214, 214, 220), (70, 84, 112),
)  # fmt: skip
"""RGB of the pattern on each colour."""
_BACKDROP: Final = ((232, 240, 246), (250, 250, 250), (250, 238, 214))
"""RGB behind a budget, a middling and a premium item."""
_LABEL: Final = (
    (20, 20, 24), (0, 92, 150), (214, 60, 40), (16, 120, 96), (246, 190, 40), (120, 40, 110),
    (40, 100, 40), (250, 250, 240), (180, 20, 60), (90, 60, 30), (150, 150, 160), (10, 40, 90),
)  # fmt: skip
"""RGB of each brand's label."""


@dataclass(frozen=True)
class Look:
    """All that is visible of an item: indices into the tables of `sample_world`."""

    category: int
    colour: int
    style: int
    material: int
    brand: int
    tier: int


class Canvas:
    """A mask on which shapes are drawn in units of a hundredth of its side."""

    def __init__(self, side: int) -> None:
        self.unit = side / 100
        self.mask = Image.new("L", (side, side), 0)
        self._draw = ImageDraw.Draw(self.mask)

    def polygon(self, points: Points, fill: int = 255) -> Canvas:
        """A filled polygon."""
        self._draw.polygon([(x * self.unit, y * self.unit) for x, y in points], fill=fill)
        return self

    def curve(self, points: Points, fill: int = 255) -> Canvas:
        """A filled closed curve through the points (Catmull-Rom)."""
        return self.polygon(smooth(points), fill)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: int = 255) -> Canvas:
        """A filled ellipse in a box."""
        self._draw.ellipse([v * self.unit for v in (x0, y0, x1, y1)], fill=fill)
        return self

    def box(self, x0: float, y0: float, x1: float, y1: float, round_: float = 0, fill: int = 255) -> Canvas:
        """A filled rectangle with round corners."""
        corners = [v * self.unit for v in (x0, y0, x1, y1)]
        self._draw.rounded_rectangle(corners, radius=round_ * self.unit, fill=fill)
        return self

    def line(self, points: Points, width: float, fill: int = 255) -> Canvas:
        """A stroke with round joints."""
        scaled = [(x * self.unit, y * self.unit) for x, y in points]
        self._draw.line(scaled, fill=fill, width=max(1, round(width * self.unit)), joint="curve")
        return self

    def ring(self, x0: float, y0: float, x1: float, y1: float, width: float) -> Canvas:
        """The outline of an ellipse."""
        box = [v * self.unit for v in (x0, y0, x1, y1)]
        self._draw.ellipse(box, outline=255, width=max(1, round(width * self.unit)))
        return self


def smooth(points: Points, steps: int = 12) -> Points:
    """A closed Catmull-Rom curve through the points."""
    p = np.array(points)
    before, after, second = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = (np.arange(steps) / steps)[None, :, None]
    a, b, c, d = (v[:, None, :] for v in (before, p, after, second))
    path = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return [(float(x), float(y)) for x, y in path.reshape(-1, 2)]


@dataclass(frozen=True)
class Shape:
    """One silhouette: the patterned body, plain trim in a darker or a given tone, and where the label sits."""

    body: Callable[[Canvas], Canvas]
    trim: Callable[[Canvas], Canvas]
    trim_rgb: tuple[int, int, int] | None
    label: tuple[float, float]


_METAL, _WOOD, _SOLE, _PAPER = (186, 190, 198), (150, 112, 74), (246, 244, 238), (252, 250, 244)


def _shoe(c: Canvas) -> Canvas:
    return c.curve([(12, 70), (10, 48), (15, 29), (24, 33), (36, 28), (45, 38), (58, 49), (78, 54), (90, 62), (90, 71)])


def _shoe_trim(c: Canvas) -> Canvas:
    c.box(9, 67, 93, 77, 4)
    for x, y in ((40, 38), (46, 43), (52, 48)):
        c.line([(x - 4, y + 8), (x + 5, y - 1)], 2.2)
    return c


def _socks(c: Canvas) -> Canvas:
    for dx in (0, 32):
        c.curve(
            [(18 + dx, 16), (38 + dx, 16), (38 + dx, 52), (48 + dx, 68), (48 + dx, 82), (34 + dx, 84), (20 + dx, 66)]
        )
    return c


def _socks_trim(c: Canvas) -> Canvas:
    return c.box(16, 14, 40, 24, 3).box(48, 14, 72, 24, 3)


def _polish(c: Canvas) -> Canvas:
    return c.ellipse(12, 52, 88, 84).box(12, 44, 88, 68).ellipse(12, 28, 88, 60)


def _polish_trim(c: Canvas) -> Canvas:
    return c.ring(12, 28, 88, 60, 3).line([(12, 56), (12, 68)], 2).line([(88, 56), (88, 68)], 2)


def _shirt(c: Canvas) -> Canvas:
    return c.polygon(
        [(36, 16), (44, 22), (56, 22), (64, 16), (78, 22), (93, 44), (80, 53), (73, 43), (73, 87), (27, 87), (27, 43),
         (20, 53), (7, 44), (22, 22)]
    )  # fmt: skip


def _shirt_trim(c: Canvas) -> Canvas:
    c.polygon([(36, 15), (50, 24), (42, 33)]).polygon([(64, 15), (50, 24), (58, 33)])
    for y in (42, 54, 66, 78):
        c.ellipse(48.2, y, 51.8, y + 3.6)
    return c


def _hat(c: Canvas) -> Canvas:
    return c.ellipse(6, 60, 94, 82).curve(
        [(26, 70), (29, 34), (42, 25), (50, 29), (58, 25), (71, 34), (74, 70), (50, 76)]
    )


def _hat_trim(c: Canvas) -> Canvas:
    return c.polygon([(26.5, 56), (50, 62), (73.5, 56), (74, 67), (50, 73), (26, 67)])


def _scarf(c: Canvas) -> Canvas:
    c.curve([(24, 24), (50, 14), (76, 24), (76, 40), (50, 48), (24, 40)])
    return c.polygon([(28, 36), (47, 42), (44, 84), (22, 82)]).polygon([(54, 42), (72, 36), (78, 88), (58, 90)])


def _scarf_trim(c: Canvas) -> Canvas:
    for x in range(23, 45, 4):
        c.line([(x, 82), (x - 0.6, 91)], 1.7)
    for x in range(59, 79, 4):
        c.line([(x, 88), (x + 0.6, 96)], 1.7)
    return c.curve([(34, 28), (50, 24), (66, 28), (50, 34)])


def _bag(c: Canvas) -> Canvas:
    return c.polygon([(17, 40), (83, 40), (90, 86), (10, 86)]).box(10, 78, 90, 89, 5)


def _bag_trim(c: Canvas) -> Canvas:
    arc = [(32 + 36 * t, 42 - 92 * t * (1 - t)) for t in np.linspace(0, 1, 24)]
    return c.line(arc, 5).box(16, 39, 84, 45, 2)


def _mug(c: Canvas) -> Canvas:
    return c.box(18, 26, 68, 84, 8).ellipse(18, 20, 68, 36)


def _mug_trim(c: Canvas) -> Canvas:
    return c.ring(58, 36, 90, 72, 7).ellipse(22, 22.5, 64, 33)


def _tea(c: Canvas) -> Canvas:
    return c.box(24, 32, 76, 90, 4)


def _tea_trim(c: Canvas) -> Canvas:
    return c.box(22, 16, 78, 34, 5).ellipse(42, 10, 58, 20)


def _lamp(c: Canvas) -> Canvas:
    return c.polygon([(34, 12), (66, 12), (84, 54), (16, 54)])


def _lamp_trim(c: Canvas) -> Canvas:
    return c.box(47, 54, 53, 82, 1).ellipse(30, 80, 70, 92)


def _candle(c: Canvas) -> Canvas:
    return c.box(30, 40, 70, 88, 5).ellipse(30, 34, 70, 47)


def _candle_trim(c: Canvas) -> Canvas:
    return c.line([(50, 41), (50, 31)], 2).curve([(50, 8), (57, 22), (54, 31), (46, 31), (43, 22)])


def _soap(c: Canvas) -> Canvas:
    return c.box(14, 40, 86, 74, 16)


def _soap_trim(c: Canvas) -> Canvas:
    return c.ellipse(66, 18, 80, 32).ellipse(54, 26, 62, 34).ellipse(80, 30, 86, 36).box(40, 39, 60, 75, 0)


SHAPES: Final = (
    Shape(_shoe, _shoe_trim, _SOLE, (24, 52)),
    Shape(_socks, _socks_trim, None, (28, 40)),
    Shape(_polish, _polish_trim, _METAL, (50, 44)),
    Shape(_shirt, _shirt_trim, None, (63, 44)),
    Shape(_hat, _hat_trim, None, (64, 63)),
    Shape(_scarf, _scarf_trim, None, (67, 80)),
    Shape(_bag, _bag_trim, _WOOD, (50, 60)),
    Shape(_mug, _mug_trim, None, (43, 58)),
    Shape(_tea, _tea_trim, _METAL, (50, 62)),
    Shape(_lamp, _lamp_trim, _WOOD, (50, 86)),
    Shape(_candle, _candle_trim, (252, 176, 60), (50, 66)),
    Shape(_soap, _soap_trim, _PAPER, (50, 57)),
)
"""In the order of sample_world.CATEGORIES."""


def draw(look: Look, size: int, seed: int) -> Image.Image:
    """An RGB picture of `size` x `size` pixels. The seed moves pattern, place and scale a little."""
    rng = np.random.default_rng(seed)
    side = size * _SAMPLES
    shape, studio = SHAPES[look.category], _studio(look.category, side)
    rgb = np.array(PALETTE[look.colour], np.float32)
    trim_rgb = np.array(shape.trim_rgb, np.float32) if shape.trim_rgb else rgb * 0.62 + 16
    paint = Image.new("RGB", (side, side), _BACKDROP[look.tier])
    paint.paste((70, 74, 84), mask=studio.shadow)
    paint.paste(_fill(look, studio.body_light, rng), mask=studio.body)
    paint.paste(_lit(trim_rgb, studio.trim_light), mask=studio.trim)
    _label(paint, shape.label, look, side)
    return _placed(paint, _BACKDROP[look.tier], rng).resize((size, size), Image.Resampling.BOX)


@dataclass(frozen=True)
class _Studio:
    """What all pictures of a category share: masks, the light on them (in [side, side], about 1), the shadow."""

    body: Mask
    trim: Mask
    body_light: Pixels
    trim_light: Pixels
    shadow: Mask


@lru_cache(maxsize=len(SHAPES))
def _studio(category: int, side: int) -> _Studio:
    body, trim = SHAPES[category].body(Canvas(side)).mask, SHAPES[category].trim(Canvas(side)).mask
    moved = ImageChops.offset(ImageChops.lighter(body, trim), round(side * 0.02), round(side * 0.03))
    shadow = moved.filter(ImageFilter.GaussianBlur(side / 32)).point(lambda v: v * 0.42)
    return _Studio(body, trim, _light(body), _light(trim), shadow)


def _light(mask: Mask) -> Pixels:
    """Light from the upper left, less towards the edge of the mask."""
    x, y = _grid(mask.size[0])
    soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(mask.size[0] / 22)), np.float32) / 255
    return np.asarray((0.72 + 0.34 * soft) * (1.10 - 0.0012 * x - 0.0018 * y), np.float32)


def _lit(colour: Pixels, light: Pixels) -> Image.Image:
    return Image.fromarray(np.minimum(colour * light[:, :, None], 255).astype(np.uint8))


def _grid(side: int) -> tuple[Pixels, Pixels]:
    """x [1, side] and y [side, 1] in units."""
    at = np.arange(side, dtype=np.float32) * np.float32(100 / side)
    return at[None, :], at[:, None]


def _fill(look: Look, light: Pixels, rng: np.random.Generator) -> Image.Image:
    """The colour under its pattern, in the weave of its material and the light."""
    side = len(light)
    rgb, ink = np.array(PALETTE[look.colour], np.float32), np.array(_INK[look.colour], np.float32)
    shade, amount = light * weave(look.material, side), pattern(look.style, side, rng)
    return _lit(rgb, shade) if look.style == 0 else _lit(rgb + (ink - rgb) * amount[:, :, None], shade)


def pattern(style: int, side: int, rng: np.random.Generator) -> Pixels:
    """[side, side] in 0..1: where the pattern of a style (sample_world.STYLES) lies."""
    x, y = _grid(side)
    x, y = x + np.float32(rng.uniform(0, 16)), y + np.float32(rng.uniform(0, 16))
    flat = np.zeros((side, side), np.float32)
    if style == 1:  # stripes
        return flat + (y % 12 < 4.5)
    if style == 2:  # dots, every other row shifted
        shifted = x + 6 * (y // 11 % 2)
        return ((shifted % 12 - 6) ** 2 + (y % 11 - 5.5) ** 2 < 3.0**2).astype(np.float32)
    if style == 3:  # gingham
        return 0.45 * (x % 16 < 8) + 0.45 * (y % 16 < 8)
    if style == 4:  # zigzag
        return ((y + np.abs(x % 14 - 7)) % 12 < 4.5).astype(np.float32)
    if style == 5:  # five-petalled flowers
        dx, dy = (x + 10 * (y // 18 % 2)) % 20 - 10, y % 18 - 9
        radius, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
        return ((radius < 4.6 + 2.4 * np.cos(5 * angle)) & (radius > 1.6)).astype(np.float32)
    return flat


def weave(material: int, side: int) -> Pixels:
    """[side, side] about 1: a coarse cloth, a smooth face, or a ribbed knit."""
    x, y = _grid(side)
    if material == 0:
        return 1 + 0.07 * np.sign(np.sin(x * 1.6) * np.sin(y * 1.6))
    if material == 1:
        return np.ones((side, side), np.float32)
    return np.broadcast_to(1 + 0.09 * np.sin(x * 1.5), (side, side))


def _label(paint: Image.Image, centre: tuple[float, float], look: Look, side: int) -> None:
    """The brand's label: square, round, diamond or wide by brand, in its colour, edged white."""
    x, y = centre
    form = look.brand % 4
    for grow, rgb in ((1.2, (250, 250, 250)), (0.0, _LABEL[look.brand])):
        c, r = Canvas(side), 4.6 + grow
        if form == 0:
            c.box(x - r, y - r, x + r, y + r, 1)
        elif form == 1:
            c.ellipse(x - r, y - r, x + r, y + r)
        elif form == 2:
            c.polygon([(x, y - r - 1), (x + r + 1, y), (x, y + r + 1), (x - r - 1, y)])
        else:
            c.box(x - r - 3, y - r + 2, x + r + 3, y + r - 2, 2)
        paint.paste(rgb, mask=c.mask)


def _placed(paint: Image.Image, backdrop: tuple[int, int, int], rng: np.random.Generator) -> Image.Image:
    """A little smaller, turned and moved, as no two photographs are alike."""
    side = paint.size[0]
    scale, angle = rng.uniform(1.02, 1.16), rng.uniform(-4, 4)
    dx, dy = rng.uniform(-0.03, 0.03, 2) * side
    cos, sin = scale * np.cos(np.radians(angle)), scale * np.sin(np.radians(angle))
    middle = side / 2
    matrix = (cos, sin, middle - cos * (middle + dx) - sin * (middle + dy),
              -sin, cos, middle + sin * (middle + dx) - cos * (middle + dy))  # fmt: skip
    return paint.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=backdrop)

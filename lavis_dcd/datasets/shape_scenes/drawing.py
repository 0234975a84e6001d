"""Draw a scene with PIL: anti-aliased, on a varied background, with jitter in place, hue, size and rotation."""

from __future__ import annotations

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

from lavis_dcd.datasets.shape_scenes.scenes import Scene, Thing

_SUPERSAMPLE = 4
_GRADIENT = 32
_HUES = {"red": 0, "orange": 27, "yellow": 54, "green": 120, "cyan": 181, "blue": 228, "purple": 276, "pink": 323}
_SATURATION = {"pink": 0.50}
_VALUE = {"green": 0.72, "purple": 0.78, "blue": 0.92}
_RADIUS = {"small": (0.075, 0.088), "large": (0.135, 0.148)}  # of the picture's side
_TILT = {"square": 12.0, "triangle": 12.0, "star": 20.0, "cross": 12.0, "circle": 0.0, "ring": 0.0}

# Centres (x, y) per layout and how far each coordinate may stray; the relations hold whatever the jitter.
_CENTRES: dict[str, tuple[tuple[float, float], ...]] = {
    "left": ((0.20, 0.50),),
    "right": ((0.80, 0.50),),
    "top": ((0.50, 0.20),),
    "bottom": ((0.50, 0.80),),
    "middle": ((0.50, 0.50),),
    "beside": ((0.27, 0.50), (0.73, 0.50)),
    "stacked": ((0.50, 0.27), (0.50, 0.73)),
    "row": ((0.18, 0.50), (0.50, 0.50), (0.82, 0.50)),
    "column": ((0.50, 0.18), (0.50, 0.50), (0.50, 0.82)),
    "roof": ((0.50, 0.27), (0.26, 0.72), (0.74, 0.72)),
    "bowl": ((0.50, 0.73), (0.26, 0.28), (0.74, 0.28)),
}
_JITTER = {
    "beside": (0.06, 0.11),
    "stacked": (0.11, 0.06),
    "row": (0.01, 0.11),
    "column": (0.11, 0.01),
    "roof": (0.05, 0.05),
    "bowl": (0.05, 0.05),
}
_JITTER_ALONE = (0.05, 0.05)


def draw_scene(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """The picture of a scene.

    Args:
        scene: what to draw.
        size: side in pixels.
        rng: source of the background and of every jitter.

    Returns:
        uint8 [size, size, 3], RGB.
    """
    side = size * _SUPERSAMPLE
    # A gradient loses nothing by being drawn small and enlarged.
    canvas = Image.fromarray(_background(_GRADIENT, rng)).resize((side, side), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    jitter = np.asarray(_JITTER.get(scene.layout, _JITTER_ALONE))
    for thing, centre in zip(scene.things, _CENTRES[scene.layout], strict=True):
        x, y = np.asarray(centre) + rng.uniform(-jitter, jitter)
        _draw_thing(pen, thing, float(x) * side, float(y) * side, side, rng)
    return np.asarray(canvas.reduce(_SUPERSAMPLE))


def _background(side: int, rng: np.random.Generator) -> np.ndarray:
    """A soft gradient between two pale or two dark tints: uint8 [side, side, 3]."""
    low, high = (0.86, 1.0) if rng.random() < 0.6 else (0.05, 0.24)
    ends = np.array(
        [colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.12), rng.uniform(low, high)) for _ in range(2)]
    )
    angle = rng.uniform(0, 2 * math.pi)
    line = np.linspace(-0.5, 0.5, side)
    ramp = np.clip(0.5 + line[None, :] * math.cos(angle) + line[:, None] * math.sin(angle), 0, 1)[..., None]
    return (255 * (ends[0] * (1 - ramp) + ends[1] * ramp)).round().astype(np.uint8)


def _draw_thing(
    pen: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, side: int, rng: np.random.Generator
) -> None:
    hue = (_HUES[thing.colour] + rng.uniform(-5, 5)) / 360 % 1
    saturation = _SATURATION.get(thing.colour, 0.90) + rng.uniform(-0.07, 0.07)
    value = _VALUE.get(thing.colour, 0.95) + rng.uniform(-0.05, 0.05)
    fill = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, min(saturation, 1.0), min(value, 1.0)))
    radius = rng.uniform(*_RADIUS[thing.size]) * side
    tilt = math.radians(rng.uniform(-1, 1) * _TILT[thing.shape])
    box = (x - radius, y - radius, x + radius, y + radius)
    if thing.shape == "circle":
        pen.ellipse(box, fill=fill)
    elif thing.shape == "ring":
        pen.ellipse(box, outline=fill, width=round(0.36 * radius))
    else:
        pen.polygon([_turn(px, py, x, y, radius, tilt) for px, py in _OUTLINES[thing.shape]], fill=fill)


def _turn(px: float, py: float, x: float, y: float, radius: float, tilt: float) -> tuple[float, float]:
    return (
        x + radius * (px * math.cos(tilt) - py * math.sin(tilt)),
        y + radius * (px * math.sin(tilt) + py * math.cos(tilt)),
    )


def _circle_points(angles: list[float], radii: list[float]) -> list[tuple[float, float]]:
    return [(r * math.sin(math.radians(a)), -r * math.cos(math.radians(a))) for a, r in zip(angles, radii, strict=True)]


_ARM = 0.34  # half the width of the cross's arms
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": _circle_points([0, 120, 240], [1.15, 1.15, 1.15]),
    "star": _circle_points([36.0 * i for i in range(10)], [1.15, 0.47] * 5),
    "cross": [
        (-_ARM, -1),
        (_ARM, -1),
        (_ARM, -_ARM),
        (1, -_ARM),
        (1, _ARM),
        (_ARM, _ARM),
        (_ARM, 1),
        (-_ARM, 1),
        (-_ARM, _ARM),
        (-1, _ARM),
        (-1, -_ARM),
        (-_ARM, -_ARM),
    ],
}

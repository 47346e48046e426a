"""Synthetic scenes: colored and patterned shapes, drawn over crops of real photographs.

A scene is a pure function of (seed, split, index). The photographs are the ones that scikit-image and scikit-learn
ship inside their own packages, so nothing is downloaded. The training and the validation split share none of them,
neither as background nor inside a pattern.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 128  # pixels, of every scene
SUPERSAMPLING = 3  # shapes are drawn this many times larger and averaged down, for smooth edges
TILE_SIDE = 176  # pixels, of one piece of pattern
TILES_PER_PATTERN = 24

SPLITS = ("train", "validation")
PHOTOGRAPHS = {
    "train": (
        "skimage/data/astronaut.png",
        "skimage/data/brick.png",
        "skimage/data/chelsea.png",
        "skimage/data/coffee.png",
        "skimage/data/coins.png",
        "skimage/data/gravel.png",
        "skimage/data/hubble_deep_field.jpg",
        "skimage/data/moon.png",
        "skimage/data/motorcycle_left.png",
        "skimage/data/rocket.jpg",
        "sklearn/datasets/images/flower.jpg",
    ),
    "validation": (
        "skimage/data/camera.png",
        "skimage/data/grass.png",
        "skimage/data/ihc.png",
        "skimage/data/retina.jpg",
        "skimage/data/text.png",
        "sklearn/datasets/images/china.jpg",
    ),
}
COLORS = {"red": (214, 38, 38), "green": (38, 166, 60), "blue": (36, 84, 214), "yellow": (238, 202, 30)}
PATTERNS = ("striped", "checkered", "dotted", "mosaic")
MATERIALS = (*COLORS, *PATTERNS)


def _arc(center_x: float, center_y: float, radius: float, start: float = 0.0, stop: float = 360.0) -> np.ndarray:
    """Points on a circle; angles in degrees, clockwise from the right. Returns (49, 2)."""
    angles = np.radians(np.linspace(start, stop, 49))
    return np.stack([center_x + radius * np.cos(angles), center_y + radius * np.sin(angles)], axis=1)


def _star(n_points: int, inner: float) -> np.ndarray:
    angles = np.pi * np.arange(2 * n_points) / n_points - np.pi / 2
    radii = np.where(np.arange(2 * n_points) % 2 == 0, 1.0, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _arch() -> np.ndarray:
    outer, inner = _arc(0, -0.1, 0.88, 180, 360), _arc(0, -0.1, 0.4, 360, 180)
    return np.concatenate([outer, [(0.88, 0.9), (0.4, 0.9)], inner, [(-0.4, 0.9), (-0.88, 0.9)]])


def _heart() -> np.ndarray:
    t = np.radians(np.arange(0, 360, 4))
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 17, (y - 2.5) / 17], axis=1)


def _crescent() -> np.ndarray:
    outer, inner = _arc(0, 0, 1.0, 50, 310), _arc(0.58, 0, 0.77, 274, 86)
    return np.concatenate([outer, inner])


# Outlines within the unit circle, x to the right and y down: the part that is filled, and the part cut out of it.
_OUTLINES: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
    "circle": (_arc(0, 0, 0.92), None),
    "square": (np.array([(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)]), None),
    "triangle": (np.array([(0, -0.98), (0.98, 0.76), (-0.98, 0.76)]), None),
    "star": (_star(5, 0.42), None),
    "heart": (_heart(), None),
    "cross": (
        np.array(
            [(-0.32, -0.97), (0.32, -0.97), (0.32, -0.32), (0.97, -0.32), (0.97, 0.32), (0.32, 0.32)]
            + [(0.32, 0.97), (-0.32, 0.97), (-0.32, 0.32), (-0.97, 0.32), (-0.97, -0.32), (-0.32, -0.32)]
        ),
        None,
    ),
    "ring": (_arc(0, 0, 0.97), _arc(0, 0, 0.5)),
    "crescent": (_crescent(), None),
    "arrow": (
        np.array([(0, -0.98), (0.86, -0.1), (0.34, -0.1), (0.34, 0.94), (-0.34, 0.94), (-0.34, -0.1), (-0.86, -0.1)]),
        None,
    ),
    "hourglass": (np.array([(-0.8, -0.95), (0.8, -0.95), (0.16, 0), (0.8, 0.95), (-0.8, 0.95), (-0.16, 0)]), None),
    "arch": (_arch(), None),
    "bolt": (np.array([(0.3, -1), (-0.8, 0.28), (-0.12, 0.28), (-0.3, 1), (0.8, -0.34), (0.14, -0.34)]), None),
}
SHAPES = tuple(_OUTLINES)
CLASS_NAMES = tuple(f"{material} {shape}" for shape in SHAPES for material in MATERIALS)


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene; the position in `Scene.objects` plus one is its value in the instance map."""

    shape: str
    material: str
    box: tuple[int, int, int, int]  # x0, y0, x1, y1 of the visible pixels, in pixels, x1 and y1 exclusive
    area: int  # visible pixels


@dataclass(frozen=True)
class Scene:
    """One picture with everything known about it. `objects[0]` is the main object: in front and the largest."""

    image: np.ndarray  # (128, 128, 3) uint8, RGB
    caption: str
    main_class: int  # shape index * 8 + material index, 0 to 95
    semantic: np.ndarray  # (128, 128) uint8: 0 background, else 1 + shape index * 8 + material index
    instances: np.ndarray  # (128, 128) uint8: 0 background, else 1 + position in `objects`; visible pixels
    objects: tuple[SceneObject, ...]


def load_photograph(name: str) -> np.ndarray:
    """Reads one photograph, e.g. "skimage/data/coffee.png", from the installed package it ships in.

    Returns:
        (H, W, 3) uint8 RGB; the shorter side at most 400 pixels.

    Raises:
        FileNotFoundError: the package is not installed, or its version does not ship this photograph.
    """
    package, _, rest = name.partition("/")
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    path = next((Path(folder) / rest for folder in folders if (Path(folder) / rest).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"the synthetic scenes need the photograph {name!r}, which ships inside scikit-image >= 0.24 and "
            'scikit-learn >= 1.4; install them with: pip install "transformers_radio[quickstart]"'
        )
    with Image.open(path) as photograph:
        rgb = photograph.convert("RGB")
    scale = 400 / min(rgb.size)
    if scale < 1:
        rgb = rgb.resize((round(rgb.width * scale), round(rgb.height * scale)), Image.Resampling.BOX)
    return np.asarray(rgb)


def _crop(photograph: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """A random square crop with random flips, resized to `side`. Returns (side, side, 3) float32, 0 to 255."""
    height, width, _ = photograph.shape
    crop_side = int(rng.integers(min(110, height, width), min(height, width, 330) + 1))
    top, left = int(rng.integers(height - crop_side + 1)), int(rng.integers(width - crop_side + 1))
    window = photograph[top : top + crop_side, left : left + crop_side]
    crop = np.asarray(Image.fromarray(window).resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def _stripes(x: np.ndarray, y: np.ndarray, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    period = rng.uniform(11, 14)
    return np.sin(2 * np.pi * (x / period + rng.random())) > 0


def _checks(x: np.ndarray, y: np.ndarray, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    period = rng.uniform(18, 23)
    return (np.sin(2 * np.pi * (x / period + rng.random())) > 0) ^ (
        np.sin(2 * np.pi * (y / period + rng.random())) > 0
    )


def _dots(x: np.ndarray, y: np.ndarray, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    spacing = rng.uniform(11, 14)
    u, v = x / spacing + rng.random(), y / spacing + rng.random()
    u = u + 0.5 * (np.floor(v) % 2)  # every second row is shifted by half a step
    return np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.33


_TWO_TONE: dict[str, Callable[..., np.ndarray]] = {"striped": _stripes, "checkered": _checks, "dotted": _dots}


def _two_tone_tile(pattern: str, photographs: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Stripes, checks or dots of a lightened photograph on a darkened one. Returns (tile, tile, 3) float32."""
    side = TILE_SIDE * 2  # drawn at twice the size and averaged down, for smooth edges
    light = 150 + 0.42 * _crop(photographs[int(rng.integers(len(photographs)))], TILE_SIDE, rng)
    dark = 0.42 * _crop(photographs[int(rng.integers(len(photographs)))], TILE_SIDE, rng)
    y, x = np.mgrid[:side, :side].astype(np.float32) / 2
    angle = rng.uniform(-0.35, 0.35) + (np.pi / 2 if pattern == "striped" and rng.random() < 0.5 else 0.0)
    x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    lit = _TWO_TONE[pattern](x, y, light, rng).astype(np.float32)
    # (2T, 2T) -> (T, 2, T, 2) -> (T, T, 1)
    share = lit.reshape(TILE_SIDE, 2, TILE_SIDE, 2).mean(axis=(1, 3))[:, :, None]
    return share * light + (1 - share) * dark


def _mosaic_tile(photographs: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A photograph seen as irregular stones of one color each, with pale joints. Returns (tile, tile, 3) float32."""
    crop = _crop(photographs[int(rng.integers(len(photographs)))], TILE_SIDE, rng)
    step = 16.0
    centers = np.arange(-step / 2, TILE_SIDE + step, step)
    points = np.stack(np.meshgrid(centers, centers, indexing="ij"), axis=-1)  # (n, n, 2), y and x
    points += rng.uniform(-0.38, 0.38, points.shape) * step
    rows = np.arange(TILE_SIDE, dtype=np.float32)
    pixels = np.stack(np.meshgrid(rows, rows, indexing="ij"), axis=-1)  # (T, T, 2)
    # The nearest point of a jittered grid is in the 3 x 3 cells around the pixel's own.
    cell = np.clip(((pixels + step) // step).astype(int), 1, len(centers) - 2)
    offsets = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    near = np.stack([(cell[..., 0] + i) * len(centers) + cell[..., 1] + j for i, j in offsets], axis=-1)  # (T, T, 9)
    distance = np.linalg.norm(points.reshape(-1, 2)[near] - pixels[:, :, None], axis=-1)  # (T, T, 9)
    owner = np.take_along_axis(near, distance.argmin(-1)[..., None], axis=-1)[..., 0]  # (T, T)
    two = np.partition(distance, 1, axis=-1)[..., :2]
    joint = np.clip(2.4 - (two[..., 1] - two[..., 0]), 0, 1)[:, :, None]
    sampled = np.clip(points.reshape(-1, 2).astype(int), 0, TILE_SIDE - 1)
    stones = crop[sampled[:, 0], sampled[:, 1]]  # (n * n, 3)
    stones = np.clip(stones * rng.uniform(0.6, 1.25, (len(stones), 1)) + rng.uniform(-22, 22, stones.shape), 25, 215)
    return (1 - joint) * stones[owner] + joint * 235


@lru_cache(maxsize=4)
def _photographs(split: str) -> list[np.ndarray]:
    return [load_photograph(name) for name in PHOTOGRAPHS[split]]


@lru_cache(maxsize=4)
def _tiles(split: str, seed: int) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng([seed, SPLITS.index(split), 1])
    photographs = _photographs(split)
    tiles = {name: [_two_tone_tile(name, photographs, rng) for _ in range(TILES_PER_PATTERN)] for name in _TWO_TONE}
    tiles["mosaic"] = [_mosaic_tile(photographs, rng) for _ in range(TILES_PER_PATTERN)]
    return tiles


def _background(split: str, rng: np.random.Generator) -> np.ndarray:
    """A photograph's crop, tinted and darkened, so that objects stand out. Returns (128, 128, 3) float32."""
    photographs = _photographs(split)
    crop = _crop(photographs[int(rng.integers(len(photographs)))], SIDE, rng)
    crop = crop * rng.uniform(0.8, 1.2, 3).astype(np.float32)
    mean = crop.mean(axis=(0, 1))
    return np.clip(0.5 * (mean + 0.5 * (crop - mean) + rng.uniform(-20, 20)), 0, 255).astype(np.float32)


def _surface(material: str, split: str, seed: int, rng: np.random.Generator) -> np.ndarray:
    """What the object is made of, across the whole picture. Returns (128, 128, 3) float32, 0 to 255."""
    if material in COLORS:
        surface = np.broadcast_to(np.array(COLORS[material], np.float32) + rng.uniform(-18, 18, 3), (SIDE, SIDE, 3))
    else:
        tile = _tiles(split, seed)[material][int(rng.integers(TILES_PER_PATTERN))]
        top, left = rng.integers(0, TILE_SIDE - SIDE + 1, 2)
        surface = tile[top : top + SIDE, left : left + SIDE]
        surface = surface[:, ::-1] if rng.random() < 0.5 else surface
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-0.16, 0.16, SIDE, dtype=np.float32)
    light = 1 + ramp[None, :] * math.cos(angle) + ramp[:, None] * math.sin(angle)
    return (surface * light[:, :, None]).astype(np.float32)


@dataclass(frozen=True)
class _Placed:
    """One shape where it stands."""

    shape: str
    material: str
    center: np.ndarray  # (2,) x and y, pixels
    radius: float  # pixels
    angle: float  # radians

    def _outlines(self) -> list[list[tuple[float, float]]]:
        rotation = np.array(
            [[math.cos(self.angle), math.sin(self.angle)], [-math.sin(self.angle), math.cos(self.angle)]]
        )
        outlines = [outline for outline in _OUTLINES[self.shape] if outline is not None]
        return [[(x, y) for x, y in ((o @ rotation) * self.radius + self.center) * SUPERSAMPLING] for o in outlines]

    def coverage(self) -> np.ndarray:
        """How much of each pixel the shape covers. Returns (128, 128) float32 in [0, 1]."""
        canvas = Image.new("L", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING))
        for outline, value in zip(self._outlines(), (255, 0), strict=False):
            ImageDraw.Draw(canvas).polygon(outline, fill=value)
        return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255

    def border(self) -> np.ndarray:
        """The line along the shape's outline, half of it outside. Returns (128, 128) float32 in [0, 1]."""
        canvas = Image.new("L", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING))
        for outline in self._outlines():
            closed = [*outline, *outline[:2]]
            ImageDraw.Draw(canvas).line(closed, fill=255, width=7 * SUPERSAMPLING, joint="curve")
        return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def _caption(names: list[str], rng: np.random.Generator) -> str:
    """A sentence that names the main object first, and the others or none of them."""
    main, others = f"a {names[0]}", [f"a {name}" for name in names[1:]]
    opening = ("", "a photo of ", "a picture of ", "there is ")[int(rng.integers(4))]
    if not others or rng.random() < 0.4:
        return opening + main
    listed = others[0] if len(others) == 1 else ", ".join(others[:-1]) + " and " + others[-1]
    return opening + main + (" in front of ", " with ", " that covers ")[int(rng.integers(3))] + listed


def main_class_of(split: str, seed: int, index: int) -> int:
    """The main class of one scene. Every run of 96 scenes holds each class once, so that the classes are balanced."""
    block, position = divmod(index, len(CLASS_NAMES))
    return int(np.random.default_rng([seed, SPLITS.index(split), 2, block]).permutation(len(CLASS_NAMES))[position])


def draw_scene(split: str, seed: int, index: int, frame: int = 0) -> Scene:
    """Draws scene `index` of a split; equal arguments give equal scenes, in any process.

    Args:
        split: "train" or "validation".
        seed: not negative; the seed of the whole set.
        index: not negative; the scene's position within the split.
        frame: 0 is the scene of the set. Another number shows its main object again, as a camera does that sees it
            elsewhere: at another place, in other light, among other things.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {SPLITS}")
    rng = np.random.default_rng([seed, SPLITS.index(split), 3, index, *([frame] if frame else [])])
    main_class = main_class_of(split, seed, index)

    # Place objects from front to back. Those behind keep a visible part and stay clearly smaller than the main one.
    radius = rng.uniform(0.37, 0.42) * SIDE
    margin = min(0.04 * SIDE, SIDE / 2 - radius)  # the main object stays whole, and near the middle
    center = SIDE / 2 + rng.uniform(-margin, margin, 2)
    shape, material = SHAPES[main_class // len(MATERIALS)], MATERIALS[main_class % len(MATERIALS)]
    placed = [_Placed(shape, material, center, radius, rng.uniform(-0.12, 0.12))]
    coverages = [placed[0].coverage()]
    hidden = coverages[0] >= 0.5
    main_area = np.count_nonzero(hidden)
    for _ in range(int(rng.integers(0, 4))):
        shape, material = SHAPES[int(rng.integers(len(SHAPES)))], MATERIALS[int(rng.integers(len(MATERIALS)))]
        for _attempt in range(6):
            center, radius = rng.uniform(4, SIDE - 4, 2), rng.uniform(0.1, 0.16) * SIDE
            behind = _Placed(shape, material, center, radius, rng.uniform(-0.3, 0.3))
            coverage = behind.coverage()
            inside = coverage >= 0.5
            if np.count_nonzero(inside & ~hidden) >= 120 and np.count_nonzero(inside) <= 0.6 * main_area:
                placed.append(behind)
                coverages.append(coverage)
                hidden |= inside
                break

    # Paint objects from back to front, each object over its own soft shadow.
    image = _background(split, rng)
    instances = np.zeros((SIDE, SIDE), np.uint8)
    for position in reversed(range(len(placed))):
        coverage = coverages[position]
        shadow = Image.fromarray((coverage * 128).astype(np.uint8)).filter(ImageFilter.BoxBlur(4))
        image *= (1 - np.asarray(shadow, dtype=np.float32) / 255)[:, :, None]
        surface = _surface(placed[position].material, split, seed, rng)
        surface += (0.9 * placed[position].border())[:, :, None] * (245 - surface)
        image += coverage[:, :, None] * (surface - image)
        instances[coverage >= 0.5] = position + 1

    semantic = np.zeros((SIDE, SIDE), np.uint8)
    objects = []
    for position, one in enumerate(placed):
        visible = instances == position + 1
        semantic[visible] = 1 + SHAPES.index(one.shape) * len(MATERIALS) + MATERIALS.index(one.material)
        rows, columns = np.nonzero(visible.any(axis=1))[0], np.nonzero(visible.any(axis=0))[0]
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        objects.append(SceneObject(one.shape, one.material, box, int(np.count_nonzero(visible))))
    caption = _caption([f"{o.material} {o.shape}" for o in objects], rng)
    return Scene(np.clip(image, 0, 255).astype(np.uint8), caption, main_class, semantic, instances, tuple(objects))

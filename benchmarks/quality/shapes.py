"""Images of textured shapes in clutter, drawn by a fixed generator.

Ten classes: which shape the large object is. Its place, size, angle, colours and
texture are random, and so are those of smaller shapes behind and before it, of the
background, and of noise.
"""

import functools

import numpy as np

SIZE = 32
TURN = np.pi / 5  # At most, to either side.
# Few colours, of which two in a texture are close: by many, images are told apart and
# learned by heart before any shape is.
PALETTE = np.float32(
    [[0.9, 0.3, 0.2], [0.2, 0.7, 0.3], [0.2, 0.4, 0.9], [0.9, 0.8, 0.3]]
)
CONTRAST = 0.3
SHAPES = (
    "disc",
    "ring",
    "half disc",
    "crescent",
    "triangle",
    "square",
    "bar",
    "cross",
    "star",
    "arrow",
)


def polygon(r, angle, corners):
    sector = 2 * np.pi / corners
    return np.cos(np.pi / corners) - r * np.cos((angle % sector) - sector / 2)


def inside(kind, u, v):
    """Positive inside of a shape of about radius 1, and about the distance to its edge.

    Args:
      kind: Of :data:`SHAPES`.
      u: First coordinate, of any shape.
      v: Second.
    """
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    box = lambda a, b: np.minimum(a - abs(u), b - abs(v))
    match kind:
        case "disc":
            return 0.85 - r
        case "ring":
            return 0.22 - abs(r - 0.75)
        case "half disc":
            return np.minimum(1 - np.hypot(u, v + 0.4), v + 0.4)
        case "crescent":
            return np.minimum(0.95 - r, np.hypot(u - 0.45, v) - 0.7)
        case "triangle":
            return polygon(r, angle, 3)
        case "square":
            return polygon(r, angle, 4)
        case "bar":
            return box(1.0, 0.35)
        case "cross":
            return np.maximum(box(0.95, 0.28), box(0.28, 0.95))
        case "star":
            return 0.65 + 0.35 * np.cos(5 * angle) - r
        case "arrow":
            tip = np.minimum(0.9 - v - 1.2 * abs(u), v - 0.0)
            return np.maximum(tip, np.minimum(0.25 - abs(u), 0.45 - abs(v + 0.45)))
    raise ValueError(f"kind: expected one of {SHAPES}, got {kind!r}")


def textures(draw, x, y):
    """Two colours ``[n, size, size, 3]`` in stripes, checks, or a slow change."""
    n = len(x)
    one, other = PALETTE[draw.integers(0, len(PALETTE), [2, n, 1, 1])]
    other = CONTRAST * other + (1 - CONTRAST) * one
    angle, phase = uniform(draw, 0, 2 * np.pi, 2, n)
    period = uniform(draw, 0.6, 1.6, n)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    stripes = np.sin(along * period + phase)
    checks = stripes * np.sin(across * period)
    slow = np.sin(along * period / 8 + phase)
    which = draw.integers(0, 3, [n, 1, 1])
    wave = np.select([which == 0, which == 1], [stripes, checks], slow)
    share = (0.5 + 0.5 * np.clip(3 * wave, -1, 1))[..., None]
    return share * one + (1 - share) * other


def uniform(draw, low, high, *shape):
    """A number for each image, or several."""
    return np.float32(draw.uniform(low, high, [*shape, 1, 1]))


def paint(images, draw, kinds, radius, x, y):
    """Puts a shape of each kind on its image."""
    n = len(images)
    # Of small shapes all lies within the image, of large ones most.
    reach = SIZE / 2 - np.minimum(radius, 10)
    across, down = uniform(draw, -1, 1, 2, n) * reach
    angle = uniform(draw, -TURN, TURN, n)
    x, y = x - across, y - down
    u = (x * np.cos(angle) + y * np.sin(angle)) / radius
    v = (y * np.cos(angle) - x * np.sin(angle)) / radius / uniform(draw, 0.75, 1, n)
    cover = np.zeros_like(u)
    for number, kind in enumerate(SHAPES):
        rows = kinds == number
        found = inside(kind, u[rows], v[rows]) * radius[rows]
        cover[rows] = 1 / (1 + np.exp(-4 * np.clip(found, -5, 5)))
    cover = cover[..., None]
    ink = textures(draw, x, y)
    # Edges are dark: a shape is visible before what has its colour.
    images[:] = (cover * ink + (1 - cover) * images) * (1 - 2 * cover * (1 - cover))


def drawn(count, seed):
    """Images and labels, all at once."""
    draw = np.random.default_rng(seed)
    y, x = np.float32(np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2)
    x, y = (np.broadcast_to(one, [count, SIZE, SIZE]) for one in (x, y))
    images = textures(draw, x, y)
    labels = draw.integers(0, len(SHAPES), count)

    def clutter(several):
        for _ in range(several):
            kinds = draw.integers(0, len(SHAPES), count)
            paint(images, draw, kinds, uniform(draw, 2, 3.5, count), x, y)

    clutter(3)
    paint(images, draw, labels, uniform(draw, 8, 13, count), x, y)
    clutter(1)
    images += draw.normal(0, 0.05, images.shape)
    return np.uint8(np.clip(255 * images, 0, 255)), np.int32(labels)


BLOCK = 1000  # Images drawn at once.


@functools.cache
def shapes(count):
    """Images ``[count, 32, 32, 3]`` uint8, and the number of the largest's shape."""
    starts = range(0, count, BLOCK)
    blocks = [drawn(min(BLOCK, count - start), [start, 0]) for start in starts]
    return tuple(np.concatenate(x) for x in zip(*blocks, strict=True))

"""The demo's clip: striped and spotted fish pass in front of each other in an aquarium; the masks are exact."""

import numpy as np
from scipy.ndimage import gaussian_filter

# body, marking and belly of each fish in turn
_COLORS = np.array(
    [
        [(0.93, 0.42, 0.10), (0.98, 0.96, 0.90), (0.99, 0.72, 0.30)],
        [(0.16, 0.24, 0.62), (0.96, 0.85, 0.25), (0.55, 0.68, 0.92)],
        [(0.62, 0.12, 0.28), (0.98, 0.80, 0.84), (0.86, 0.42, 0.46)],
        [(0.12, 0.45, 0.25), (0.88, 0.95, 0.60), (0.60, 0.78, 0.40)],
        [(0.32, 0.16, 0.45), (0.80, 0.90, 0.98), (0.62, 0.46, 0.80)],
    ]
)
_WATER = np.array([(0.55, 0.83, 0.85), (0.10, 0.36, 0.52)])
"""At the surface and at the ground."""
_SAND, _STONE, _WEED = np.array([(0.80, 0.70, 0.48), (0.36, 0.36, 0.38), (0.14, 0.42, 0.26)])
_GROUND = 0.8
"""Where the sand begins, in frame heights from the top."""


def aquarium_clip(
    frames: int = 48, size: tuple[int, int] = (240, 432), objects: int = 2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw fish that swim both ways through a panned aquarium, the first one nearest.

    Args:
        frames: T, number of frames; fish cross around the 24th, in clips longer than 48 in the middle.
        size: height and width in pixels.
        objects: how many fish, all of them labelled.
        seed: the clip is a function of the seed and the other arguments.

    Returns:
        Frames uint8 `[T, H, W, 3]` and labels uint8 `[T, H, W]`, 0 for background, 1…objects.
    """
    random = np.random.default_rng(seed)
    scenery = _scenery(size, random)
    height, width = size
    x, y = np.meshgrid((np.arange(width) + 0.5) / height, (np.arange(height) + 0.5) / height)
    fish = [_Fish(number, objects, width / height, random) for number in range(objects)]
    pictures = np.empty((frames, *size, 3), np.uint8)
    labels = np.zeros((frames, *size), np.uint8)
    for index in range(frames):
        time = index / max(frames - 1, 47)
        picture = _panned(scenery, 0.35 * width * time)[:, :width]
        # the last is the farthest away
        for number in reversed(range(objects)):
            box = fish[number].box(time, height)
            color, cover = fish[number].drawn(x[box], y[box], time, index, height)
            picture[box] += cover[..., None] * (color - picture[box])
            labels[index][box][cover > 0.5] = number + 1
        # light that the waves focus, the same on all
        ripple = np.sin(9 * x + 3 * np.sin(5 * y + 0.11 * index) + 0.17 * index) * np.sin(7 * y - 0.13 * index)
        picture = picture * (1 + 0.05 * ripple[..., None]) + random.normal(0, 0.012, picture.shape)
        pictures[index] = np.round(picture.clip(0, 1) * 255)
    return pictures, labels


def _noise(shape: tuple[int, int], sigma: float, random: np.random.Generator) -> np.ndarray:
    """Smooth noise of mean 0 and deviation 1 that repeats from right to left."""
    noise = gaussian_filter(random.normal(size=shape), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def _scenery(size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Water, stones, weeds and sand: `[H, 2 W, 3]` in 0…1, which repeats from right to left."""
    height, width = size[0], 2 * size[1]
    shape = (height, width)
    down = ((np.arange(height) + 0.5) / height)[:, None]
    across = (np.arange(width) + 0.5)[None] / width
    picture = _WATER[0] + (down * np.ones_like(across))[..., None] * (_WATER[1] - _WATER[0])
    picture += 0.02 * _noise(shape, height / 12, random)[..., None]
    relief = _noise(shape, height / 60, random)
    for color, base, roughness in ((_STONE, 0.74, 0.09), (0.75 * _STONE, 0.84, 0.07)):
        top = base - roughness * _noise(shape, height / 8, random)[:1] - 0.01 * relief[:1]
        shade = 1 + 0.16 * relief + 0.5 * (top - down)
        picture = np.where((down > top)[..., None], color * shade[..., None], picture)
    for _ in range(14):
        root, tall = random.uniform(), random.uniform(0.15, 0.5)
        up = ((_GROUND + 0.05 - down) / tall).clip(0, None)
        bend = 0.012 * np.sin(6 * up + random.uniform(0, 6))
        away = (across - root - bend + 0.5) % 1 - 0.5
        leaf = (np.abs(away) * width / height < 0.022 * (1 - up)) & (up < 1)
        shade = random.uniform(0.7, 1.3) * (0.7 + 0.5 * up + 8 * away)
        picture = np.where(leaf[..., None], _WEED * shade[..., None], picture)
    grain = 0.06 * _noise(shape, 1, random) + 0.05 * relief
    sand = down > _GROUND + 0.02 * _noise(shape, height / 6, random)[:1]
    return np.where(sand[..., None], _SAND * (0.75 + 0.4 * (down - _GROUND) + grain)[..., None], picture)


def _panned(picture: np.ndarray, pixels: float) -> np.ndarray:
    """A picture that repeats, moved to the left."""
    whole = int(pixels)
    near, far = np.roll(picture, -whole, axis=1), np.roll(picture, -whole - 1, axis=1)
    return near + (pixels - whole) * (far - near)


class _Fish:
    """One fish: how it looks, and where it swims."""

    def __init__(self, number: int, count: int, aspect: float, random: np.random.Generator):
        self.body, self.mark, self.belly = _COLORS[number % len(_COLORS)]
        self.striped = number % 2 == 0
        self.heading = 1 if number % 2 == 0 else -1
        self.length = 0.62 * min(1, 2 / count) ** 0.5
        # those of one side start and end apart
        self.reach = 0.5 * aspect - (0.52 + 0.7 * (number // 2 % 3)) * self.length
        self.middle, self.late = 0.5 * aspect, random.uniform(-0.05, 0.05)
        # those that meet swim at nearly the same height
        pairs = (count + 1) // 2
        self.level = 0.4 + 0.5 * ((number // 2 + 0.5) / pairs - 0.5) + 0.09 * self.length * self.heading
        self.phase, self.spots = random.uniform(0, 6), random.uniform(-0.5, 0.5, (40, 2)) * (0.9, 0.5)

    def _place(self, time: float) -> tuple[float, float]:
        """Across and down, in frame heights, at a time 0…1 of the clip."""
        across = self.middle + self.heading * self.reach * (2 * time - 1 + self.late * np.sin(np.pi * time))
        return across, self.level + 0.03 * np.sin(5 * time + self.phase)

    def box(self, time: float, height: int) -> tuple[slice, slice]:
        """Rows and columns outside of which it is not."""
        across, level = self._place(time)
        half = (0.4, 0.6)
        low, high = (
            [
                max(0, round((center + sign * part * self.length) * height))
                for center, part in zip((level, across), half)
            ]
            for sign in (-1, 1)
        )
        return slice(low[0], high[0]), slice(low[1], high[1])

    def drawn(
        self, x: np.ndarray, y: np.ndarray, time: float, index: int, height: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Its color `[H, W, 3]` and how much of each pixel it covers `[H, W]`, at points x and y in frame heights."""
        across, level = self._place(time)
        # ahead and up, in lengths of the fish; the nose is at 0.5, the tail fin ends at -0.5
        ahead = self.heading * (x - across) / self.length
        up = (level - y) / self.length + 0.05 * (0.5 - ahead) ** 2 * np.sin(6 * ahead + 0.5 * index + self.phase)
        outline = _outline(ahead, up)
        cover = ((outline - np.abs(up)) * self.length * height + 0.5).clip(0, 1)
        fraction = (up / outline.clip(1e-3)).clip(-1, 1)
        color = self.body + (0.5 - 0.5 * fraction)[..., None] ** 2 * (self.belly - self.body)
        marks = self._marks(ahead, up)
        color = color + marks[..., None] * (self.mark - color)
        scales = np.sin(90 * ahead) * np.sin(90 * up) * (ahead > -0.28)
        rays = np.sin(120 * up / (0.3 - ahead).clip(0.1)) * (ahead <= -0.28)
        shade = 1.05 - 0.3 * fraction**2 + 0.07 * scales + 0.12 * rays
        gill = np.exp(-(((np.hypot(ahead - 0.42, up) - 0.2) / 0.012) ** 2)) * (ahead < 0.3) * (np.abs(fraction) < 0.6)
        color = color * (shade - 0.35 * gill)[..., None]
        eye = np.hypot(ahead - 0.36, up - 0.035)
        color = np.where((eye < 0.036)[..., None], 0.95, color)
        return np.where((eye < 0.021)[..., None], 0.05, color), cover

    def _marks(self, ahead: np.ndarray, up: np.ndarray) -> np.ndarray:
        """Where it has the second color, 0…1: three bands, or spots."""
        if self.striped:
            bands = [np.abs(ahead - place + 0.15 * up**2) for place in (0.2, -0.02, -0.24)]
            return (12 * (0.06 - np.minimum.reduce(bands)) * len(bands)).clip(0, 1)
        nearest = np.full_like(ahead, np.inf)
        for across, above in self.spots:
            nearest = np.minimum(nearest, np.hypot(ahead - across, up - above))
        return (40 * (0.032 - nearest)).clip(0, 1)


def _outline(ahead: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Half of the fish's height at each place along it, in its lengths; negative before the nose and after the tail."""
    along = (0.5 - ahead) / 0.8
    body = 0.62 * np.sqrt(along.clip(0, 1)) * (1 - along).clip(0, 1) ** 0.9 + 0.02
    fin = 0.1 * np.sin(np.pi * ((ahead + 0.25) / 0.45).clip(0, 1)) ** 0.6 * (up > 0)
    tail = 0.03 + 0.75 * (-0.22 - ahead).clip(0, None)
    # the fin's notch
    ends = ahead > -0.5 + 0.08 * (1 - (np.abs(up) / 0.2).clip(0, 1))
    found = np.maximum(body + fin, tail)
    return np.where((along > 0) & ends, found, -1.0)

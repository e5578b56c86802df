"""A clip: the unit that datasets yield and training consumes; and what all datasets of clips share."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stm_model.io.images import MediaError
from stm_model.labels import VOID


class Clip(NamedTuple):
    """A few frames with the labels of their objects."""

    frames: Tensor
    """`[T, 3, H, W]` float32 RGB in 0…1."""
    labels: Tensor
    """`[T, H, W]` uint8; 0 is background, 1…n are objects, 255 is void: nobody knows."""
    unreadable: tuple[str, ...] = ()
    """What was wrong with the files that had to be passed over for this clip."""
    seed: int = 0
    """RNG seed of this clip."""

    @property
    def objects(self) -> int:
        """n, the objects visible in the first frame."""
        first = self.labels[0]
        return int(first.masked_fill(first == VOID, 0).max())


def generator(*seeds: int) -> torch.Generator:
    """A source of randomness that is a function of a few whole numbers.

    PyTorch's own seeding looks at the low 32 bits alone, so that far-apart seeds may give the same numbers.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint32)[0]))


class SeededClips(Dataset):
    """Endless clips: item i is a function of the seed i and the files alone."""

    def __len__(self) -> int:
        return 2**31


class DrawnClips(SeededClips):
    """Clips drawn from a list of sources.

    A source that cannot be read is passed over for the next; the clip says so in `unreadable`.
    """

    ATTEMPTS = 16
    """Draws before a dataset is given up, if it has fewer sources than that."""

    def __init__(
        self,
        sources: Sequence,
        frames: int = 3,
        size: tuple[int, int] = (192, 192),
        most_objects: int = 4,
        color: float = 0.3,
    ):
        """
        Args:
            sources: what to draw from.
            frames: T, frames per clip.
            size: height and width of the crop in pixels.
            most_objects: objects of a clip; further ones are left unlabelled.
            color: strength of the change of colours, see `random_color`.

        Raises:
            ValueError: there is no source.
        """
        if not sources:
            raise ValueError(f"{type(self).__name__}: expected at least one source of clips, got none")
        self.sources, self.frames, self.size = sources, frames, size
        self.most_objects, self.color = most_objects, color

    def __getitem__(self, seed: int) -> Clip:
        first = int(torch.randint(len(self.sources), (), generator=generator(seed)))
        problems: list[str] = []
        for attempt in range(max(len(self.sources), self.ATTEMPTS)):
            source = self.sources[(first + attempt) % len(self.sources)]
            try:
                clip = self.draw(source, seed, generator(seed, attempt, 1))
            except MediaError as error:
                problems.append(str(error))
                continue
            return clip._replace(unreadable=(*problems, *clip.unreadable))
        raise ValueError(f"none of the {len(self.sources)} sources of clips can be read; the last: {problems[-1]}")

    def draw(self, source, seed: int, random: torch.Generator) -> Clip:
        """A clip of one source. Raises MediaError for a file that cannot be used."""
        raise NotImplementedError


class MixedClips(SeededClips):
    """Draws item i from one of several datasets, by weights; which one is a function of i."""

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]):
        """Items of `datasets`, each drawn as often as its weight says, relative to the others."""
        if len(datasets) != len(weights):
            raise ValueError(f"weights: expected one for each of {len(datasets)} datasets, got {len(weights)}")
        if min(weights, default=0) < 0 or not sum(weights):
            raise ValueError(f"weights: expected some above 0 and none below, got {list(weights)}")
        self.datasets, self.weights = datasets, torch.tensor(weights, dtype=torch.float64)

    def __getitem__(self, seed: int) -> Clip:
        pick = torch.multinomial(self.weights, 1, generator=generator(seed, 2))
        return self.datasets[int(pick)][seed]


def clip_of(frames: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> Clip:
    """A clip of uint8 frames `[H, W, 3]` and label maps `[H, W]`, all of one size."""
    pixels = torch.from_numpy(np.stack(frames))
    return Clip(pixels.permute(0, 3, 1, 2).float() / 255, torch.from_numpy(np.stack(labels)))


class FollowedClips(SeededClips):
    """The clips of a dataset that show an object in their first frame; others are drawn anew."""

    ATTEMPTS = 64

    def __init__(self, clips: Dataset):
        self.clips = clips

    def __getitem__(self, seed: int) -> Clip:
        unreadable: tuple[str, ...] = ()
        for attempt in range(self.ATTEMPTS):
            # the low 32 bits, which count the clips of a training, stay
            clip = self.clips[seed + (attempt << 40)]
            unreadable += clip.unreadable
            if clip.objects:
                return clip._replace(unreadable=unreadable, seed=seed)
        raise ValueError(f"no object in the first frame of {self.ATTEMPTS} clips drawn in a row: are the masks empty?")

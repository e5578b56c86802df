"""Clips with the objects of other clips on them: from the same data more objects, look-alikes and backgrounds."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from stm_model.data.augment import paste_objects, visible_objects
from stm_model.data.clips import Clip, generator


class CollageClips(Dataset):
    """Clips of one dataset, some with the objects of another's clips pasted on."""

    def __init__(
        self, clips: Dataset, objects: Dataset, paste: float = 0.35, distract: float = 0.15, replace: float = 0.15
    ):
        """
        Args:
            clips: the clips below.
            objects: clips whose objects are cut out; frames and size as in `clips`.
            paste: share of clips with further objects to follow, in front of or behind their own.
            distract: share of clips with further objects that are not to be followed.
            replace: share of clips of which only the background stays, for the pasted objects alone to be followed.

        Raises:
            ValueError: the shares are negative or their sum is above 1.
        """
        shares = (paste, distract, replace)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"paste, distract, replace: expected shares with a sum of at most 1, got {shares}")
        self.clips, self.objects, self.shares = clips, objects, shares

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, seed: int) -> Clip:
        clip, random = self.clips[seed], generator(seed, 3)
        paste, distract, replace = self.shares
        draw = float(torch.rand((), generator=random))
        if draw >= paste + distract + replace:
            return clip
        # far from the seeds of the clips below, and as far on in the training
        other = self.objects[seed + 2**31]
        if draw >= paste + distract:
            clip = clip._replace(labels=torch.zeros_like(clip.labels))
        labelled = not paste <= draw < paste + distract
        return visible_objects(paste_objects(clip, other, random, labelled))

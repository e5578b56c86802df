"""Clips with the objects of other clips on them: from the same data more objects, look-alikes and backgrounds."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from stm_model.data.augment import paste_objects, visible_objects
from stm_model.data.clips import Clip, SeededClips, generator


class CollageClips(SeededClips):
    """Clips of one dataset, some with the objects of another's clips pasted on."""

    def __init__(
        self, clips: Dataset, objects: Dataset, paste: float = 0.35, distract: float = 0.15, replace: float = 0.15
    ):
        """Clips `clips`, on some of which objects of clips `objects` are pasted, of the same frames and size.

        Args:
            paste: share of clips with further objects to follow, in front of or behind their own.
            distract: share of clips with further objects that are not to be followed.
            replace: share of clips of which only the background stays, for the pasted objects alone to be followed.
        """
        shares = (paste, distract, replace)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"paste, distract, replace: expected shares with a sum of at most 1, got {shares}")
        self.clips, self.objects, self.shares = clips, objects, shares

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

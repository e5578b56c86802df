"""The previous frame's masks as a network in training sees them: some missing, shifted, or seen twice."""

import torch

from stm_model.data.clips import Clip
from stm_model.training.loss import disturbed

MASKS = torch.zeros(3, 32, 48)
MASKS[:, 12:20, 20:30] = torch.tensor([0.25, 0.5, 1.0])[:, None, None]
SEEDS = range(60)


def seen(seed: int, share: float) -> torch.Tensor:
    clip = Clip(torch.zeros(2, 3, 32, 48), torch.zeros(2, 32, 48, dtype=torch.uint8), seed=seed)
    return disturbed(MASKS, clip, 1, share)


def kind(mask: torch.Tensor, original: torch.Tensor) -> str:
    """What became of a mask; the masks here are boxes far from the edges, so that none is shifted out of view."""
    if torch.equal(mask, original):
        return "kept"
    if not mask.any():
        return "missing"
    level = original.max()
    assert set(mask.unique().tolist()) <= {0.0, level.item()}
    area, covers = int((mask > 0).sum()), bool((mask >= original).all())
    if covers:
        assert 80 < area <= 160
        return "twice"
    assert area == 80
    return "shifted"


def test_a_share_of_the_masks_is_missing_shifted_or_seen_twice():
    kinds = [kind(mask, original) for seed in SEEDS for mask, original in zip(seen(seed, 0.9), MASKS)]
    shares = {name: kinds.count(name) / len(kinds) for name in ("kept", "missing", "shifted", "twice")}
    assert 0.03 < shares["kept"] < 0.2
    assert all(0.2 < shares[name] < 0.4 for name in ("missing", "shifted", "twice"))


def test_what_is_seen_is_a_function_of_clip_and_time():
    assert all(torch.equal(seen(seed, 0.9), seen(seed, 0.9)) for seed in SEEDS)
    assert torch.equal(seen(3, 0.0), MASKS)
    assert any(not torch.equal(seen(seed, 0.9), seen(seed + 1, 0.9)) for seed in SEEDS)

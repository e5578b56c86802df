"""J and F on tensors, many masks at once and on any device: for validation while a network trains."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from stm_model.evaluation.metrics import BOUNDARY_TOLERANCE


def region_similarity(prediction: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
    """J of each pair of masks; 1 for two empty masks.

    Args:
        prediction: bool `[…, H, W]`.
        truth: bool `[…, H, W]`.
        void: bool, broadcastable to these: pixels that count for neither; None is no pixel.

    Returns:
        float64 `[…]`, from 0 to 1.

    Raises:
        ValueError: not masks, or of different shapes.

    Source: as `stm_model.evaluation.metrics.region_similarity`, which it equals.
    """
    prediction, truth = _without_void(prediction, truth, void)
    union = (prediction | truth).sum((-2, -1)).double()
    shared = (prediction & truth).sum((-2, -1)).double()
    return torch.where(union > 0, shared / union.clamp(min=1), 1.0)


def contour_accuracy(prediction: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
    """F of each pair of masks; 1 for two masks without a contour.

    Args, Returns, Raises: as `region_similarity`.

    Source: as `stm_model.evaluation.metrics.contour_accuracy`, which it equals.
    """
    prediction, truth = _without_void(prediction, truth, void)
    predicted, true = _contour(prediction), _contour(truth)
    count, true_count = predicted.sum((-2, -1)).double(), true.sum((-2, -1)).double()
    precision = (predicted & _dilate(true)).sum((-2, -1)) / count.clamp(min=1)
    recall = (true & _dilate(predicted)).sum((-2, -1)) / true_count.clamp(min=1)
    score = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where((count > 0) & (true_count > 0), score, (count == true_count).double())


def _without_void(prediction: Tensor, truth: Tensor, void: Tensor | None) -> tuple[Tensor, Tensor]:
    named = {"prediction": prediction, "truth": truth} | ({} if void is None else {"void": void})
    for name, mask in named.items():
        if mask.dtype != torch.bool or mask.ndim < 2:
            raise ValueError(f"{name}: expected bool masks […, H, W], got {mask.dtype} {list(mask.shape)}")
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction: expected the truth's shape {list(truth.shape)}, got {list(prediction.shape)}")
    return (prediction, truth) if void is None else (prediction & ~void, truth & ~void)


def _contour(mask: Tensor) -> Tensor:
    """Pixels that differ from their right, lower or lower right neighbour; past its edge the mask goes on as it was."""
    contour = torch.zeros_like(mask)
    contour[..., :, :-1] = mask[..., :, :-1] ^ mask[..., :, 1:]
    contour[..., :-1, :] |= mask[..., :-1, :] ^ mask[..., 1:, :]
    contour[..., :-1, :-1] |= mask[..., :-1, :-1] ^ mask[..., 1:, 1:]
    return contour


def _dilate(mask: Tensor) -> Tensor:
    """Masks grown by the disk within which contours match."""
    reach = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*mask.shape[-2:]))
    offsets = torch.arange(-reach, reach + 1, device=mask.device)
    disk = (offsets[:, None] ** 2 + offsets**2 <= reach**2).float()
    # sums of zeros and ones are zero or at least one in any precision that autocast may choose
    near = F.conv2d(mask.reshape(-1, 1, *mask.shape[-2:]).float(), disk[None, None], padding=reach)
    return (near > 0.5).reshape(mask.shape)

"""Soft aggregation: independent object probabilities become one distribution over background and objects."""

import torch
from torch import Tensor

_EPSILON = 1e-7


def soft_aggregate(object_probabilities: Tensor) -> Tensor:
    """Merge the independent probabilities of n objects into logits over background and objects.

    Args:
        object_probabilities: `[n, …]` float in 0…1, one map per object.

    Returns:
        Float32 logits `[n + 1, …]`, background first; their softmax over dimension 0 sums to one.

    Source: Oh et al. 2018 (RGMP), soft aggregation: background = Π(1 − p), softmax of the log odds.
    """
    objects = object_probabilities.float()
    background = torch.prod(1 - objects, dim=0, keepdim=True)
    probabilities = torch.cat([background, objects]).clamp(_EPSILON, 1 - _EPSILON)
    return torch.logit(probabilities)


def aggregated(object_probabilities: Tensor) -> Tensor:
    """The softmax of `soft_aggregate`, `[n + 1, …]`: the odds of each, by their sum."""
    objects = object_probabilities.float()
    probabilities = objects.new_empty(1 + len(objects), *objects.shape[1:])
    torch.sub(1, objects[0], out=probabilities[0])
    for other in objects[1:]:
        probabilities[0] *= 1 - other
    probabilities[1:] = objects
    odds = probabilities.clamp_(_EPSILON, 1 - _EPSILON).div_(1 - probabilities)
    return odds.div_(odds.sum(0))


def other_object_masks(masks: Tensor) -> Tensor:
    """For each of n objects `[n, …]`, the summed mask of all the others, clamped to 0…1."""
    if len(masks) == 1:
        return torch.zeros_like(masks)
    return (masks.sum(0, keepdim=True) - masks).clamp_(0, 1)

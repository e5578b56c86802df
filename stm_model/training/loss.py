"""The loss of a clip: every frame after the first is segmented from the memory of the frames before it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stm_kernels import space_time_memory_read
from stm_model.data.clips import Clip, generator
from stm_model.labels import VOID
from stm_model.network import STM, Query, other_object_masks, soft_aggregate
from stm_model.network.encoders import FrameFeatures


def segment_clips(
    model: STM,
    clips: list[Clip],
    recompute: bool = False,
    prior_noise: float = 0.0,
    **read_options: Any,
) -> list[list[Tensor]]:
    """Segment the frames of a batch of clips one after the other, each from the memory of all before it.

    The first frame is remembered with its labels, every other one with its predicted soft masks (detached). The
    objects of all clips are one batch without padding, so clips with few objects cost and weigh nothing extra.

    Args:
        model: the network.
        clips: B clips of the same T, H and W, multiples of 16; any number of objects each, at least one.
        recompute: keep no activations of encoders and decoder, but compute them again in the backward pass.
        prior_noise: see `TrainConfig`.
        read_options: of the memory read, see `stm_kernels.memory_read`.

    Returns:
        T − 1 lists of B logit maps `[n + 1, H, W]`, float32, background first.
    """
    run = caller(recompute)
    objects = [clip.objects for clip in clips]
    frames = torch.stack([clip.frames for clip in clips])
    # where keys are shared, a frame is remembered as it was encoded to be segmented
    queries = _encode_queries(model, frames if model.shares_keys else frames[:, 1:], recompute)
    remembered = queries if model.shares_keys else frames.unbind(1)
    masks = [_one_hot(clip.labels[0], clip.objects) for clip in clips]
    keys, values, predictions = [], [], []
    for time, query in enumerate(queries[-(frames.shape[1] - 1) :], start=1):
        others = torch.cat([other_object_masks(mask) for mask in masks])
        key, value = run(model.memorize, remembered[time - 1], torch.cat(masks), others, objects)
        keys.append(key)
        values.append(value)
        readout = _read(model, query.key, torch.stack(keys, 2), torch.stack(values, 2), objects, read_options)
        seen = [disturbed(mask, clip, time, prior_noise) for mask, clip in zip(masks, clips)] if prior_noise else masks
        previous = torch.cat(seen), torch.cat([other_object_masks(mask) for mask in seen])
        probabilities = run(model.segment, readout, query, objects, previous).split(objects)
        logits = [soft_aggregate(part) for part in probabilities]
        predictions.append(logits)
        masks = [torch.softmax(part.detach(), 0)[1:] for part in logits]
    return predictions


def _read(
    model: STM, query_key: Tensor, key: Tensor, value: Tensor, objects: list[int], read_options: dict[str, Any]
) -> Tensor:
    """What the objects of all clips read, `[K, V, h, w]`."""
    options = {"similarity": model.config.similarity} | read_options
    if not model.shares_keys:
        counts = torch.tensor(objects, device=query_key.device)
        query_key = query_key.repeat_interleave(counts, 0, output_size=sum(objects))
        return space_time_memory_read(query_key, key, value, **options)
    readouts = []
    for clip, values in enumerate(value.split(objects)):
        # the values of all objects lie side by side behind one set of keys
        beside = rearrange(values, "n v t h w -> 1 (n v) t h w")
        readout = space_time_memory_read(query_key[clip : clip + 1], key[clip : clip + 1], beside, **options)
        readouts.append(rearrange(readout, "1 (n v) h w -> n v h w", n=len(values)))
    return torch.cat(readouts)


def disturbed(masks: Tensor, clip: Clip, time: int, share: float) -> Tensor:
    """Masks `[n, H, W]`, a share of them missing, shifted by up to a quarter of the frame, or both here and there."""
    random = generator(clip.seed, 6, time)
    draws = torch.rand(len(masks), 3, generator=random).tolist()
    disturbed = []
    for mask, (draw, down, right) in zip(masks, draws):
        if draw < share / 3:
            mask = torch.zeros_like(mask)
        elif draw < share:
            rows, columns = (round((2 * part - 1) * side / 4) for part, side in zip((down, right), mask.shape))
            padded = F.pad(mask, (max(columns, 0), max(-columns, 0), max(rows, 0), max(-rows, 0)))
            top, left = max(-rows, 0), max(-columns, 0)
            shifted = padded[top : top + mask.shape[0], left : left + mask.shape[1]]
            # what an object leaves behind is the commonest error
            mask = shifted if draw < share * 2 / 3 else torch.maximum(mask, shifted)
        disturbed.append(mask)
    return torch.stack(disturbed)


def caller(recompute: bool) -> Callable:
    """Calls a function with arguments; to `recompute`, without keeping its activations: the backward pass computes them
    again.
    """
    return partial(checkpoint, use_reentrant=False) if recompute else lambda function, *arguments: function(*arguments)


class ClipLoss(nn.Module):
    """A network together with its loss: what is called once per step, as torch's data parallelism expects."""

    def __init__(
        self,
        model: STM,
        dice_weight: float,
        recompute: bool = False,
        prior_noise: float = 0.0,
        **read_options: Any,
    ):
        super().__init__()
        self.model, self.dice_weight, self.read_options = model, dice_weight, read_options
        self.recompute, self.prior_noise = recompute, prior_noise

    def forward(self, clips: list[Clip]) -> Tensor:
        noise = self.prior_noise
        return clip_loss(self.model, clips, self.dice_weight, self.recompute, noise, **self.read_options)

    def predict(self, clip: Clip) -> list[Tensor]:
        """Logit maps `[n + 1, H, W]` of the frames of a clip after its first."""
        return [logits for (logits,) in segment_clips(self.model, [clip], **self.read_options)]


def clip_loss(
    model: STM,
    clips: list[Clip],
    dice_weight: float = 0.5,
    recompute: bool = False,
    prior_noise: float = 0.0,
    **read_options: Any,
) -> Tensor:
    """Cross entropy on the aggregated logits plus a soft Dice term, mean over clips and frames; void counts nowhere.

    For the arguments see `segment_clips`; `dice_weight` is the weight of the Dice term.
    """
    predictions = segment_clips(model, clips, recompute, prior_noise, **read_options)
    losses = [
        frame_loss(logits, clip.labels[time], dice_weight)
        for time, frame_logits in enumerate(predictions, start=1)
        for logits, clip in zip(frame_logits, clips, strict=True)
    ]
    return torch.stack(losses).mean()


def frame_loss(logits: Tensor, labels: Tensor, dice_weight: float) -> Tensor:
    """Cross entropy plus the weighted Dice term of one frame; logits `[n + 1, H, W]`, labels `[H, W]`."""
    return cross_entropy(logits, labels) + dice_weight * dice_loss(logits, labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the pixels that are not void; logits `[n + 1, H, W]`, labels `[H, W]`. 0 where all are void."""
    total = F.cross_entropy(logits[None], labels.long()[None], ignore_index=VOID, reduction="sum")
    return total / (labels != VOID).sum().clamp(min=1)


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """One minus the soft Dice overlap, mean over objects; logits `[n + 1, H, W]`, labels `[H, W]`.

    Small objects weigh as much as large ones. Source: Milletari et al. 2016 (V-Net).
    """
    known = (labels != VOID).flatten()
    probabilities = torch.softmax(logits, 0)[1:].flatten(1) * known
    truth = _one_hot(labels, len(probabilities)).flatten(1)
    overlap = 2 * (probabilities * truth).sum(1) + 1
    return 1 - (overlap / (probabilities.sum(1) + truth.sum(1) + 1)).mean()


def _one_hot(labels: Tensor, objects: int) -> Tensor:
    """Masks of the objects 1…n of a label map `[H, W]`: float `[n, H, W]`."""
    return (labels == torch.arange(1, objects + 1, device=labels.device).view(-1, 1, 1)).float()


def _encode_queries(model: STM, frames: Tensor, recompute: bool) -> list[Query]:
    """The queries of frames `[B, T, 3, H, W]`, for each point in time those of all clips."""
    if recompute:
        # one after the other: what is computed again together is held together
        return [Query(*caller(recompute)(model.encode_query, frame)) for frame in frames.unbind(1)]
    query = model.encode_query(rearrange(frames, "b t c h w -> (t b) c h w"))
    size = len(frames)
    features = zip(*(maps.split(size) for maps in query.features), strict=True)
    return [
        Query(key, value, FrameFeatures(*maps))
        for key, value, maps in zip(query.key.split(size), query.value.split(size), features, strict=True)
    ]

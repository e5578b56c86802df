"""Simulated rounds of scribbles: someone scribbles on a frame of each clip, all frames are segmented, and so on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from stm_kernels import space_time_memory_read
from stm_model.data.clips import Clip, generator
from stm_model.evaluation.metrics import region_similarity
from stm_model.interactive.scribbles import NONE, scribble_maps
from stm_model.interactive.synthesis import corrective, synthesize, synthesize_background
from stm_model.labels import VOID
from stm_model.network import STM, Query, soft_aggregate
from stm_model.training.loss import caller, frame_loss

BACKGROUND = 0.5
"""Share of clips in whose first round the background is scribbled on too."""
OVERLOOKED = 0.25
"""Share of the objects, and of the backgrounds, whose errors a correction leaves alone."""
AGAIN = 0.35
"""Share of the rounds after the first without scribbles: what was drawn is remembered with the masks made of it."""
WORST = 0.7
"""Share of the corrections that are made on the worst frame; the others are made on any."""


def segment_rounds(
    model: STM, clips: list[Clip], rounds: int, recompute: bool = False, **read_options: Any
) -> list[list[Tensor]]:
    """Segment the frames of a batch of clips again and again, after scribbles on another frame each time.

    The memory of a round are the frames that were scribbled on, each with all its scribbles and with its soft masks of
    the round before (detached), 0.5 everywhere in the first. All frames are queries, which are encoded once. The
    scribbles of a clip are a function of its seed and of what was predicted for it.

    Args:
        model: the network, guided by scribbles.
        clips, recompute, read_options: as in `segment_clips`.
        rounds: how many.

    Returns:
        For each round B logit maps `[T, n + 1, H, W]`, float32, background first.

    Source: Oh et al., DAVIS Challenge 2019, sections 2.4 and 3.2.
    """
    run = caller(recompute)
    annotators = [Annotator(clip) for clip in clips]
    lengths = [len(clip.frames) for clip in clips]
    objects = [clip.objects for clip in clips for _ in clip.frames]
    query = Query(*run(model.encode_query, torch.cat([clip.frames for clip in clips])))
    masks = [clip.frames.new_full((len(clip.frames), clip.objects, *clip.frames.shape[2:]), 0.5) for clip in clips]
    predictions: list[list[Tensor]] = []
    for _ in range(rounds):
        for clip, annotator in enumerate(annotators):
            annotator.scribble(_labels(predictions[-1][clip]) if predictions else None)
        memories = _remember(model, annotators, masks, run)
        readouts = [_read(model, *one, read_options) for one in zip(memories, query.key.split(lengths))]
        probabilities = run(model.segment, torch.cat(readouts), query, objects)
        parts = probabilities.split([len(readout) for readout in readouts])
        apart = (rearrange(part, "(t n) h w -> n t h w", t=length) for part, length in zip(parts, lengths))
        predictions.append([soft_aggregate(part).transpose(0, 1) for part in apart])
        masks = [torch.softmax(logits.detach(), 1)[:, 1:] for logits in predictions[-1]]
    return predictions


class Annotator:
    """Someone who scribbles on a clip: on every object of its first frame, from then on what is wrong somewhere."""

    def __init__(self, clip: Clip):
        self.clip, self.truth = clip, clip.labels.cpu().numpy()
        self.random = generator(clip.seed, 4)
        self.drawings: dict[int, np.ndarray] = {}
        """int8 labels `[H, W]` of each frame that was scribbled on, -1 where no scribble is."""

    def scribble(self, predicted: np.ndarray | None) -> None:
        """Draw on one frame, over what was drawn there before, or let the network look again at all that is drawn.

        Args:
            predicted: labels uint8 `[T, H, W]`; None in the first round.
        """
        if predicted is not None and self._chance() < AGAIN:
            return
        index = 0 if predicted is None else self._frame(predicted)
        drawing = self.drawings.setdefault(index, np.full(self.truth.shape[1:], NONE, dtype=np.int8))
        truth, objects = self.truth[index], range(1, self.clip.objects + 1)
        if predicted is not None:
            for label in (0, *objects):
                if self._chance() >= OVERLOOKED:
                    drawing[corrective(predicted[index], truth, label, self.random)[0]] = label
            return
        for label in objects:
            drawing[synthesize(truth == label, self.random)] = label
        if self._chance() < BACKGROUND:
            drawing[synthesize_background(truth > 0, self.random)] = 0

    def maps(self, index: int) -> tuple[Tensor, Tensor]:
        """Positive and negative scribbles of a frame that was drawn on: `[n, H, W]` each."""
        maps = scribble_maps(self.drawings[index], range(1, self.clip.objects + 1))
        return tuple(torch.from_numpy(drawn).to(self.clip.frames.device) for drawn in maps)

    def _frame(self, predicted: np.ndarray) -> int:
        if self._chance() < WORST:
            return int(np.argmin(region_similarities(predicted, self.truth, self.clip.objects)))
        return int(torch.randint(len(predicted), (), generator=self.random))

    def _chance(self) -> float:
        return float(torch.rand((), generator=self.random))


def region_similarities(predicted: np.ndarray, truth: np.ndarray, objects: int) -> np.ndarray:
    """Mean J over the objects 1…n, for each frame of label maps `[T, H, W]`."""
    return np.array(
        [
            np.mean([region_similarity(ours == label, true == label, true == VOID) for label in range(1, objects + 1)])
            for ours, true in zip(predicted, truth)
        ]
    )


def _remember(
    model: STM, annotators: list[Annotator], masks: list[Tensor], run: Callable
) -> list[tuple[Tensor, Tensor]]:
    """Keys `[n, C, A, h, w]` and values `[n, V, A, h, w]` of the A frames that each clip was scribbled on.

    The masks are `[T, n, H, W]` for each clip.
    """
    places = [(annotator, known, index) for annotator, known in zip(annotators, masks) for index in annotator.drawings]
    positive, negative = zip(*(annotator.maps(index) for annotator, _, index in places))
    keys, values = run(
        model.memorize_scribbles,
        torch.stack([annotator.clip.frames[index] for annotator, _, index in places]),
        torch.cat([known[index] for _, known, index in places]),
        torch.cat(positive),
        torch.cat(negative),
        [annotator.clip.objects for annotator, _, _ in places],
    )
    counts = [annotator.clip.objects * len(annotator.drawings) for annotator in annotators]
    return [
        tuple(rearrange(part, "(a n) d h w -> n d a h w", n=annotator.clip.objects) for part in memory)
        for annotator, *memory in zip(annotators, keys.split(counts), values.split(counts))
    ]


def _read(model: STM, memory: tuple[Tensor, Tensor], key: Tensor, read_options: dict[str, Any]) -> Tensor:
    """What the n objects of a clip read for its frames, `[T·n, V, h, w]`; the frames' keys are `[T, C, h, w]`."""
    # the frames side by side are one large query: the memory is not repeated for each
    query_key = rearrange(key, "t c h w -> 1 c (t h) w").expand(len(memory[0]), -1, -1, -1)
    readout = space_time_memory_read(query_key, *memory, similarity=model.config.similarity, **read_options)
    return rearrange(readout, "n v (t h) w -> (t n) v h w", t=len(key))


def _labels(logits: Tensor) -> np.ndarray:
    """Labels uint8 `[T, H, W]` of logits `[T, n + 1, H, W]`."""
    return logits.argmax(1).to(torch.uint8).cpu().numpy()


class RoundsLoss(nn.Module):
    """A network together with the loss of its rounds, the mean over clips, frames and rounds."""

    def __init__(self, model: STM, rounds: int, dice_weight: float, recompute: bool = False, **read_options: Any):
        super().__init__()
        self.model, self.rounds, self.dice_weight = model, rounds, dice_weight
        self.recompute, self.read_options = recompute, read_options

    def forward(self, clips: list[Clip]) -> Tensor:
        predictions = segment_rounds(self.model, clips, self.rounds, self.recompute, **self.read_options)
        losses = [
            frame_loss(logits, labels, self.dice_weight)
            for predicted in predictions
            for clip_logits, clip in zip(predicted, clips)
            for logits, labels in zip(clip_logits, clip.labels)
        ]
        return torch.stack(losses).mean()

    def predict(self, clip: Clip) -> list[Tensor]:
        """Logit maps `[n + 1, H, W]` of the frames of a clip after the last round."""
        return list(segment_rounds(self.model, [clip], self.rounds, **self.read_options)[-1][0])

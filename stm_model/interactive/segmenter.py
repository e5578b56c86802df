"""The network in a session: it memorizes annotated frames and segments any frame; features of frames are cached."""

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from stm_kernels import memory_read
from stm_model.network import STM, STRIDE, Query, as_positions, for_inference, soft_aggregate
from stm_model.network.encoders import FrameFeatures
from stm_model.tracking.frames import check_frame, check_side, pad_to_stride, prepare_frame, scaled_size

BATCH_BYTES = 64 * 2**20
"""Rough limit of the decoder's maps for the frames that are segmented together."""


class Annotation(NamedTuple):
    """What is known of n objects on one frame, at the network's size."""

    frame: int
    masks: Tensor  # [n, h, w] soft masks, 0.5 everywhere for an object without one
    positive: Tensor  # [n, h, w] 1 on the object's scribbles, else 0
    negative: Tensor  # [n, h, w] 1 on the scribbles of all other labels, else 0
    known: tuple[bool, ...]  # whether anything is known of each object here; where nothing is, it ignores the frame
    version: Hashable  # equal only for equal annotations of a frame


class Memory(NamedTuple):
    """What n objects remember of the annotated frames."""

    key: Tensor  # [n, N, C]
    value: Tensor  # [n, N, V]
    bias: Tensor | None  # [n, N] -inf where an object ignores a frame; None if no object ignores any


class Segmenter:
    """Segments frames of one video, uint8 `[H, W, 3]`, from annotated ones, by a network guided by scribbles.

    It runs at `size` pixels on the shorter side, None keeps the frames'; at most `memory_limit` bytes of features are
    cached.
    """

    def __init__(self, model: STM, frames: Sequence[np.ndarray], size: int | None, memory_limit: int):
        model.expect_guidance("scribbles")
        if not len(frames):
            raise ValueError("frames: expected at least one, got none")
        check_side(size)
        self.model, self.frames, self.memory_limit = for_inference(model), frames, memory_limit
        self.frame_size = check_frame(frames[0], 0, None).shape[:2]
        self.size = scaled_size(self.frame_size, size)
        self.device = next(self.model.parameters()).device
        self.encoded_frames = 0
        """How often a frame was encoded as a query."""
        self.held_bytes = 0
        """Bytes of the cached features."""
        self._queries: dict[int, Query] = {}
        self._remembered: dict[int, tuple[Hashable, Tensor, Tensor]] = {}

    @torch.inference_mode()
    def remember(self, annotations: Sequence[Annotation]) -> Memory:
        """The memory of annotated frames; those that did not change since the last call are not encoded again."""
        keys, values, ignored = [], [], []
        for annotation in annotations:
            if annotation.frame in self._remembered and self._remembered[annotation.frame][0] == annotation.version:
                key, value = self._remembered[annotation.frame][1:]
            else:
                key, value = self._encode_memory(annotation)
                self._remembered[annotation.frame] = annotation.version, key, value
            keys.append(key)
            values.append(value)
            ignored.append(~torch.tensor(annotation.known, device=self.device)[:, None].expand(key.shape[:2]))
        hidden = torch.cat(ignored, 1)
        bias = torch.zeros(hidden.shape, device=self.device).masked_fill(hidden, -torch.inf) if hidden.any() else None
        return Memory(torch.cat(keys, 1), torch.cat(values, 1), bias)

    @torch.inference_mode()
    def segment(self, memory: Memory, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Index and probabilities of each frame, float32 `[n + 1, h, w]` on the CPU; several frames run at once."""
        # the decoder's maps at a quarter of the size, and probabilities
        pixels = self.size[0] * self.size[1] * len(memory.key)
        together = max(1, int(BATCH_BYTES // (pixels * (self.model.config.decoder_channels / 16 * 4 * 4 + 16))))
        for start in range(0, len(indices), together):
            batch = indices[start : start + together]
            yield from zip(batch, self._segment(memory, self._query(batch)).cpu())

    def _segment(self, memory: Memory, query: Query) -> Tensor:
        """Probabilities `[B, n + 1, h, w]` of B frames."""
        objects, (frames, _, height, width) = len(memory.key), query.key.shape
        # one read for each object: the positions of all frames side by side are its queries
        keys = repeat(as_positions(query.key), "b m c -> n (b m) c", n=objects)
        readout = memory_read(
            keys, memory.key, memory.value, similarity=self.model.config.similarity, key_bias=memory.bias
        )
        readout = rearrange(readout, "n (b h w) v -> (b n) v h w", b=frames, h=height, w=width)
        found = self.model.segment(readout, query, [objects] * frames)
        top, left = ((STRIDE * grid - side) // 2 for grid, side in zip((height, width), self.size))
        found = found[:, top : top + self.size[0], left : left + self.size[1]]
        logits = soft_aggregate(rearrange(found, "(b n) h w -> n b h w", n=objects))
        return rearrange(torch.softmax(logits, 0), "n b h w -> b n h w")

    def _query(self, indices: Sequence[int]) -> Query:
        """The features of frames; those that are not cached are encoded together."""
        missing = [index for index in indices if index not in self._queries]
        encoded = {}
        if missing:
            images = torch.cat([pad_to_stride(self._prepare(index))[0] for index in missing])
            query = self.model.encode_query(images)
            self.encoded_frames += len(missing)
            shared = self.model.shares_keys
            encoded = {index: _part(query, place, shared) for place, index in enumerate(missing)}
        for index, query in encoded.items():
            size = sum(part.nbytes for part in (query.key, query.value, *query.features))
            if self.held_bytes + size <= self.memory_limit:
                self._queries[index] = query
                self.held_bytes += size
        parts = [encoded.get(index) or self._queries[index] for index in indices]
        keys, values, features = zip(*parts)
        return Query(torch.cat(keys), torch.cat(values), FrameFeatures(*(torch.cat(maps) for maps in zip(*features))))

    def _encode_memory(self, annotation: Annotation) -> tuple[Tensor, Tensor]:
        """Key `[n, h·w, C]` and value `[n, h·w, V]` of an annotated frame."""
        image = pad_to_stride(self._prepare(annotation.frame))[0]
        masks, positive, negative = (pad_to_stride(part.to(self.device))[0] for part in annotation[1:4])
        key, value = self.model.memorize_scribbles(image, masks, positive, negative, [len(annotation.known)])
        return as_positions(key), as_positions(value)

    def _prepare(self, index: int) -> Tensor:
        """A frame as float32 `[1, 3, h, w]` in 0…1 at the network's size, not yet padded."""
        frame = check_frame(np.asarray(self.frames[index]), index, self.frame_size)
        return prepare_frame(frame, self.size, self.device)


def _part(query: Query, place: int, shared: bool) -> Query:
    """One frame of a query in memory of its own, without what the decoder does not see: the deepest map, or in the
    shared form the value.
    """
    key, value, *maps = (part[place : place + 1] for part in (query.key, query.value, *query.features))
    if shared:
        value = value[:, :0]
    else:
        maps[0] = maps[0][:, :0]
    return Query(key.clone(), value.clone(), FrameFeatures(*(part.clone() for part in maps)))

"""The network in a session: annotated frames are remembered, all others asked; what a frame looks like is kept."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from stm_kernels import memory_read
from stm_model.network import STM, STRIDE, Query, as_positions, fold_batch_norm, soft_aggregate
from stm_model.network.encoders import FrameFeatures
from stm_model.tracking.tracker import check_frame, network_size, pad_to_stride

BATCH_BYTES = 64 * 2**20
"""What the decoder may hold of the frames that are segmented together, roughly."""


class Annotation(NamedTuple):
    """What is known of n objects on one frame, at the network's size."""

    frame: int
    """Its index."""
    masks: Tensor
    """`[n, h, w]` soft masks; 0.5 everywhere for an object without."""
    positive: Tensor
    """`[n, h, w]` 1 on an object's scribbles, else 0."""
    negative: Tensor
    """`[n, h, w]` 1 on the scribbles of all other labels, else 0."""
    known: tuple[bool, ...]
    """Whether anything is known of an object here; where nothing is, the frame is not remembered for it."""
    version: Hashable
    """Equal for two annotations of a frame only if they are the same."""


class Memory(NamedTuple):
    """What n objects remember."""

    key: Tensor
    """`[n, N, C]`"""
    value: Tensor
    """`[n, N, V]`"""
    bias: Tensor | None
    """`[n, N]`, -inf where a frame is not remembered for an object; None where all are."""


class Segmenter:
    """Segments frames of one video from annotated ones.

    Args:
        model: a network guided by scribbles; its device and dtype are where and how it runs.
        frames: uint8 `[H, W, 3]`, all of one size.
        size: shorter side in pixels at which the network runs; None is the frames' own.
        memory_limit: bytes that features of frames may take between rounds; frames beyond are encoded anew each time.

    Raises:
        ValueError: the network is guided by masks, there are no frames, or the size makes no sense.
    """

    def __init__(self, model: STM, frames: Sequence[np.ndarray], size: int | None, memory_limit: int):
        model.expect_guidance("scribbles")
        if not len(frames):
            raise ValueError("frames: expected at least one, got none")
        if size is not None and size < STRIDE:
            raise ValueError(f"size: expected at least {STRIDE} pixels, got {size}")
        self.model, self.frames, self.memory_limit = fold_batch_norm(model), frames, memory_limit
        self.frame_size = check_frame(frames[0], 0, None).shape[:2]
        self.size = network_size(self.frame_size, size)
        self.device = next(self.model.parameters()).device
        self.encoded_frames = 0
        """How often a frame was encoded as a query."""
        self.held_bytes = 0
        """What the features that are kept take."""
        self._queries: dict[int, Query] = {}
        self._remembered: dict[int, tuple[Hashable, Tensor, Tensor]] = {}

    @torch.inference_mode()
    def remember(self, annotations: Sequence[Annotation]) -> Memory:
        """Put annotated frames into a memory; those that did not change since are not encoded again."""
        rows, hidden = [], []
        for annotation in annotations:
            version, *row = self._remembered.get(annotation.frame, (None, None, None))
            if version != annotation.version:
                row = self._encode_memory(annotation)
                self._remembered[annotation.frame] = (annotation.version, *row)
            rows.append(row)
            hidden += [~torch.tensor(annotation.known, device=self.device)[:, None].expand(row[0].shape[:2])]
        hidden = torch.cat(hidden, 1)
        bias = torch.zeros(hidden.shape, device=self.device).masked_fill(hidden, -torch.inf) if hidden.any() else None
        return Memory(*(torch.cat(parts, 1) for parts in zip(*rows)), bias)

    @torch.inference_mode()
    def segment(self, memory: Memory, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Segment frames, several at once.

        Yields:
            Index and probabilities `[n + 1, h, w]` float32 on the CPU, background first, in the order of `indices`.
        """
        # the decoder's maps at a quarter of the size, and probabilities
        pixels = self.size[0] * self.size[1] * len(memory.key)
        together = max(1, int(BATCH_BYTES // (pixels * (self.model.config.decoder_channels / 16 * 4 * 4 + 16))))
        for start in range(0, len(indices), together):
            batch = indices[start : start + together]
            yield from zip(batch, self._segment(memory, self._query(batch)).cpu())

    def _segment(self, memory: Memory, query: Query) -> Tensor:
        """Probabilities `[B, n + 1, h, w]` of the B frames of a query."""
        objects, (frames, _, height, width) = len(memory.key), query.key.shape
        # the frames' positions side by side are the queries of one read for each object
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
        """The features of frames, those that are not kept encoded together."""
        missing = [index for index in indices if index not in self._queries]
        encoded = {}
        if missing:
            images = torch.cat([pad_to_stride(self._prepare(index))[0] for index in missing])
            query = self.model.encode_query(images)
            self.encoded_frames += len(missing)
            encoded = {index: _part(query, place) for place, index in enumerate(missing)}
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
        maps = (pad_to_stride(part.to(self.device))[0] for part in annotation[1:4])
        key, value = self.model.memorize_scribbles(image, *maps, [len(annotation.known)])
        return as_positions(key), as_positions(value)

    def _prepare(self, index: int) -> Tensor:
        """A frame as float32 `[1, 3, h, w]` in 0…1 at the network's size, not yet padded."""
        # a copy: frames of a file may not be written to, which PyTorch does not know of
        frame = check_frame(np.array(self.frames[index]), index, self.frame_size)
        pixels = torch.from_numpy(frame).to(self.device)
        image = pixels.permute(2, 0, 1)[None].contiguous().float() / 255
        if self.size != self.frame_size:
            image = F.interpolate(image, self.size, mode="bilinear", align_corners=False, antialias=True).clamp_(0, 1)
        return image


def _part(query: Query, place: int) -> Query:
    """One frame of a query, by itself in memory, without the map that only the key and the value are made of."""
    own = [part[place : place + 1].clone() for part in (query.key, query.value, *query.features[1:])]
    return Query(*own[:2], FrameFeatures(own[0][:, :0], *own[2:]))

"""The network's parts and one tracked frame, as they run by default and as public code runs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.tracker import VERSIONS, agreement, build_tracker, network_of, steady_memory
from stm_model import STM
from stm_model.data.synthetic import procedural_clip
from stm_model.network import fold_batch_norm
from stm_model.runtime import default_dtype

OBJECTS = 2
Part = Callable[[STM, Tensor, Tensor], Any]


def encode_query(model: STM, frame: Tensor, masks: Tensor) -> Tensor:
    return model.encode_query(frame).key


def memorize(model: STM, frame: Tensor, masks: Tensor) -> Tensor:
    return model.memorize(frame, masks, masks.flip(0), [OBJECTS])[1]


def segment(model: STM, frame: Tensor, masks: Tensor) -> Tensor:
    """The decoder alone: what it decodes is found once for each network and frame."""
    if getattr(model, "decoded", None) != frame.shape:
        query = model.encode_query(frame)
        model.decoded, model.decoder_input = frame.shape, (query.value.repeat(OBJECTS, 1, 1, 1), query)
    return model.segment(*model.decoder_input, [OBJECTS])


@pytest.fixture(scope="module")
def networks() -> dict[str, STM]:
    """The released shape: naive, the default, and float64, which is the truth."""
    naive = network_of("released").requires_grad_(False)
    default = fold_batch_norm(naive).to(dtype=default_dtype("cpu"), memory_format=torch.channels_last)
    plain = network_of("released").requires_grad_(False).to(default_dtype("cpu"))
    return {"naive": naive, "default": default, "plain": plain, "truth": network_of("released").double()}


def error(networks: dict[str, STM], name: str, part: Part) -> float:
    """How far one network's part is from float64 on a small frame, of the largest entry."""
    frame, masks = inputs((96, 160))
    truth = part(networks["truth"], frame.double(), masks.double()).double()
    return ((part(networks[name], frame, masks).double() - truth).abs().max() / truth.abs().max()).item()


def inputs(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    frames, labels = procedural_clip(2, size, OBJECTS, seed=0)
    frame = torch.from_numpy(frames[0]).permute(2, 0, 1)[None].float() / 255
    return frame, torch.stack([torch.from_numpy(labels[0] == label).float() for label in range(1, OBJECTS + 1)])


@pytest.mark.parametrize("part", [encode_query, memorize, segment], ids=["query_encoder", "memory_encoder", "decoder"])
@torch.inference_mode()
def test_network(race: Callable, quick: bool, networks: dict[str, STM], part: Part) -> None:
    # folding rounds the weights once more than plain conversion does
    allowed = 2 * error(networks, "plain", part) + torch.finfo(default_dtype("cpu")).eps
    assert error(networks, "default", part) <= allowed
    frame, masks = inputs((240, 432) if quick else (480, 864))
    naive, default = networks["naive"], networks["default"]
    least = 0.9 if default_dtype("cpu") == torch.float32 else 1.3
    race(lambda: part(default, frame, masks), lambda: part(naive, frame, masks), 7, least)


def test_tracked_frame(race: Callable, quick: bool) -> None:
    """A frame of a video, with 5 remembered ones and 2 objects, by the default weights."""
    size = (240, 432) if quick else (480, 854)
    assert agreement("cpu", OBJECTS, size, None, frames=4) >= 0.98
    frames, labels = procedural_clip(12, size, OBJECTS, seed=0)
    tracks = {}
    for version in VERSIONS:
        tracker = build_tracker(version, network_of("default"), "cpu", steady_memory(5))
        tracks[version] = tracker.track((frames[index % len(frames)] for index in itertools.count()), {0: labels[0]})
        for _ in range(5):
            next(tracks[version])
    race(lambda: next(tracks["default"]), lambda: next(tracks["naive"]), 9, 1.0)
    for track in tracks.values():
        track.close()

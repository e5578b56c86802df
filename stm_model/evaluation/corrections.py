"""Corrections, as a user makes them: the true mask of a video's worst frame is given, and it is tracked anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from stm_model.evaluation.protocol import Dataset, Video
from stm_model.evaluation.scoring import ObjectScore
from stm_model.evaluation.tables import mean_contour, mean_region

SEARCHED = 0.75
"""The worst frame is sought in this share of a video's scored frames, the first, so that some come after it."""

Round = tuple[Dataset, list[ObjectScore]]
"""A split as it was tracked, with the corrections so far, and its scores."""


def corrected(dataset: Dataset, scores: Sequence[ObjectScore]) -> Dataset:
    """A split in which each video's worst frame is corrected as well: that of the lowest J, mean over objects."""
    return replace(dataset, videos=tuple(_corrected(video, scores) for video in dataset.videos))


def _corrected(video: Video, scores: Sequence[ObjectScore]) -> Video:
    means = _frame_means(video.name, scores)
    searched = sorted(means)[: round(SEARCHED * len(means))]
    left = [frame for frame in searched if frame not in video.corrected]
    worst = min(left, key=means.__getitem__, default=None)
    return video if worst is None else replace(video, corrected=(*video.corrected, worst))


def correction_rows(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """What each correction changed.

    Args:
        rounds: without a correction, with one of each video, with two, …

    Returns:
        A row a round: `J-Mean` and `F-Mean` of all frames; of the frames after the last correction J `before` and
        `after` it, mean over videos; `frames`, video → the frame that was corrected.
    """
    rows = []
    for place, (dataset, scores) in enumerate(rounds):
        row: dict[str, Any] = {"corrections": place, "J-Mean": mean_region(scores), "F-Mean": mean_contour(scores)}
        if place:
            undone, earlier = rounds[place - 1]
            known = {video.name: video.corrected for video in undone.videos}
            frames = {each.name: each.corrected[-1] for each in dataset.videos if each.corrected != known[each.name]}
            before, after = _later_mean(frames, earlier), _later_mean(frames, scores)
            row |= {"frames": frames} | ({} if before is None else {"before": before, "after": after})
        rows.append(row)
    return rows


def _later_mean(frames: Mapping[str, int], scores: Sequence[ObjectScore]) -> float | None:
    """J of the frames after those given, mean over frames, then over videos."""
    means = []
    for video, corrected_at in frames.items():
        if later := [mean for frame, mean in _frame_means(video, scores).items() if frame > corrected_at]:
            means.append(fmean(later))
    return fmean(means) if means else None


def _frame_means(video: str, scores: Sequence[ObjectScore]) -> dict[int, float]:
    """J of each frame of a video, mean over objects."""
    found: dict[int, list[float]] = {}
    for score in scores:
        if score.video == video:
            for frame, value in zip(score.frames, score.region):
                found.setdefault(frame, []).append(value)
    return {frame: fmean(values) for frame, values in found.items()}

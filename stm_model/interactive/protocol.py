"""DAVIS' interactive protocol: a robot corrects the worst frame again and again, and accuracy is drawn over time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

import numpy as np

from stm_model.evaluation.metrics import contour_accuracy, region_similarity
from stm_model.interactive.robot import first_frame, robot_scribbles, worst_frame
from stm_model.interactive.scribbles import Scribble
from stm_model.io.images import VOID

INTERACTIONS = 8
"""Rounds of scribbling."""
SECONDS = 30.0
"""Time that a system has in each round for each object."""
THRESHOLD = 60.0
"""Seconds at which the curve is read off."""


class Session(Protocol):
    """What is evaluated: `ScribbleSession`, or anything that behaves like it."""

    def add_scribbles(self, frame_index: int, scribbles: Sequence[Scribble]) -> None:
        """Take the scribbles of a frame."""

    def run(self) -> None:
        """Segment the video from all scribbles so far."""

    def masks(self) -> np.ndarray:
        """Labels of all frames, uint8 `[T, H, W]`."""


@dataclass(frozen=True)
class Round:
    """One interaction: scribbles given, masks returned and scored."""

    frame: int
    """Frame that was scribbled on."""
    scribbles: int
    """Scribbles on it."""
    seconds: float
    """From the scribbles to the masks."""
    region: float
    """Mean J over all frames and objects, the first and last frame among them."""
    contour: float
    """Mean F."""

    @property
    def both(self) -> float:
        """J&F."""
        return (self.region + self.contour) / 2


@dataclass(frozen=True)
class Sample:
    """A video segmented in rounds, from one set of first scribbles."""

    video: str
    """Its name."""
    start: str
    """Where the first scribbles came from: `robot`, or a file's name."""
    objects: int
    """Number of objects."""
    interactions: int
    """Rounds that were allowed."""
    rounds: tuple[Round, ...]
    """Those that were done: fewer where nothing was left to correct or the time was over."""

    @property
    def budget(self) -> float:
        """Seconds allowed for all rounds together."""
        return SECONDS * self.objects * self.interactions

    def after(self, rounds: int, measure: str = "both") -> float:
        """A measure (`region`, `contour` or `both`) after so many rounds; later ones than were done leave it as it was.

        0 before the first.
        """
        done = self.rounds[:rounds]
        return getattr(done[-1], measure) if done else 0.0

    def curve(self) -> tuple[list[float], list[float]]:
        """Seconds, and J&F then: from 0 at the start straight to each round's, and level until the budget's end."""
        times = np.cumsum([0.0, *(done.seconds for done in self.rounds)]).tolist()
        values = [0.0, *(done.both for done in self.rounds)]
        return [*times, self.budget], [*values, values[-1]]

    @property
    def area(self) -> float:
        """Area under J&F over time, over the budget: from 0 to 1.

        Source: the DAVIS challenge's AUC. There the curves of all samples are averaged first; here each sample has its
        own, and a budget in proportion to its objects, and the areas are averaged.
        """
        times, values = self.curve()
        return float(np.trapezoid(values, times) / self.budget)

    @property
    def at_threshold(self) -> float:
        """J&F after 60 seconds, on the straight line between the rounds before and after."""
        return float(np.interp(THRESHOLD, *self.curve()))


def run_rounds(
    session: Session,
    truths: Sequence[np.ndarray],
    objects: Collection[int],
    *,
    first: tuple[int, Sequence[Scribble]] | None = None,
    interactions: int = INTERACTIONS,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[tuple[Round, np.ndarray]]:
    """Scribble, segment and score, until the rounds or the time are used up or nothing is left to correct.

    The first scribbles are given, or the robot's on the frame that shows the objects best; the next ones are the
    robot's, on the frame with the lowest J&F among those not scribbled on. Time runs while the session works, not while
    it is scored. A round that ends after the budget, 30 seconds a round and object, counts as not done.

    Args:
        session: of the video.
        truths: labels of all frames, uint8 `[H, W]`; 255 is void.
        objects: labels that are scored.
        first: frame and scribbles to begin with; None is the robot's.
        interactions: rounds allowed.
        clock: says the time in seconds.

    Yields:
        Each round, and the masks after it, uint8 `[T, H, W]`.

    Source: Caelles et al. 2018; interactive.davischallenge.org, where the first scribbles are a person's.
    """
    left = SECONDS * len(objects) * interactions
    used: list[int] = []
    if first is None:
        frame = first_frame(truths, objects)
        first = frame, robot_scribbles(np.zeros_like(truths[frame]), truths[frame], objects)
    frame, scribbles = first
    for _ in range(interactions):
        start = clock()
        session.add_scribbles(frame, scribbles)
        session.run()
        masks = session.masks()
        seconds = clock() - start
        left -= seconds
        if left < 0:
            return
        region, contour = score_frames(masks, truths, objects)
        yield Round(frame, len(scribbles), seconds, float(region.mean()), float(contour.mean())), masks
        used.append(frame)
        scores = dict(enumerate((region + contour).mean(1) / 2))
        frame, scribbles = next_scribbles(masks, truths, objects, scores, used)
        if not scribbles:
            return


def next_scribbles(
    masks: np.ndarray,
    truths: Sequence[np.ndarray],
    objects: Collection[int],
    scores: Mapping[int, float],
    used: Collection[int],
) -> tuple[int, list[dict[str, Any]]]:
    """The worst frame on which the robot finds something to correct, and its scribbles; none if nowhere is any."""
    waiting = dict(scores)
    while waiting:
        frame = worst_frame(waiting, used)
        if scribbles := robot_scribbles(masks[frame], truths[frame], objects):
            return frame, scribbles
        del waiting[frame]
    return 0, []


def score_frames(
    masks: Sequence[np.ndarray], truths: Sequence[np.ndarray], objects: Collection[int]
) -> tuple[np.ndarray, np.ndarray]:
    """J and F of each object in each frame, `[T, n]`; for the arguments see `run_rounds`."""
    triples = [
        (mask == label, truth == label, truth == VOID) for mask, truth in zip(masks, truths) for label in objects
    ]
    shape = (len(truths), len(objects))
    return tuple(
        np.reshape([measure(*triple) for triple in triples], shape) for measure in (region_similarity, contour_accuracy)
    )


def summarize_samples(samples: Sequence[Sample], interactions: int) -> dict[str, float]:
    """Means over samples: J, F and J&F after rounds 1, 3 and the last, the area under J&F over time, J&F at 60 s."""
    measures = {"J&F": "both", "J": "region", "F": "contour"}
    after = {
        name: {
            f"{name}@{rounds}": fmean(sample.after(rounds, measure) for sample in samples)
            for rounds in sorted({1, min(3, interactions), interactions})
        }
        for name, measure in measures.items()
    }
    over_time = {
        "AUC": fmean(sample.area for sample in samples),
        "J&F@60s": fmean(sample.at_threshold for sample in samples),
    }
    return after["J&F"] | over_time | after["J"] | after["F"]

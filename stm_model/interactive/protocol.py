"""DAVIS' interactive protocol: a robot corrects the worst frame again and again; accuracy is measured over time.

`drive` plays it in a session of the package `davisinteractive`, where that is installed:

    with DavisInteractiveSession(host="localhost", davis_root=root, max_nb_interactions=8, max_time=240) as official:
        drive(official, STM.load(DEFAULT_INTERACTIVE_WEIGHTS), read_frames, size=480)
        summary = official.get_global_summary()
"""

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from stm_model.evaluation.metrics import label_scores
from stm_model.interactive.config import INTERACTIONS
from stm_model.interactive.robot import first_frame, robot_scribbles
from stm_model.interactive.scribbles import Scribble, parse_scribbles
from stm_model.interactive.session import ScribbleSession
from stm_model.network import STM

SECONDS = 30.0
"""Time budget of each round for each object."""
THRESHOLD = 60.0
"""Seconds at which the curve is read off."""


@dataclass(frozen=True)
class Round:
    """One interaction: scribbles given, masks returned and scored."""

    frame: int
    scribbles: int  # how many were drawn on it
    seconds: float  # from the scribbles to the masks
    region: float  # mean J over all frames and objects, the first and last frame included
    contour: float  # mean F

    @property
    def both(self) -> float:
        """J&F."""
        return (self.region + self.contour) / 2


@dataclass(frozen=True)
class Sample:
    """A video segmented in rounds, from one set of first scribbles."""

    name: str
    """VIDEO where the robot begins, VIDEO/NAME where the first scribbles come from the file NAME.json."""
    objects: int
    interactions: int  # rounds allowed
    rounds: tuple[Round, ...]  # rounds done: fewer if nothing was left to correct or the time was up

    @property
    def budget(self) -> float:
        """Seconds allowed for all rounds together."""
        return SECONDS * self.objects * self.interactions

    def after(self, rounds: int, measure: str = "both") -> float:
        """A measure (`region`, `contour` or `both`) after so many rounds, or after the last one done; 0 before any."""
        done = self.rounds[:rounds]
        return getattr(done[-1], measure) if done else 0.0

    def curve(self) -> tuple[list[float], list[float]]:
        """Seconds and J&F at the corners of the curve: from 0 straight to each round's, then level to the budget."""
        times = np.cumsum([0.0, *(done.seconds for done in self.rounds)]).tolist()
        values = [0.0, *(done.both for done in self.rounds)]
        return [*times, self.budget], [*values, values[-1]]

    @property
    def area(self) -> float:
        """Area under J&F over time, divided by the budget: 0 to 1.

        Source: the DAVIS challenge's AUC. The challenge averages the curves of all samples first; here each sample has
        its own curve, and a budget in proportion to its objects, and the areas are averaged.
        """
        times, values = self.curve()
        return float(np.trapezoid(values, times) / self.budget)

    @property
    def at_threshold(self) -> float:
        """J&F after 60 seconds, interpolated between rounds."""
        return float(np.interp(THRESHOLD, *self.curve()))


def run_rounds(
    session: ScribbleSession,
    truths: Sequence[np.ndarray],
    objects: Collection[int],
    *,
    first: tuple[int, Sequence[Scribble]] | None = None,
    interactions: int = INTERACTIONS,
    name: str = "video",
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[tuple[Round, np.ndarray]]:
    """Scribble, segment and score, until the rounds or the time are used up or nothing is left to correct.

    After the first round the robot scribbles on the frame with the lowest J&F among those not scribbled on. Time runs
    while the session works, not while it is scored. A round that ends after the budget, 30 seconds a round and object,
    does not count, and a warning says so.

    Args:
        truths: labels of all frames, uint8 `[H, W]`; 255 is void.
        objects: labels that are scored.
        first: frame and scribbles to begin with; None lets the robot begin, on the frame that shows the objects best.
        interactions: rounds allowed.
        name: what a warning calls the video.

    Yields:
        Each round and its masks, uint8 `[T, H, W]`.

    Source: Caelles et al. 2018; interactive.davischallenge.org, where the first scribbles are a person's.
    """
    left = budget = SECONDS * len(objects) * interactions
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
            late = f"round {len(used) + 1} ended {budget - left:.0f} s after the start, {budget:.0f} s are allowed"
            warnings.warn(f"{name}: {late}: it does not count, is the machine busy?", stacklevel=2)
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
    """The frame with the lowest score on which the robot finds an error, and its scribbles; none if it finds no error.

    Frames used before come last; of equal scores the earliest frame comes first.
    """
    for frame in sorted(scores, key=lambda frame: (frame in used, scores[frame], frame)):
        if scribbles := robot_scribbles(masks[frame], truths[frame], objects):
            return frame, scribbles
    return 0, []


def score_frames(
    masks: np.ndarray, truths: Sequence[np.ndarray], objects: Collection[int]
) -> tuple[np.ndarray, np.ndarray]:
    """J and F of each object in each frame, `[T, n]`."""
    region, contour = np.empty((2, len(truths), len(objects)))
    for frame, (mask, truth) in enumerate(zip(masks, truths)):
        for n, label in enumerate(objects):
            region[frame, n], contour[frame, n] = label_scores(mask, truth, label)
    return region, contour


def summarize_samples(samples: Sequence[Sample], interactions: int) -> dict[str, float]:
    """Means over samples: J&F after rounds 1, 3 and the last, AUC, J&F at 60 s, then J and F as J&F."""

    def after(name: str, measure: str) -> dict[str, float]:
        return {
            f"{name}@{rounds}": fmean(sample.after(rounds, measure) for sample in samples)
            for rounds in sorted({1, min(3, interactions), interactions})
        }

    over_time = {
        "AUC": fmean(sample.area for sample in samples),
        "J&F@60s": fmean(sample.at_threshold for sample in samples),
    }
    return after("J&F", "both") | over_time | after("J", "region") | after("F", "contour")


def drive(
    official: Any, model: STM, read_frames: Callable[[str], Sequence[np.ndarray]], *, size: int | None = None
) -> None:
    """Answer every interaction of an open `davisinteractive` session with our masks.

    Args:
        official: the session; its own clock runs between its `get_scribbles` and `submit_masks`.
        model: a network guided by scribbles.
        read_frames: sequence name → its frames, uint8 `[H, W, 3]`.
        size: shorter side in pixels at which the network runs; None keeps the frames' own.

    Source: the package's user guide, interactive.davischallenge.org/user_guide/usage.
    """
    session = None
    while official.next():
        sequence, content, is_new = official.get_scribbles(only_last=True)
        if is_new or session is None:
            session = ScribbleSession(model, read_frames(sequence), size=size)
        for frame, scribbles in parse_scribbles(content, len(session.frames)).items():
            session.add_scribbles(frame, scribbles)
        session.run()
        official.submit_masks(session.masks())

"""Charts of scores by matplotlib, and error maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from stm_model.evaluation.scoring import ObjectScore
from stm_model.evaluation.studies import PERCENTILES
from stm_model.evaluation.tables import mean_contour, mean_region
from stm_model.io.files import whole
from stm_model.labels import VOID

# Okabe & Ito's colors, told apart with any kind of color vision
FALSE_POSITIVE, FALSE_NEGATIVE, CONFUSED = (213, 94, 0), (0, 114, 178), (204, 121, 167)
ERROR_COLORS = (
    (FALSE_POSITIVE, "false positive"),
    (FALSE_NEGATIVE, "false negative"),
    (CONFUSED, "another object's label"),
)
LINES = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))]
MAX_BARS, MAX_PANELS = 60, 24


def error_map(frame: np.ndarray, prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """A frame, uint8 RGB `[H, W, 3]`, in gray with the errors of its mask in color; labels are uint8 `[H, W]`.

    False positives are orange, false negatives blue, pixels with another object's label pink, true positives lighter
    than the background; void pixels of the truth stay gray.
    """
    gray = np.repeat(frame.mean(-1, keepdims=True), 3, axis=-1)
    known, predicted, true = truth != VOID, prediction > 0, (truth > 0) & (truth < VOID)
    result = gray * 0.55
    right = known & true & (prediction == truth)
    result[right] = gray[right] * 0.5 + 120
    for wrong, color in (
        (known & predicted & ~true, FALSE_POSITIVE),
        (known & ~predicted & true, FALSE_NEGATIVE),
        (known & predicted & true & (prediction != truth), CONFUSED),
    ):
        result[wrong] = gray[wrong] * 0.2 + np.array(color) * 0.8
    return result.round().astype(np.uint8)


def line_style(index: int) -> dict[str, Any]:
    """Color and dashes of the index-th line of a chart."""
    return {"color": LINES[index % len(LINES)], "linestyle": DASHES[index % len(DASHES)]}


def draw_bars(scores: Sequence[ObjectScore], floor: Mapping[str, float], path: Path) -> None:
    """J and F of every video, the lowest J on top, the floor's J as a tick."""
    videos = _lowest_first(scores)
    rows = videos[:MAX_BARS]
    names = [name for name, _ in rows]
    figure = Figure((6.4, 0.9 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))[::-1]
    axes.barh(places + 0.19, [mean_region(own) for _, own in rows], 0.36, color=LINES[1], label="J")
    axes.barh(places - 0.19, [mean_contour(own) for _, own in rows], 0.36, color=LINES[4], label="F")
    ticks = [floor.get(name, np.nan) for name in names]
    label = "J, first mask repeated"
    axes.plot(ticks, places + 0.19, "|", color="black", markersize=11, markeredgewidth=2, label=label)
    axes.set_yticks(places, names)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    if len(videos) > len(rows):
        axes.set_xlabel(f"the {len(rows)} lowest of {len(videos)} videos")
    save(figure, path)


def draw_over_time(scores: Sequence[ObjectScore], path: Path) -> None:
    """J of every object, frame by frame, a panel a video, the lowest first."""
    shown = _lowest_first(scores)[:MAX_PANELS]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure((6.4, 0.5 + 1.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel, (name, own) in zip(panels, shown):
        for index, score in enumerate(own):
            label = str(score.label) if len(own) > 1 else None
            panel.plot(score.frames, score.region, label=label, linewidth=1.4, **line_style(index))
        panel.set(title=name, ylim=(-0.02, 1.02))
        if len(own) > 1:
            panel.legend(fontsize=7, ncols=3, loc="lower left", title="object", title_fontsize=7)
    for panel in panels[len(shown) :]:
        panel.remove()
    figure.supxlabel("frame")
    figure.supylabel("J")
    save(figure, path)


def _lowest_first(scores: Sequence[ObjectScore]) -> list[tuple[str, list[ObjectScore]]]:
    """(video, its scores) by ascending mean J."""
    videos: dict[str, list[ObjectScore]] = {}
    for score in scores:
        videos.setdefault(score.video, []).append(score)
    return sorted(videos.items(), key=lambda item: (mean_region(item[1]), mean_contour(item[1]), item[0]))


def draw_study(title: str, rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """The distribution of J over frames, of each variant of a study."""
    figure = Figure((6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, row) in enumerate(rows.items()):
        label = f"{name} (mean {row['J-Mean']:.3f})" if "J-Mean" in row else name
        axes.plot(PERCENTILES, row["percentiles"], label=label, linewidth=1.8, **line_style(index))
    axes.set(xlabel="percentile of the frames, the hardest left", ylabel="J", xlim=(0, 100), ylim=(0, 1), title=title)
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.3)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        figure.savefig(partial, dpi=130)

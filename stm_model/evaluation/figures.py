"""Pictures of scores: curves and bars by matplotlib, error maps and sheets of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from stm_model.evaluation.scoring import ObjectScore
from stm_model.evaluation.studies import PERCENTILES, Study
from stm_model.io.images import VOID

# Okabe & Ito's, told apart with any kind of colour vision
FALSE_POSITIVE, FALSE_NEGATIVE, CONFUSED = (213, 94, 0), (0, 114, 178), (204, 121, 167)
LINES = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))]
MOST_BARS, MOST_PANELS = 60, 24


def error_map(frame: np.ndarray, prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """A frame in grey on which the errors of its mask are coloured.

    Args:
        frame: uint8 RGB `[H, W, 3]`.
        prediction: uint8 labels `[H, W]`.
        truth: uint8 labels `[H, W]`; 255 is void and stays grey.

    Returns:
        uint8 RGB `[H, W, 3]`: orange where an object was seen that is not there, blue where one was missed, pink where
        one was taken for another; right pixels of objects are lighter than the background.
    """
    grey = np.repeat(frame.mean(-1, keepdims=True), 3, axis=-1)
    known, seen, there = truth != VOID, prediction > 0, (truth > 0) & (truth < VOID)
    result = grey * 0.55
    right = known & there & (prediction == truth)
    result[right] = grey[right] * 0.5 + 120
    for wrong, colour in (
        (known & seen & ~there, FALSE_POSITIVE),
        (known & ~seen & there, FALSE_NEGATIVE),
        (known & seen & there & (prediction != truth), CONFUSED),
    ):
        result[wrong] = grey[wrong] * 0.2 + np.array(colour) * 0.8
    return result.round().astype(np.uint8)


def draw_bars(scores: Sequence[ObjectScore], floor: Mapping[str, float], path: Path) -> None:
    """J and F of every video, the lowest J on top, the floor's J as a tick."""
    videos: dict[str, list[ObjectScore]] = {}
    for score in scores:
        videos.setdefault(score.video, []).append(score)
    rows = sorted(
        (
            fmean(score.region_statistics.mean for score in members),
            fmean(score.contour_statistics.mean for score in members),
            name,
        )
        for name, members in videos.items()
    )[:MOST_BARS]
    figure = Figure((6.4, 0.9 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))[::-1]
    axes.barh(places + 0.19, [row[0] for row in rows], 0.36, color=LINES[1], label="J")
    axes.barh(places - 0.19, [row[1] for row in rows], 0.36, color=LINES[4], label="F")
    marks = [floor.get(name, np.nan) for *_, name in rows]
    axes.plot(
        marks, places + 0.19, "|", color="black", markersize=11, markeredgewidth=2, label="J, first mask repeated"
    )
    axes.set_yticks(places, [name for *_, name in rows])
    axes.set(xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    if len(videos) > len(rows):
        axes.set_xlabel(f"the {len(rows)} lowest of {len(videos)} videos")
    save(figure, path)


def draw_over_time(scores: Sequence[ObjectScore], path: Path) -> None:
    """J of every object, frame by frame, a panel a video, the lowest first."""
    videos: dict[str, list[ObjectScore]] = {}
    for score in scores:
        videos.setdefault(score.video, []).append(score)
    lowest = sorted(videos.items(), key=lambda item: fmean(score.region_statistics.mean for score in item[1]))
    shown = lowest[:MOST_PANELS]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure((6.4, 0.5 + 1.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel, (name, members) in zip(panels, shown):
        for index, score in enumerate(members):
            label = str(score.label) if len(members) > 1 else None
            style = {"color": LINES[index % len(LINES)], "linestyle": DASHES[index % len(DASHES)]}
            panel.plot(score.frames, score.region, label=label, linewidth=1.4, **style)
        panel.set(title=name, ylim=(-0.02, 1.02))
        if len(members) > 1:
            panel.legend(fontsize=7, ncols=3, loc="lower left", title="object", title_fontsize=7)
    for panel in panels[len(shown) :]:
        panel.remove()
    figure.supxlabel("frame")
    figure.supylabel("J")
    save(figure, path)


def draw_attributes(means: Mapping[str, tuple[float, int]], path: Path) -> None:
    """Mean J of the videos that have an attribute; attribute → (mean J, number of videos)."""
    figure = Figure((6.4, 0.8 + 0.28 * len(means)), layout="constrained")
    axes = figure.subplots()
    rows = sorted(means.items(), key=lambda item: -item[1][0])
    axes.barh(range(len(rows)), [mean for _, (mean, _) in rows], color=LINES[1])
    axes.set_yticks(range(len(rows)), [f"{name} ({count})" for name, (_, count) in rows])
    axes.set(xlim=(0, 1), xlabel="mean J (number of videos)")
    save(figure, path)


def draw_study(study: Study, rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A study's figure: how J is distributed over frames, or J, speed and memory of each variant."""
    if study.figure == "percentiles":
        figure = _percentiles(rows)
    else:
        figure = _panels(rows, bars=study.figure == "bars")
    figure.suptitle(study.title)
    save(figure, path)


def _percentiles(rows: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure = Figure((6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, row) in enumerate(rows.items()):
        style = {"color": LINES[index % len(LINES)], "linestyle": DASHES[index % len(DASHES)]}
        axes.plot(PERCENTILES, row["percentiles"], label=f"{name} (mean {row['J-Mean']:.3f})", linewidth=1.8, **style)
    axes.set(xlabel="percentile of the frames, the hardest left", ylabel="J", xlim=(0, 100), ylim=(0, 1))
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.3)
    return figure


def _panels(rows: Mapping[str, Mapping[str, Any]], bars: bool) -> Figure:
    wanted = {
        "J-Mean": "mean J",
        "Overall": "overall G",
        "FPS": "frames a second",
        "Added-MiB": "memory above the network, MiB",
    }
    columns = [column for column in wanted if all(column in row for row in rows.values())]
    figure = Figure((3.2 * len(columns), 3.2), layout="constrained")
    for panel, column in zip(figure.subplots(1, len(columns), squeeze=False).ravel(), columns):
        values = [row[column] for row in rows.values()]
        if bars:
            panel.bar(range(len(rows)), values, 0.6, color=LINES[1])
            panel.set_xticks(range(len(rows)), list(rows))
        else:
            panel.plot(range(len(rows)), values, "o-", color=LINES[1])
            panel.set_xticks(range(len(rows)), list(rows))
            panel.set_xlabel("N")
        for place, value in enumerate(values):
            text = (
                f"{value:.3f}"
                if column in ("J-Mean", "Overall")
                else f"{value:.0f}"
                if value >= 100
                else f"{value:.1f}"
            )
            panel.annotate(
                text,
                (place, value),
                (0 if bars else 4, 4),
                textcoords="offset points",
                ha="center" if bars else "left",
                fontsize=8,
            )
        panel.set(title=wanted[column])
        panel.margins(x=0.12)
        panel.set_ylim(0, max(values) * 1.15 or 1)
        panel.title.set_fontsize(10)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=130)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

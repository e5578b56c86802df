"""Report of the interactive evaluation: a plot of its curves and a self-contained HTML page."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from stm_model.evaluation.figures import DASHES, LINES, save
from stm_model.evaluation.protocol import Dataset
from stm_model.evaluation.report import narrow, png_url, write_page
from stm_model.evaluation.scoring import read_result
from stm_model.interactive.protocol import THRESHOLD, Sample
from stm_model.io.images import contact_sheet, overlay, read_image, write_image

MAX_SAMPLES = 12
SHEET_FRAMES, SHEET_WIDTH = 4, 240
"""Frames of a sample on the contact sheet, and how wide each is in pixels."""


def write_interactive_report(dataset: Dataset, samples: Sequence[Sample], summary: dict[str, Any], out: Path) -> None:
    """Write curve.png, contact_sheet.png and report.html, which embeds both, into a folder that has masks/."""
    _draw_curves(samples, summary["scores"], out / "curve.png")
    _draw_sheet(dataset, samples, out)
    write_page(
        out / "report.html",
        Path(__file__).with_name("report.html"),
        title=f"{dataset.name}, split {dataset.split}",
        command=summary["command"],
        versions=summary["versions"],
        samples=samples,
        interactions=samples[0].interactions,
        where="{device}, {threads} CPU threads, {dtype}".format_map(summary),
        columns=list(summary["scores"]),
        rows=[*((row["sample"], row) for row in summary["samples"]), ("mean", summary["scores"])],
        threshold=f"{THRESHOLD:.0f}",
        curve=png_url(out / "curve.png"),
        sheet=png_url(out / "contact_sheet.png"),
    )


def _draw_curves(samples: Sequence[Sample], scores: dict[str, float], path: Path) -> None:
    """J&F over the rounds and over time: a line for each sample, a thick one for their mean."""
    rounds = range(1, samples[0].interactions + 1)
    figure = Figure((8.6, 3.8), layout="constrained")
    over_rounds, over_time = figure.subplots(1, 2, sharey=True)
    end = max(sum(done.seconds for done in sample.rounds) for sample in samples)
    times = np.linspace(0, max(end * 1.1, THRESHOLD), 400)
    for index, sample in enumerate(samples):
        style = {"color": LINES[index % len(LINES)], "linestyle": DASHES[index // len(LINES) % len(DASHES)]}
        label = sample.name if len(samples) <= MAX_SAMPLES else None
        over_rounds.plot(rounds, [sample.after(number) for number in rounds], linewidth=1, label=label, **style)
        over_time.plot(times, np.interp(times, *sample.curve()), linewidth=1, **style)
    means = [fmean(sample.after(number) for sample in samples) for number in rounds]
    over_rounds.plot(rounds, means, "o-", color="black", linewidth=2.4, markersize=4, label="mean")
    curves = np.mean([np.interp(times, *sample.curve()) for sample in samples], 0)
    over_time.plot(times, curves, color="black", linewidth=2.4)
    over_time.axvline(THRESHOLD, color="grey", linewidth=0.8)
    over_rounds.set(xlabel="round", ylabel="J&F", title=f"after {len(rounds)} rounds {means[-1]:.3f}", ylim=(0, 1))
    over_rounds.set_xticks(list(rounds))
    over_time.set(
        xlabel="seconds", title=f"AUC {scores['AUC']:.3f}, at 60 s {scores['J&F@60s']:.3f}", xlim=(0, times[-1])
    )
    for axes in (over_rounds, over_time):
        axes.grid(alpha=0.3)
    over_rounds.legend(loc="lower right", frameon=False, fontsize=8)
    save(figure, path)


def _draw_sheet(dataset: Dataset, samples: Sequence[Sample], out: Path) -> None:
    """Frames spread over the samples, one row a sample."""
    videos = {video.name: video for video in dataset.videos}
    tiles = []
    for sample in samples[:MAX_SAMPLES]:
        video = videos[sample.name.partition("/")[0]]
        for place in np.linspace(0, len(video.frame_paths) - 1, SHEET_FRAMES).round().astype(int):
            frame = read_image(video.frame_paths[place])
            labels = read_result(out / "masks" / sample.name / video.mask_name(place), video, frame.shape[:2])
            tiles.append(narrow(overlay(frame, labels), SHEET_WIDTH))
    write_image(out / "contact_sheet.png", contact_sheet(tiles, columns=SHEET_FRAMES))

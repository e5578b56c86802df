"""Scores summed up in the benchmarks' columns: CSV, JSON and what stands beside them, quoted from papers."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from stm_model.evaluation.predict import Speed
from stm_model.evaluation.protocol import SEEN, UNSEEN, Dataset
from stm_model.evaluation.scoring import ObjectScore
from stm_model.io.files import whole


@dataclass(frozen=True)
class Quoted:
    """A row of a published table."""

    system: str
    """Name of the method."""
    dataset: str
    """The benchmark."""
    values: Mapping[str, float]
    """Column → value, as published; shares, not percent."""
    source: str
    """Where it stands."""


_STM = "Oh et al., ICCV 2019"
_STM_TABLE_1 = "Oh et al., ICCV 2019, table 1"
QUOTED = (
    Quoted("STM (0.16 s a frame)", "davis2016", {"J-Mean": 0.887}, _STM),
    Quoted("STM", "davis2017", {"J-Mean": 0.792}, _STM),
    *(
        Quoted(name, "youtube_vos", {column: value for column, value in row.items() if value is not None}, _STM_TABLE_1)
        for name, *numbers in (
            ("OSMN", 0.512, 0.600, 0.601, 0.406, 0.440),
            ("MSK", 0.531, 0.599, 0.595, 0.450, 0.479),
            ("RGMP", 0.538, 0.595, None, 0.452, None),
            ("OnAVOS", 0.552, 0.601, 0.627, 0.466, 0.514),
            ("RVOS", 0.568, 0.636, 0.672, 0.455, 0.510),
            ("OSVOS", 0.588, 0.598, 0.605, 0.542, 0.607),
            ("S2S", 0.644, 0.710, 0.700, 0.555, 0.612),
            ("A-GAME", 0.661, 0.678, None, 0.608, None),
            ("PreMVOS", 0.669, 0.714, 0.759, 0.565, 0.637),
            ("BoLTVOS", 0.711, 0.716, None, 0.643, None),
            ("STM", 0.794, 0.797, 0.842, 0.728, 0.809),
        )
        for row in [dict(zip(("Overall", "J_seen", "F_seen", "J_unseen", "F_unseen"), numbers))]
    ),
)
"""Published results, as the papers print them."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation."""

    dataset: Dataset
    """What was scored."""
    masks: Path
    """Folder of the masks, laid out as a submission."""
    scores: list[ObjectScore]
    """Every object's score; empty where the ground truth is not public."""
    floor: list[ObjectScore]
    """The scores of the given masks repeated."""
    speed: Speed | None
    """How fast it was tracked; None if it was not."""
    summary: dict[str, Any]
    """What evaluation.json holds."""


def summarize(dataset: str, scores: Sequence[ObjectScore]) -> dict[str, float]:
    """A split's scores in its benchmark's columns; empty without scores.

    DAVIS and LVOS: means over objects of mean, recall and decay. YouTube-VOS: means over the objects of seen and of
    unseen categories, and the mean of these four (of two if one group is missing); where the categories are not known,
    as DAVIS.
    """
    if not scores:
        return {}
    groups = {group: [score for score in scores if score.group == group] for group in (SEEN, UNSEEN)}
    if dataset == "youtube_vos" and any(groups.values()):
        means = {
            f"{measure}_{group}": fmean(getattr(score, f"{attribute}_statistics").mean for score in members)
            for measure, attribute in (("J", "region"), ("F", "contour"))
            for group, members in groups.items()
            if members
        }
        return {"Overall": fmean(means.values())} | means
    row = {}
    for measure, attribute in (("J", "region"), ("F", "contour")):
        per_object = [getattr(score, f"{attribute}_statistics") for score in scores]
        for column in ("mean", "recall", "decay"):
            row[f"{measure}-{column.title()}"] = fmean(getattr(statistics, column) for statistics in per_object)
    return {"J&F-Mean": (row["J-Mean"] + row["F-Mean"]) / 2} | row


def mean_region(scores: Iterable[ObjectScore]) -> float:
    """Mean J over objects."""
    return fmean(score.region_statistics.mean for score in scores)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table; numbers get six digits. The file is there whole or not at all."""
    with whole(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([[f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row] for row in rows])


def write_score_tables(out: Path, dataset: Dataset, scores: Sequence[ObjectScore]) -> None:
    """The official evaluation's two files: all objects together, and object by object."""
    row = summarize(dataset.name, scores)
    write_csv(out / f"global_results-{dataset.split}.csv", list(row), [list(row.values())])
    grouped = any(score.group for score in scores)
    header = ["Sequence", "J-Mean", "F-Mean", *(["Group"] if grouped else [])]
    rows = [
        [f"{score.video}_{score.label}", score.region_statistics.mean, score.contour_statistics.mean]
        + ([score.group or ""] if grouped else [])
        for score in scores
    ]
    write_csv(out / f"per-sequence_results-{dataset.split}.csv", header, rows)


def score_records(scores: Sequence[ObjectScore]) -> list[dict[str, Any]]:
    """Every score for JSON, frame by frame."""
    return [
        {
            "video": score.video,
            "object": score.label,
            "group": score.group,
            "J": score.region_statistics._asdict(),
            "F": score.contour_statistics._asdict(),
            "frames": list(score.frames),
            "J_by_frame": [round(value, 6) for value in score.region],
            "F_by_frame": [round(value, 6) for value in score.contour],
        }
        for score in scores
    ]


def format_table(rows: Mapping[str, Mapping[str, float]], label: str = "") -> str:
    """Rows of numbers as aligned text."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    width = max(len(name) for name in (*rows, label))
    lines = [f"{label:{width}} " + " ".join(f"{column:>9}" for column in columns)]
    for name, row in rows.items():
        cells = [f"{row[column]:{max(9, len(column))}.3f}" if column in row else " " * 9 for column in columns]
        lines.append(f"{name:{width}} " + " ".join(cells))
    return "\n".join(lines)

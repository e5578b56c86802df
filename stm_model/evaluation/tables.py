"""Scores in the benchmarks' columns, as CSV, JSON and text, and published results to compare with."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from stm_model.evaluation.predict import Speed
from stm_model.evaluation.protocol import SEEN, UNSEEN, Dataset
from stm_model.evaluation.scoring import ObjectScore
from stm_model.io.files import whole


class Quoted(NamedTuple):
    """A row of a published table."""

    system: str
    source: str
    values: dict[str, float]
    """Column → value, in [0, 1]."""


def quoted_results(dataset: str) -> list[Quoted]:
    """Published results on a benchmark, as the papers print them."""
    with open(Path(__file__).with_name("quoted.csv"), encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.pop("dataset") == dataset]
    return [
        Quoted(row.pop("system"), row.pop("source"), {name: float(cell) for name, cell in row.items() if cell})
        for row in rows
    ]


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation."""

    dataset: Dataset
    masks: Path
    """Folder of the masks, laid out as a submission."""
    scores: list[ObjectScore]
    """Every object's score; empty where the ground truth is not public."""
    floor: list[ObjectScore]
    """The scores of the given masks repeated."""
    speed: Speed | None
    """Tracking speed; None for masks of others."""
    summary: dict[str, Any]
    """What evaluation.json holds."""


def summarize(dataset: str, scores: Sequence[ObjectScore]) -> dict[str, float]:
    """A split's scores in its benchmark's columns; empty without scores.

    DAVIS and LVOS: mean, recall and decay, averaged over objects. YouTube-VOS: J and F averaged over objects of seen
    and of unseen categories, and the mean of these four (two if a group is missing); as DAVIS if no category is known.
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


def mean_contour(scores: Iterable[ObjectScore]) -> float:
    """Mean F over objects."""
    return fmean(score.contour_statistics.mean for score in scores)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table with six digits a number, whole or not at all."""
    with whole(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([[f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row] for row in rows])


def write_score_tables(out: Path, dataset: Dataset, scores: Sequence[ObjectScore]) -> None:
    """Write the official evaluation's two files: means over objects, and object by object."""
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
    """Scores as JSON, frame by frame."""
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

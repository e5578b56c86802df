"""Studies: one split tracked with several settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stm_model.distributed import Ranks
from stm_model.evaluation.config import EvaluateConfig
from stm_model.evaluation.predict import Speed, track_videos_apart
from stm_model.evaluation.protocol import Dataset
from stm_model.evaluation.scoring import ObjectScore, score
from stm_model.evaluation.tables import summarize, write_csv

PERCENTILES = tuple(range(101))


class Study(NamedTuple):
    """Settings to compare."""

    title: str
    variants: Mapping[str, Mapping[str, Any]]
    """Name → arguments of the `Tracker` that differ."""


STUDIES = {
    "memory": Study(
        "Which frames are remembered",
        {
            "first": {"memory": "first"},
            "previous": {"memory": "previous"},
            "first + previous": {"memory": "first+previous"},
            "every 5": {"memory": "every:5"},
        },
    ),
    "every": Study(
        "One frame in N is remembered",
        {str(interval): {"memory": f"every:{interval}"} for interval in (1, 2, 5, 10, 20)},
    ),
    "read": Study(
        "How the memory is read",
        {
            "reference": {"implementation": "reference"},
            "fused": {"implementation": "auto"},
            "skip 1e-3": {"skip": 1e-3},
            "skip 1e-2": {"skip": 1e-2},
            "top 30": {"top_k": 30},
        },
    ),
}


def run_study(name: str, dataset: Dataset, config: EvaluateConfig, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Track a split with each variant of a study, each in a process of its own, and write its tables.

    Returns variant → its row: score columns, FPS, Peak-MiB, Added-MiB (above the loaded network), `percentiles` of J.
    """
    mine = ranks.share(dataset.videos, lambda video: len(video.frame_paths))
    rows: dict[str, dict[str, Any]] = {}
    for variant, options in STUDIES[name].variants.items():
        masks = config.out / "masks" / re.sub(r"\W+", "_", variant)
        task = (
            mine,
            config,
            config.tracker_options | dict(options),
            masks / dataset.submission_folder,
            not ranks.first,
        )
        speeds = ranks.each(lambda: track_videos_apart(*task))  # noqa: B023
        speed = sum(speeds[1:], start=speeds[0])
        scores = ranks.on_first(lambda: score(dataset, masks, workers=config.workers))  # noqa: B023
        rows[variant] = _row(dataset, scores, speed)
    ranks.on_first(lambda: _write(name, rows, config.out))
    return rows


def _row(dataset: Dataset, scores: list[ObjectScore], speed: Speed) -> dict[str, Any]:
    row: dict[str, Any] = summarize(dataset.name, scores) | {"FPS": speed.fps}
    if speed.peak_bytes is not None and speed.loaded_bytes is not None:
        row["Peak-MiB"] = speed.peak_bytes / 2**20
        row["Added-MiB"] = (speed.peak_bytes - speed.loaded_bytes) / 2**20
    values = np.concatenate([score.region for score in scores])
    row["percentiles"] = np.percentile(values, PERCENTILES).round(6).tolist()
    return row


def _write(study: str, rows: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    columns = [column for column in next(iter(rows.values())) if column != "percentiles"]
    table = [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    write_csv(out / f"study_{study}.csv", ["Variant", *columns], table)
    distribution = zip(PERCENTILES, *(row["percentiles"] for row in rows.values()))
    write_csv(out / f"study_{study}_percentiles.csv", ["Percentile", *rows], distribution)

"""Studies: one split tracked with several settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stm_model.distributed import Ranks
from stm_model.evaluation.config import EvaluateConfig
from stm_model.evaluation.predict import Speed, track_videos_apart
from stm_model.evaluation.protocol import Dataset
from stm_model.evaluation.scoring import ObjectScore, score
from stm_model.evaluation.tables import summarize, write_csv

PERCENTILES = tuple(range(101))


@dataclass(frozen=True)
class Study:
    """Settings to compare."""

    name: str
    """Name on the command line."""
    title: str
    """Title of the figure."""
    variants: Mapping[str, Mapping[str, Any]]
    """Name → arguments of the `Tracker` that differ."""
    figure: str
    """`percentiles`: the distribution of J over frames; `curves` or `bars`: J, speed and memory of each variant."""


STUDIES = {
    study.name: study
    for study in (
        Study(
            "memory",
            "Which frames are remembered",
            {
                "first": {"memory": "first"},
                "previous": {"memory": "previous"},
                "first + previous": {"memory": "first+previous"},
                "every 5": {"memory": "every:5"},
            },
            "percentiles",
        ),
        Study(
            "every",
            "One frame in N is remembered",
            {str(interval): {"memory": f"every:{interval}"} for interval in (1, 2, 5, 10, 20)},
            "curves",
        ),
        Study(
            "read",
            "How the memory is read",
            {
                "reference": {"implementation": "reference"},
                "fused": {"implementation": "auto"},
                "skip 1e-3": {"skip": 1e-3},
                "skip 1e-2": {"skip": 1e-2},
                "top 30": {"top_k": 30},
            },
            "bars",
        ),
    )
}


def run_study(study: Study, dataset: Dataset, config: EvaluateConfig, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Track a split with each variant of a study, each in a process of its own, and write its tables.

    Args:
        study: what to compare.
        dataset: the split, with public ground truth.
        config: settings that the variants share; its `out` gets masks/VARIANT/, study_NAME.csv and
            study_NAME_percentiles.csv.
        ranks: the processes that share the work.

    Returns:
        Variant → its row: score columns, FPS, Peak-MiB, Added-MiB (above the loaded network) and `percentiles` of J.
    """
    mine = ranks.share(dataset.videos, lambda video: len(video.frame_paths))
    rows: dict[str, dict[str, Any]] = {}
    for name, options in study.variants.items():
        masks = config.out / "masks" / re.sub(r"\W+", "_", name)
        options = {"memory": config.memory} | dict(options)
        task = (mine, config, options, masks / dataset.submission_folder, not ranks.first)
        speeds = ranks.each(lambda: track_videos_apart(*task))  # noqa: B023
        speed = sum(speeds[1:], start=speeds[0])
        scores = ranks.on_first(lambda: score(dataset, masks, workers=config.workers))  # noqa: B023
        rows[name] = _row(dataset, scores, speed)
    ranks.on_first(lambda: _write(study, rows, config.out))
    return rows


def _row(dataset: Dataset, scores: list[ObjectScore], speed: Speed) -> dict[str, Any]:
    row: dict[str, Any] = summarize(dataset.name, scores) | {"FPS": speed.fps}
    if speed.peak_bytes is not None and speed.loaded_bytes is not None:
        row["Peak-MiB"] = speed.peak_bytes / 2**20
        row["Added-MiB"] = (speed.peak_bytes - speed.loaded_bytes) / 2**20
    values = np.concatenate([score.region for score in scores])
    row["percentiles"] = np.percentile(values, PERCENTILES).round(6).tolist()
    return row


def _write(study: Study, rows: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    columns = [column for column in next(iter(rows.values())) if column != "percentiles"]
    table = [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    write_csv(out / f"study_{study.name}.csv", ["Variant", *columns], table)
    distribution = zip(PERCENTILES, *(row["percentiles"] for row in rows.values()))
    write_csv(out / f"study_{study.name}_percentiles.csv", ["Percentile", *rows], distribution)

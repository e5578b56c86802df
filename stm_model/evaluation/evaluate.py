"""Score the tracker, or a folder of masks, on a benchmark: `stm evaluate --data DAVIS`.

From Python, without the command line's libraries: evaluate(EvaluateConfig(data=Path("DAVIS"))).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from stm_model import __version__
from stm_model.distributed import Ranks
from stm_model.evaluation.certainty import certainty_scores
from stm_model.evaluation.config import EvaluateConfig
from stm_model.evaluation.corrections import Round, corrected, correction_rows
from stm_model.evaluation.predict import Speed, track_videos
from stm_model.evaluation.protocol import Dataset, Video, open_dataset
from stm_model.evaluation.scoring import find_results, score
from stm_model.evaluation.studies import STUDIES, run_study
from stm_model.evaluation.tables import (
    Evaluation,
    format_table,
    score_records,
    summarize,
    write_score_tables,
)
from stm_model.io.files import is_empty, locked, write_json
from stm_model.network import STM, STRIDE
from stm_model.runtime import DEFAULT_WEIGHTS, NetworkOptions, default_device, default_dtype, dtype_name
from stm_model.tracking.resume import source_digest
from stm_model.tracking.tracker import Tracker

SUMMARY, CERTAINTY = "evaluation.json", "certainty"
MADE_WITH = frozenset(
    ("dataset", "split", "weights", "data", "resolution", "size", "dtype", "memory", "memory_share", "top_k")
    + ("both_ways", "results", "study")
)
"""What masks depend on: an evaluation that is resumed must have been made with the same."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run an evaluation or a study and write its files; what evaluation.json holds, in every process of a torchrun.

    Raises FileNotFoundError or ValueError where data, results or settings make no sense; the message names the file.
    """
    with Ranks() as ranks, locked(config.out) if ranks.first else contextlib.nullcontext():
        # bad input is refused before anything is written
        dataset, left = ranks.on_first(lambda: _prepare(config))
        config = dataclasses.replace(config, device=ranks.device(config.device))
        return _evaluation(config, dataset, left, ranks) if config.study is None else _study(config, dataset, ranks)


def _evaluation(config: EvaluateConfig, dataset: Dataset, left: list[Video], ranks: Ranks) -> dict[str, Any]:
    masks, speed = config.results or config.out / "masks", None
    rounds: list[Round] = []
    if left:
        speed = _track(config, dataset, left, ranks)
    for _ in range(config.corrections):
        # every process gets the first one's
        rounds.append((dataset, ranks.on_first(lambda: score(dataset, masks, workers=config.workers))))  # noqa: B023
        dataset = corrected(*rounds[-1])
        speed = _track(config, dataset, dataset.videos, ranks)
    return ranks.on_first(lambda: _finish(config, dataset, masks, speed, rounds))


def _track(config: EvaluateConfig, dataset: Dataset, videos: Sequence[Video], ranks: Ranks) -> Speed:
    mine = ranks.share(videos, lambda video: len(video.frame_paths))
    folder, certainty = config.out / "masks" / dataset.submission_folder, config.out / CERTAINTY
    task = (mine, config, config.tracker_options, folder, not ranks.first, certainty, config.both_ways)
    speeds = ranks.each(lambda: track_videos(*task))
    return sum(speeds[1:], start=speeds[0])


def _finish(
    config: EvaluateConfig, dataset: Dataset, masks: Path, speed: Speed | None, rounds: list[Round]
) -> dict[str, Any]:
    """Score, and write tables, JSON, overlays and the report."""
    scores = score(dataset, masks, binary=config.binary, workers=config.workers)
    floor = score(dataset, None, workers=config.workers)
    summary = facts(config, dataset) | {
        "scores": summarize(dataset.name, scores),
        "floor": summarize(dataset.name, floor),
        "speed": {"FPS": speed.fps, **dataclasses.asdict(speed)} if speed else None,
        "objects": score_records(scores),
        "certainty": certainty_scores(scores, config.out / CERTAINTY),
    }
    if rounds:
        summary["corrections"] = correction_rows([*rounds, (dataset, scores)])
    if scores:
        write_score_tables(config.out, dataset, scores)
    evaluation = Evaluation(dataset, masks, scores, floor, speed, summary)
    if config.overlay or config.report:
        # matplotlib takes a second to import
        from stm_model.evaluation.report import write_overlays, write_report

        overlays = {}
        if config.overlay:
            overlays = write_overlays(dataset, masks, config.out / "overlays", config.binary)
        if config.report:
            write_report(evaluation, config.out, overlays, config.binary)
    write_json(config.out / SUMMARY, summary)
    return summary


def _study(config: EvaluateConfig, dataset: Dataset, ranks: Ranks) -> dict[str, Any]:
    name = str(config.study)
    rows = run_study(name, dataset, config, ranks)
    summary = facts(config, dataset) | {"study": name, "variants": rows}

    def write() -> None:
        from stm_model.evaluation.figures import draw_study

        draw_study(STUDIES[name].title, rows, config.out / f"study_{name}.png")
        write_json(config.out / SUMMARY, summary)

    ranks.on_first(write)
    return summary


def describe(summary: dict[str, Any]) -> str:
    """A summary as the lines that the command prints."""
    if "variants" in summary:
        shown = ("J-Mean", "J-Recall", "J-Decay", "F-Mean", "FPS", "Peak-MiB", "Added-MiB")
        rows = {name: {key: row[key] for key in shown if key in row} for name, row in summary["variants"].items()}
        return format_table(rows, summary["study"])
    if not summary["scores"]:
        lines = ["no ground truth here: the masks are written, to be submitted"]
    else:
        rows = {
            "tracked" if summary["settings"]["results"] is None else "results": summary["scores"],
            "first mask repeated": summary["floor"],
        }
        lines = [format_table(rows)]
    if speed := summary["speed"]:
        peak = f", peak memory {speed['peak_bytes'] / 2**20:.0f} MiB" if speed["peak_bytes"] else ""
        lines.append(f"{speed['FPS']:.2f} frames a second over {speed['frames']} frames{peak}")
    if (lost := summary["certainty"]["wrong"])["auc"] is not None:
        parts = ("auc", "precision", "recall")
        told = ", ".join(f"{part} {lost[part]:.3f}" for part in parts if lost[part] is not None)
        lines.append(f"trust tells {lost['count']} of {summary['certainty']['masks']} masks with J below 0.5: {told}")
    if corrections := summary.get("corrections"):
        names = ("J-Mean", "F-Mean", "before", "after")
        table = {str(row["corrections"]): {name: row[name] for name in names if name in row} for row in corrections}
        lines.append(format_table(table, "corrections"))
    return "\n".join([*lines, f"written to {summary['settings']['out']}"])


def _prepare(config: EvaluateConfig) -> tuple[Dataset, list[Video]]:
    """Find the videos, check all settings, clear the folder of an earlier evaluation; also the videos left to track."""
    out = config.out
    dataset = open_dataset(config.dataset, config.data, config.split, config.resolution, config.videos)
    if (config.study or config.results or config.corrections) and not any(video.scored for video in dataset.videos):
        raise ValueError(f"{config.dataset}: the ground truth of the split {dataset.split} is not here to score by")
    check_out(out, config.overwrite or config.resume, {"data": config.data, "results": config.results})
    if config.results is None:
        Tracker(checked_network(config, "masks"), **config.tracker_options)
    else:
        for video in dataset.videos:
            find_results(dataset, config.results, video)
    if config.overlay:
        from importlib.util import find_spec

        if find_spec("av") is None:
            raise ValueError("overlay: writing videos needs PyAV, which is not installed")
    known = facts(config, dataset)
    if config.resume:
        _check_earlier(out, known)
    begin(out, known, keep=config.resume)
    folder = out / "masks" / dataset.submission_folder
    tracked = config.results is not None or config.study is not None
    return dataset, [] if tracked else [video for video in dataset.videos if not _is_tracked(video, folder)]


def _is_tracked(video: Video, folder: Path) -> bool:
    return all((folder / video.name / video.mask_name(index)).is_file() for index in video.asked)


def _check_earlier(out: Path, known: Mapping[str, Any]) -> None:
    """Refuse to go on with what was not made with the same settings, data and weights."""
    if is_empty(out):
        return
    try:
        earlier = json.loads((out / SUMMARY).read_text())
        made_with = earlier | earlier["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {out} holds something other than an evaluation; choose another folder") from error
    for name, value in (known | known["settings"]).items():
        if name in MADE_WITH and (found := made_with.get(name)) != value:
            differs = "" if name == "weights" else f": {found}, now {value}"
            raise ValueError(f"{name}: not as {out} was made{differs}; choose another --out, or add --overwrite")


def check_out(out: Path, overwrite: bool, inputs: Mapping[str, Path | None]) -> None:
    """Refuse an output folder that is not empty, or holds one of the `inputs`, by argument."""
    if not is_empty(out) and not overwrite:
        raise ValueError(f"out: {out} is not empty; choose another folder, or add --overwrite")
    for name, path in inputs.items():
        if path is None:
            continue
        if out.resolve() == path.resolve() or (out / "masks").resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"out: {out} would overwrite the {name}; choose another folder")


def checked_network(options: NetworkOptions, guidance: Literal["masks", "scribbles"]) -> STM:
    """The network, so guided. Refuses a device, a size or a file that it cannot run with, before hours are spent."""
    if options.size is not None and options.size < STRIDE:
        raise ValueError(f"size: expected at least {STRIDE} pixels, got {options.size}")
    model = STM.load(options.checkpoint, device=options.device, dtype=options.dtype)
    model.expect_guidance(guidance)
    return model


def begin(out: Path, known: Mapping[str, Any], keep: bool = False) -> None:
    """Clear the masks of an earlier evaluation unless they are to `keep`, and write what is known of this one, as
    unfinished.
    """
    if (out / SUMMARY).is_file() and not keep:
        for name in ("masks", CERTAINTY):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / SUMMARY, {**known, "stopped": "unfinished"})


def facts(config: NetworkOptions, dataset: Dataset) -> dict[str, Any]:
    """How a result was made: command, split, device, versions, a digest of the weights, and settings."""
    weights = config.checkpoint or DEFAULT_WEIGHTS
    device = torch.device(config.device) if config.device else default_device()
    on_gpu = device.type == "cuda"
    return {
        "command": " ".join(["stm", *sys.argv[1:]]),
        "dataset": dataset.name,
        "split": dataset.split,
        "videos": len(dataset.videos),
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "threads": torch.get_num_threads(),
        "dtype": config.dtype or dtype_name(default_dtype(device)),
        "versions": {"stm-kernels": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "weights": source_digest(weights) if weights.is_file() else None,
        "settings": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
    }

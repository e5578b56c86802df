"""Score the interactive network, corrected by a robot: `stm evaluate --dataset davis-interactive --data DAVIS`.

From Python: evaluate_interactive(EvaluateInteractiveConfig(Path("DAVIS"))).
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stm_model.distributed import Ranks
from stm_model.evaluation.evaluate import SUMMARY, begin, check_out, checked_network, facts
from stm_model.evaluation.protocol import Dataset, Video, open_dataset
from stm_model.evaluation.tables import format_table, write_csv
from stm_model.interactive.config import EvaluateInteractiveConfig
from stm_model.interactive.protocol import Sample, run_rounds, summarize_samples
from stm_model.interactive.scribbles import Scribble, ScribbleError, read_scribbles
from stm_model.interactive.session import ScribbleSession
from stm_model.io.files import locked, write_json
from stm_model.io.images import MediaError, read_image
from stm_model.io.masks import write_mask
from stm_model.labels import VOID
from stm_model.network import STM
from stm_model.progress import Progress
from stm_model.runtime import DEFAULT_INTERACTIVE_WEIGHTS, chosen_side


class _Start(NamedTuple):
    """A sample before it is segmented."""

    name: str
    """As of `Sample`; also the folder of its masks."""
    video: Video
    first: tuple[int, Sequence[Scribble]] | None
    """Frame and scribbles to begin with; None lets the robot begin."""


COLUMNS = ("frame", "scribbles", "seconds", "J", "F", "J&F")
"""What is told of a round."""


def evaluate_interactive(config: EvaluateInteractiveConfig) -> dict[str, Any]:
    """Run the interactive evaluation and write its files; what evaluation.json holds, in every process of a torchrun.

    Raises FileNotFoundError or ValueError where data, scribbles or settings make no sense; the message names the file.
    """
    config = dataclasses.replace(config, checkpoint=config.checkpoint or DEFAULT_INTERACTIVE_WEIGHTS)
    with Ranks() as ranks, locked(config.out) if ranks.first else contextlib.nullcontext():
        # what can be refused is refused before anything is written
        dataset, starts = ranks.on_first(lambda: _prepare(config))
        config = dataclasses.replace(config, device=ranks.device(config.device))
        mine = ranks.share(starts, lambda start: len(start.video.frame_paths))
        samples = ranks.each(lambda: _run(config, mine, quiet=not ranks.first))
        return ranks.on_first(lambda: _finish(config, dataset, [sample for part in samples for sample in part]))


def describe_interactive(summary: dict[str, Any]) -> str:
    """A summary as the lines that the command prints."""
    rows = {row["sample"]: {key: row[key] for key in summary["scores"]} for row in summary["samples"]}
    table = format_table({**rows, "mean": summary["scores"]})
    return f"{table}\nwritten to {summary['settings']['out']}"


def open_interactive(config: EvaluateInteractiveConfig) -> Dataset:
    """The split, of DAVIS 2017 where it is listed there, else of 2016; every frame must have ground truth."""
    split = config.split or "val"
    # the lists of the package are of 2016
    year = "2017" if (config.data / "ImageSets" / "2017" / f"{split}.txt").is_file() else "2016"
    dataset = open_dataset(f"davis{year}", config.data, split, config.resolution, config.videos)
    for video in dataset.videos:
        if len(video.annotations) < len(video.frame_paths):
            raise ValueError(f"{video.name}: the robot needs the ground truth of every frame, and some is missing")
    return dataclasses.replace(dataset, name=f"davis-interactive ({year})")


def _prepare(config: EvaluateInteractiveConfig) -> tuple[Dataset, list[_Start]]:
    dataset = open_interactive(config)
    check_out(config.out, config.overwrite, {"data": config.data, "scribbles": config.scribbles})
    checked_network(config, "scribbles")
    starts = [start for video in dataset.videos for start in _starts(video, config.scribbles)]
    begin(config.out, facts(config, dataset))
    return dataset, starts


def _starts(video: Video, folder: Path | None) -> list[_Start]:
    if folder is None:
        return [_Start(video.name, video, None)]
    starts = []
    for path in sorted((folder / video.name).glob("*.json")):
        frames = read_scribbles(path, len(video.frame_paths), video.objects)
        if len(frames) != 1:
            raise ScribbleError(f"{path}: expected scribbles on one frame to begin with, got {len(frames)} frames")
        starts.append(_Start(f"{video.name}/{path.stem}", video, *frames.items()))
    if not starts:
        raise FileNotFoundError(f"scribbles: no .json in {folder / video.name}")
    return starts


def _run(config: EvaluateInteractiveConfig, starts: Sequence[_Start], quiet: bool) -> list[Sample]:
    if not starts:
        return []
    model = STM.load(config.checkpoint, device=config.device, dtype=config.dtype)
    samples: list[Sample] = []
    total = len(starts) * config.interactions
    with Progress(desc="interact", unit="round", total=total, shown=not quiet) as progress:
        for start in starts:
            progress.set_postfix_str(start.name, refresh=False)
            samples.append(_run_sample(config, model, start, progress))
            progress.update(len(samples) * config.interactions - progress.n)
    return samples


def _run_sample(config: EvaluateInteractiveConfig, model: STM, start: _Start, progress: Progress) -> Sample:
    video = start.video
    # read before the clock runs
    frames = [read_image(path) for path in video.frame_paths]
    truths = [video.read_annotation(index) for index in range(len(frames))]
    if any(truth.shape != frame.shape[:2] for frame, truth in zip(frames, truths)):
        raise MediaError(f"{video.name}: frames and annotations differ in size")
    try:
        size = chosen_side(config.size, config.checkpoint, frames[0].shape[:2])
        session = ScribbleSession(model, frames, size=size)
        rounds, masks = [], np.zeros((len(frames), *truths[0].shape), np.uint8)
        results = run_rounds(
            session, truths, video.objects, first=start.first, interactions=config.interactions, name=start.name
        )
        for result in results:
            rounds.append(result[0])
            masks = result[1]
            progress.update()
    except ValueError as error:
        raise MediaError(f"{video.name}: {error}") from error
    folder = config.out / "masks" / start.name
    folder.mkdir(parents=True, exist_ok=True)
    white = np.uint8(VOID if video.black_and_white else 1)
    for index, labels in enumerate(masks):
        write_mask(folder / video.mask_name(index), labels * white)
    return Sample(start.name, len(video.objects), config.interactions, tuple(rounds))


def _finish(config: EvaluateInteractiveConfig, dataset: Dataset, samples: list[Sample]) -> dict[str, Any]:
    """Write the tables, the report and, last, the summary."""
    samples.sort(key=lambda sample: sample.name)
    scores = summarize_samples(samples, config.interactions)
    rows = [_record(sample, config.interactions) for sample in samples]
    summary = facts(config, dataset) | {"scores": scores, "samples": rows}
    seconds = [sum(done.seconds for done in sample.rounds) for sample in samples]
    write_csv(
        config.out / "samples.csv",
        ["Sample", "Rounds", "Seconds", *scores],
        [
            [row["sample"], len(row["rounds"]), total, *(row[column] for column in scores)]
            for row, total in zip(rows, seconds)
        ],
    )
    write_csv(
        config.out / "rounds.csv",
        ["Sample", "Round", *map(str.capitalize, COLUMNS[:3]), *COLUMNS[3:]],
        [[row["sample"], number, *done.values()] for row in rows for number, done in enumerate(row["rounds"], start=1)],
    )
    # matplotlib takes a second to import
    from stm_model.interactive.report import write_interactive_report

    write_interactive_report(dataset, samples, summary, config.out)
    write_json(config.out / SUMMARY, summary)
    return summary


def _record(sample: Sample, interactions: int) -> dict[str, Any]:
    rounds = [
        dict(zip(COLUMNS, (done.frame, done.scribbles, done.seconds, done.region, done.contour, done.both)))
        for done in sample.rounds
    ]
    means = summarize_samples([sample], interactions)
    return {"sample": sample.name, "objects": sample.objects, **means, "rounds": rounds}

"""What a training run tells of itself: metrics.jsonl, TensorBoard, pictures, scores on held-out videos."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from stm_model.data.augment import visible_objects
from stm_model.data.clips import Clip, clip_of
from stm_model.data.video import Video
from stm_model.evaluation.metrics import sequence_scores
from stm_model.io.images import contact_sheet, overlay, write_image
from stm_model.network import STM
from stm_model.progress import Progress, say
from stm_model.tracking.frames import pad_to_stride
from stm_model.tracking.tracker import Tracker
from stm_model.training.config import TrainConfig
from stm_model.training.rounds import segment_rounds

CORRECTED_FRAMES, CORRECTIONS = 10, 3
"""Frames of a video, evenly spread, and rounds of scribbles on them, which score a network guided by scribbles."""


class Report:
    """Writes down how a run goes, in `config.out`; the first of several processes alone does."""

    def __init__(self, config: TrainConfig, step: int = 0, first_process: bool = True):
        """The report of a run that goes on at `step`: what was written of later ones is forgotten.

        Raises:
            ValueError: TensorBoard is asked for but not installed.
        """
        self.folder, self.active = config.out, first_process
        metrics = self.folder / "metrics.jsonl"
        if first_process and metrics.is_file():
            lines = metrics.read_text().splitlines(keepends=True)
            metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        self.unreadable: set[str] = set()
        self.board = _tensorboard(config.out) if config.tensorboard and first_process else None

    def metrics(self, step: int, **values: float) -> None:
        """Append a line to metrics.jsonl."""
        if not self.active:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if self.board is not None:
                self.board.add_scalar(name, value, step)

    def passed_over(self, clips: list[Clip]) -> None:
        """Name each file that could not be read, once, and count it."""
        for problem in (problem for clip in clips for problem in clip.unreadable):
            if problem not in self.unreadable:
                self.unreadable.add(problem)
                warn(f"skipped: {problem}")

    def picture(self, step: int, clip: Clip, predictions: list[Tensor]) -> None:
        """Draw a clip: the truth above, the first frame's and the predicted labels of the others below.

        Args:
            step, clip: number in the picture's name, and what it shows.
            predictions: logit maps `[n + 1, H, W]` of its last frames; frames before them are shown with the truth.
        """
        if not self.active:
            return
        frames = (clip.frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        truths = clip.labels.cpu().numpy()
        given = truths[: len(truths) - len(predictions)]
        predicted = [*given, *(logits.argmax(0).to(torch.uint8).cpu().numpy() for logits in predictions)]
        rows = [overlay(frame, labels) for shown in (truths, predicted) for frame, labels in zip(frames, shown)]
        (self.folder / "pictures").mkdir(exist_ok=True)
        write_image(self.folder / "pictures" / f"{step:06d}.png", contact_sheet(rows, columns=len(frames)))


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard: is not installed; pip install 'stm-kernels[train]'") from error
    return SummaryWriter(folder / "tensorboard")


def validate(model: STM, sequences: list[Video], rank: int = 0, processes: int = 1) -> dict[str, float]:
    """Mean J and F over the objects of videos, first and last frame left out.

    A network guided by masks tracks them; one guided by scribbles gets a few rounds of them on a few frames. The
    processes share the videos out; all get the same result.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    for sequence in Progress(sequences[rank::processes], desc="validate", unit="video", leave=False, shown=not rank):
        labels, truths = (_tracked if model.config.guidance == "masks" else _corrected)(model, sequence)
        for region, contour in sequence_scores(labels, truths).values():
            totals += torch.tensor([region, contour, 1], dtype=torch.float64)
    if processes > 1:
        totals = totals.to(next(model.parameters()).device)
        dist.all_reduce(totals)
    region, contour, count = totals.tolist()
    return {"J": region / count, "F": contour / count}


def _tracked(model: STM, sequence: Video) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Labels and truth of all frames, from the first one's mask."""
    frames, truths = sequence.load()
    return [result.labels for result in Tracker(model).track(frames, {0: truths[0]})], truths


@torch.no_grad()
def _corrected(model: STM, sequence: Video) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Labels and truth of a few frames after a few rounds of scribbles on them."""
    indices = np.unique(np.linspace(0, len(sequence.frame_paths) - 1, CORRECTED_FRAMES).round().astype(int))
    clip = clip_of(*zip(*(sequence.load_pair(index) for index in indices)))
    clip = visible_objects(Clip(pad_to_stride(clip.frames)[0], pad_to_stride(clip.labels)[0]))
    clip = clip._replace(frames=clip.frames.to(next(model.parameters()).device))
    (logits,) = segment_rounds(model, [clip], CORRECTIONS)[-1]
    return list(logits.argmax(1).to(torch.uint8).cpu().numpy()), list(clip.labels.numpy())


def warn(message: str) -> None:
    """One line above the progress bar."""
    say(f"stm: warning: {message}")

"""The settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stm_model.runtime import NetworkOptions
from stm_model.tracking.budget import MemoryBudget


@dataclass(frozen=True)
class EvaluationOptions(NetworkOptions):
    """What is evaluated, and where the results go: options of every benchmark."""

    data: Path
    """The dataset's folder."""
    split: str | None = None
    """List or folder of the split; None is val for DAVIS, valid elsewhere."""
    resolution: str | None = None
    """Folder under JPEGImages, DAVIS alone; None takes 480p, or the only one."""
    videos: tuple[str, ...] = ()
    """Names of the videos to score; none takes the whole split."""
    out: Path = Path("stm-evaluation")
    """Folder for what is written."""
    overwrite: bool = False
    """Replace an earlier evaluation in a folder that is not empty."""
    json: bool = False
    """Print the summary as JSON, alone on stdout."""


@dataclass(frozen=True)
class EvaluateConfig(EvaluationOptions):
    """Score the tracker, or a folder of masks, on a benchmark.

    Writes masks/ as the benchmark wants them submitted, tables (CSV), evaluation.json and report.html. torchrun spreads
    the videos over processes.
    """

    dataset: Literal["davis2016", "davis2017", "youtube_vos", "lvos", "davis-interactive"] = "davis2016"
    """The benchmark: its folders, what it gives and what it scores. davis-interactive has options of its own: stm
    evaluate --dataset davis-interactive --help; from Python it is an EvaluateInteractiveConfig."""
    results: Path | None = None
    """Folder of masks to score, laid out as a submission; None tracks."""
    binary: bool = False
    """The masks in --results are black and white: what is bright is the one object."""
    study: Literal["memory", "every", "read"] | None = None
    """Track with several settings instead of one: memory, the paper's four memory rules; every, a remembered frame in
    1, 2, 5, 10 or 20; read, how the memory is read."""
    memory: str | None = None
    """Which frames are remembered: first, previous, first+previous, every:N (with both), first+every:N or uniform:K.
    None takes first+every:5 where the decoder sees the previous masks, as with the package's weights, else every:5."""
    memory_share: float | None = None
    """The most remembered positions to keep, as a share of all: those that reads use; None keeps all."""
    spacing: int | None = None
    """Where no object is near, remember every so many rows and columns alone, as `stm track`."""
    top_k: int | None = None
    """Read only so many remembered positions for each pixel of the feature map, as `stm track`; None reads all."""
    both_ways: bool = False
    """Track backwards too, from the masks of later frames, as `stm track --both-ways`."""
    corrections: int = 0
    """Correct each video so many times: the true mask of its worst frame is given, and it is tracked anew. The masks
    written are the last ones."""
    overlay: bool = False
    """Write overlays/VIDEO.mp4, the frames with the objects colored, and link them in the report."""
    resume: bool = False
    """Go on with an evaluation that was stopped: what is tracked with the same settings stays. Frames a second are
    those of the rest."""
    report: bool = True
    """Write report.html and figures/."""
    workers: int | None = None
    """Processes that score; None takes one a core."""

    def __post_init__(self) -> None:
        if self.dataset == "davis-interactive":
            raise ValueError("dataset: davis-interactive takes an EvaluateInteractiveConfig")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers: expected at least 1, got {self.workers}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        if self.corrections < 0:
            raise ValueError(f"corrections: expected at least 0, got {self.corrections}")
        if self.corrections and (self.results is not None or self.study is not None):
            raise ValueError("corrections: track anew, each time; give them without --results and --study")
        if self.resume and (self.overwrite or self.corrections or self.results is not None or self.study is not None):
            raise ValueError(
                "resume: goes on with tracking; give it without --overwrite, --corrections, --results and --study"
            )
        if self.results is not None and self.study is not None:
            raise ValueError("study: tracks with settings of its own and can't score --results; give one of the two")
        if self.results is not None and self.checkpoint is not None:
            raise ValueError("checkpoint: the masks in --results are there already; give one of the two")
        if self.binary and self.results is None:
            raise ValueError("binary: says how to read --results, which was not given")

    @property
    def tracker_options(self) -> dict[str, Any]:
        """Arguments of the `Tracker` beside network and size."""
        budget = MemoryBudget(share=self.memory_share)
        return {"memory": self.memory, "budget": budget, "spacing": self.spacing, "top_k": self.top_k}

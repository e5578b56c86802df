"""The settings of the interactive evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from stm_model.runtime import NetworkOptions

INTERACTIONS = 8
"""Rounds of scribbling."""


@dataclass(frozen=True)
class EvaluateInteractiveConfig(NetworkOptions):
    """Score the interactive network on DAVIS: a robot scribbles on the worst frame, again and again.

    Writes masks/ (after the last round), rounds.csv, samples.csv, curve.png, evaluation.json and report.html. torchrun
    spreads the videos over processes.
    """

    data: Path
    """The dataset's folder, as DAVIS 2017 or 2016 is released."""
    split: str | None = None
    """Name of the list under ImageSets; None is val."""
    resolution: str | None = None
    """Folder under JPEGImages; None takes 480p, or the only one."""
    videos: tuple[str, ...] = ()
    """Names of the videos; none takes the whole split."""
    scribbles: Path | None = None
    """Folder of first scribbles by people, VIDEO/NAME.json, each a sample; None lets the robot begin."""
    interactions: int = INTERACTIONS
    """Rounds of scribbling."""
    out: Path = Path("stm-evaluation")
    """Folder for what is written."""
    overwrite: bool = False
    """Replace an earlier evaluation in a folder that is not empty."""
    checkpoint: Path | None = field(default=None, kw_only=True)
    """Our .safetensors of a network guided by scribbles; None takes the weights that come with the package."""
    json: bool = False
    """Print the summary as JSON, alone on stdout."""

    def __post_init__(self) -> None:
        if self.interactions < 1:
            raise ValueError(f"interactions: expected at least 1, got {self.interactions}")

"""The settings of the interactive evaluation."""

from dataclasses import dataclass, field
from pathlib import Path

from stm_model.evaluation.config import EvaluationOptions

INTERACTIONS = 8
"""Rounds of scribbling."""


@dataclass(frozen=True)
class EvaluateInteractiveConfig(EvaluationOptions):
    """Score the interactive network on DAVIS: a robot scribbles on the worst frame, again and again.

    Writes masks/ (after the last round), rounds.csv, samples.csv, curve.png, evaluation.json and report.html. torchrun
    spreads the videos over processes.
    """

    scribbles: Path | None = None
    """Folder of first scribbles by people, VIDEO/NAME.json, each a sample; None lets the robot begin."""
    interactions: int = INTERACTIONS
    """Rounds of scribbling."""
    checkpoint: Path | None = field(default=None, kw_only=True)
    """Our .safetensors of a network guided by scribbles; None takes the weights that come with the package."""

    def __post_init__(self) -> None:
        if self.interactions < 1:
            raise ValueError(f"interactions: expected at least 1, got {self.interactions}")

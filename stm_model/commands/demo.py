"""`stm demo`: track the objects of a made-up clip, and score the masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SHEET_FRAMES = 8
"""Frames on the contact sheet."""


@dataclass(frozen=True)
class DemoConfig:
    """Track the objects of a made-up clip with the default weights and score the masks against the true ones.

    Writes overlay.mp4, contact_sheet.png, masks/ and summary.json.
    """

    out: Path = Path("stm-demo")
    """Folder for the results. An earlier demo's are replaced; a folder with anything else in it is refused."""
    frames: int = 48
    """Length of the clip, in frames."""
    objects: int = 2
    """Objects in the clip."""
    seed: int = 15
    """Which clip; in this one both objects stay in the picture, and one passes behind the other."""
    device: str | None = None
    """Where to run, like cpu or cuda:0; None takes the GPU if there is one."""
    json: bool = False
    """Print the summary as JSON, alone on stdout."""


def demo(config: DemoConfig) -> int:
    """Run the demo; the exit code."""
    from stm_model.io.files import locked

    with locked(config.out):
        return _demo(config)


def _demo(config: DemoConfig) -> int:
    if config.frames < 3:
        raise ValueError(f"--frames: expected at least 3, got {config.frames}")
    if not 1 <= config.objects <= 20:
        raise ValueError(f"--objects: expected 1 to 20, got {config.objects}")
    from stm_model import STM, Tracker
    from stm_model.commands.track import report
    from stm_model.data.synthetic import procedural_clip
    from stm_model.evaluation.metrics import sequence_scores
    from stm_model.io.images import contact_sheet, overlay, write_image
    from stm_model.io.masks import read_mask
    from stm_model.tracking.folder import FolderRun, is_output_of

    if not is_output_of("demo", config.out):
        raise ValueError(f"{config.out}: holds something other than an earlier demo; choose another folder with --out")
    model = STM.load(device=config.device)
    frames, truths = procedural_clip(frames=config.frames, objects=config.objects, seed=config.seed)
    run = FolderRun("demo", config.out, Tracker(model), config)
    run.track(frames, {0: truths[0]}, frame_count=config.frames, overlay_fps=24)
    if run.summary["stopped"] is None:
        predictions = [read_mask(run.mask_file(index)) for index in range(config.frames)]
        scores = sequence_scores(predictions, list(truths), range(1, config.objects + 1))
        region, contour = (sum(score[part] for score in scores.values()) / len(scores) for part in (0, 1))
        run.summary["scores"] = {"J": region, "F": contour, "J&F": (region + contour) / 2}
        shown = [round(step * (config.frames - 1) / (SHEET_FRAMES - 1)) for step in range(SHEET_FRAMES)]
        sheet = contact_sheet([overlay(frames[index], predictions[index]) for index in shown], columns=4)
        run.summary["files"]["contact_sheet"] = str(config.out / "contact_sheet.png")
        write_image(config.out / "contact_sheet.png", sheet)
    return report(run, config.json)

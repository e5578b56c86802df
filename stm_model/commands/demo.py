"""`stm demo`: track the objects of a made-up clip, and score the masks."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

SHEET_FRAMES = 8
"""Frames on the contact sheet."""


@dataclass(frozen=True)
class DemoConfig:
    """Track the fish of a made-up clip with the default weights and score the masks against the true ones.

    Writes the clip and its first mask, clip.mp4 and mask.png, and what is made of them: overlay.mp4, contact_sheet.png,
    masks/ and summary.json. Prints the command that tracks the same by stm track.
    """

    out: Path = Path("stm-demo")
    """Folder for the results. An earlier demo's are replaced; a folder with anything else in it is refused."""
    frames: int = 48
    """Length of the clip, in frames."""
    objects: int = 2
    """Fish in the clip."""
    seed: int = 0
    """Which clip."""
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
    from stm_model.data.aquarium import aquarium_clip
    from stm_model.evaluation.metrics import sequence_scores
    from stm_model.io.images import contact_sheet, write_image
    from stm_model.io.masks import read_mask, write_mask
    from stm_model.io.overlay import Overlay
    from stm_model.io.part import Part
    from stm_model.io.video import VideoWriter, open_video
    from stm_model.tracking.folder import FolderRun, is_output_of

    if not is_output_of("demo", config.out):
        raise ValueError(f"{config.out}: holds something other than an earlier demo; choose another folder with --out")
    frames, truths = aquarium_clip(frames=config.frames, objects=config.objects, seed=config.seed)
    run = FolderRun("demo", config.out, Tracker(STM.load(device=config.device), ahead=True), config)
    # the folder is known as a demo's from its first file on
    run.write_summary()
    clip, mask, sheet = (config.out / name for name in ("clip.mp4", "mask.png", "contact_sheet.png"))
    with VideoWriter(clip) as writer:
        for frame in frames:
            writer.write(frame)
    write_mask(mask, truths[0])
    run.summary["files"] |= {"clip": str(clip), "mask": str(mask)}
    # what is in the file, so that stm track on it gives the same
    video = open_video(clip)
    run.track(Part(video), {0: truths[0]})
    if run.summary["stopped"] is None:
        predictions = [read_mask(run.mask_file(index)) for index in range(config.frames)]
        scores = sequence_scores(predictions, list(truths), range(1, config.objects + 1))
        region, contour = (sum(score[part] for score in scores.values()) / len(scores) for part in (0, 1))
        run.summary["scores"] = {"J": region, "F": contour, "J&F": (region + contour) / 2}
        shown = [round(step * (config.frames - 1) / (SHEET_FRAMES - 1)) for step in range(SHEET_FRAMES)]
        drawing = Overlay()
        write_image(
            sheet, contact_sheet([drawing.draw(frames[index], predictions[index]) for index in shown], columns=4)
        )
        run.summary["files"]["contact_sheet"] = str(sheet)
    code = report(run, config.json)
    if not config.json:
        # as this command was called
        stm = sys.argv[0] if Path(sys.argv[0]).name == "stm" else "stm"
        again = [stm, "track", clip, "--mask", mask, "--size", min(video.size), "--out", f"{config.out}-again"]
        print(f"the same by   {shlex.join(map(str, again))}")
    return code

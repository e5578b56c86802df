"""The `stm` command: stm demo | track | train | evaluate | interact | info."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

# torch, PyAV and the model are imported where they are used: `stm --help` answers at once
from stm_model import __version__
from stm_model.tracking.run import (
    BAD_INPUT,
    INTERRUPTED,
    Run,
    dtype_name,
    fail,
    is_out_of_memory,
    is_output_of,
    one_line,
)

Config = TypeVar("Config")


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


@dataclass(frozen=True)
class TrackConfig:
    """Track the objects of a mask through a video.

    Writes masks/00000.png … (labels as in the mask), overlay.mp4 and summary.json into the --out folder.
    """

    video: tyro.conf.Positional[Path]
    """A video file, or a folder of frames. Without --mask a text file that lists videos, VIDEO MASK [NAME] on each
    line."""
    out: Path
    """Folder for the results; for those of a list a folder of folders."""
    mask: Path | None = None
    """Labels of the first frame as a palette or grey PNG, or a folder of such masks named by frame number. 0 is
    background, 255 void (unknown); objects may enter by a mask of a later frame."""
    checkpoint: Path | None = None
    """A released .pth or our .safetensors; None takes the weights that come with the package."""
    memory: str = "every:5"
    """Which frames are remembered: first, previous, first+previous, every:N or uniform:K."""
    size: int | None = None
    """Shorter side in pixels at which the network runs. None takes the video's own; with the package's weights at most
    240, the size they were trained on. Masks always have the video's size."""
    device: str | None = None
    """Where to run, like cpu or cuda:0; None takes the GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the network; None takes bfloat16 where the device computes it natively, else float32."""
    compile: bool = False
    """Compile the network first: a minute or more, then less time for each frame."""
    memory_budget: str | None = None
    """How much may be remembered on the device, like 2GiB; None keeps everything, on the host where the device is
    full."""
    host_budget: str | None = None
    """How much may be remembered beyond that in the host's memory, like 16GiB; None is nothing beyond a
    --memory-budget."""
    eviction: Literal["fifo", "importance"] = "fifo"
    """What is forgotten where the budget is full: the oldest frame, or the one that is used least. Frames with a given
    mask stay."""
    skip_uncertain: bool = False
    """Don't remember frames for good in which an object is likely lost."""
    top_k: int | None = None
    """Read only so many remembered positions for each pixel of the feature map, the best; None reads all."""
    skip: float = 0.0
    """The weight that each pixel's read of the memory may leave out to be faster, from 0 (exact) to below 1."""
    binary: bool = False
    """The mask is black and white: what is bright is one object, label 1."""
    resize_mask: bool = False
    """Resize masks that are not of the video's size, instead of refusing them."""
    overlay: bool = True
    """Write overlay.mp4, the video with the objects coloured; --no-overlay does not."""
    overwrite: bool = False
    """Replace earlier results in a folder that is not empty; other files in it stay. Without it a list goes on with the
    videos that are not done."""
    resume: bool = False
    """Go on with a run that was stopped, from its last checkpoint in the --out folder; without one it starts anew. A
    list always does."""
    checkpoint_every: float = 60.0
    """Seconds from one checkpoint to the next, more where writing takes over 2 % of them; 0 writes none."""
    json: bool = False
    """Print the summary as JSON, alone on stdout."""


@dataclass(frozen=True)
class InfoConfig:
    """Show versions, devices and what would run on them."""

    json: bool = False
    """Print JSON."""


class CommandError(Exception):
    """Input that a command refuses; the message is what the user reads."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `stm` command.

    Args:
        argv: the arguments after `stm`; None takes the process's.

    Returns:
        The exit code: 0, 2 for bad input (one line on stderr), 130 when interrupted.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if name in ("-h", "--help"):
            print(_usage())
            return 0
        if name == "--version":
            print(f"stm-kernels {__version__}")
            return 0
        if name not in COMMANDS:
            raise CommandError(f"unknown command {name!r}; expected {', '.join(COMMANDS)}")
        with _short_warnings():
            return COMMANDS[name][0](rest)
    except (CommandError, ValueError, OSError) as error:
        return fail(one_line(error), BAD_INPUT)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return fail(one_line(error), BAD_INPUT)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except SystemExit as stop:  # tyro, after showing a command's help
        return int(stop.code or 0)


def demo(argv: Sequence[str]) -> int:
    """`stm demo`; see DemoConfig."""
    config = _parse(DemoConfig, "stm demo", argv)
    if config.frames < 3:
        raise CommandError(f"--frames: expected at least 3, got {config.frames}")
    if not 1 <= config.objects <= 20:
        raise CommandError(f"--objects: expected 1 to 20, got {config.objects}")
    if not is_output_of("demo", config.out):
        raise CommandError(f"{config.out}: holds something else than an earlier demo; choose another folder with --out")
    from stm_model import Tracker
    from stm_model.commands.track import load_model
    from stm_model.data.synthetic import procedural_clip
    from stm_model.evaluation.metrics import sequence_scores
    from stm_model.io.images import contact_sheet, overlay, read_mask, write_image

    model = load_model(None, config.device, None)
    frames, truths = procedural_clip(frames=config.frames, objects=config.objects, seed=config.seed)
    run = Run("demo", config.out, Tracker(model), config)
    code = run.track(frames, {0: truths[0]}, count=config.frames, fps=24, write_overlay=True)
    if code:
        return run.report(code, config.json)
    predictions = [read_mask(config.out / "masks" / f"{index:05d}.png") for index in range(config.frames)]
    scores = sequence_scores(predictions, truths, range(1, config.objects + 1))
    region, contour = (sum(score[part] for score in scores.values()) / len(scores) for part in (0, 1))
    run.summary["scores"] = {"J": region, "F": contour, "J&F": (region + contour) / 2}
    shown = [round(step * (config.frames - 1) / 7) for step in range(8)]
    sheet = contact_sheet([overlay(frames[index], predictions[index]) for index in shown], columns=4)
    run.summary["files"]["contact_sheet"] = str(config.out / "contact_sheet.png")
    write_image(config.out / "contact_sheet.png", sheet)
    return run.report(code, config.json)


def track(argv: Sequence[str]) -> int:
    """`stm track`; see TrackConfig."""
    config = _parse(TrackConfig, "stm track", argv)
    if config.mask is None:
        return _track_list(config)
    from stm_model.commands.track import finished, track_video

    if config.resume and not config.overwrite and (summary := finished(config)):
        done = f"{summary['frames']} frames are tracked and in {config.out}: nothing is left to do"
        print(json.dumps(summary, indent=2) if config.json else done)
        return 0
    run, code = track_video(config)
    return run.report(code, config.json)


def _track_list(config: TrackConfig) -> int:
    from stm_model.commands.batch import describe, track_list
    from stm_model.distributed import OtherRankFailed, Ranks

    try:
        summary = track_list(config)
    except OtherRankFailed:
        return BAD_INPUT
    if Ranks().first:
        print(json.dumps(summary, indent=2) if config.json else describe(summary))
        for name, record in summary["videos"].items():
            if record["state"] == "failed":
                fail(f"{name}: {record['reason']}", BAD_INPUT)
    return BAD_INPUT if summary["failed"] else 0


def train(argv: Sequence[str]) -> int:
    """`stm train`; see stm_model.training.config.TrainConfig."""
    from stm_model.training.config import PRESETS
    from stm_model.training.train import train as run_training

    preset, rest = _take_preset(list(argv), tuple(PRESETS))
    program = f"stm train --preset {preset}"
    weights = run_training(_parse(PRESETS[preset], program, rest))
    print(f"weights: {weights}")
    return 0


def _take_preset(argv: list[str], presets: tuple[str, ...]) -> tuple[str, list[str]]:
    """The value of --preset, by which the other options have their defaults, and what is left without it."""
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name != "--preset":
            continue
        value, end = (value, position + 1) if equals else (" ".join(argv[position + 1 : position + 2]), position + 2)
        if value not in presets:
            raise CommandError(f"--preset: expected one of {', '.join(presets)}, got {value!r}")
        return value, argv[:position] + argv[end:]
    return presets[0], argv


def evaluate(argv: Sequence[str]) -> int:
    """`stm evaluate`; see stm_model.evaluation.evaluate.EvaluateConfig, and EvaluateInteractiveConfig beside it."""
    from stm_model.distributed import OtherRankFailed, Ranks
    from stm_model.evaluation.evaluate import EvaluateConfig, describe
    from stm_model.evaluation.evaluate import evaluate as run_evaluation

    interactive, rest = _take_option(list(argv), "--dataset", "davis-interactive")
    if interactive:
        from stm_model.interactive.evaluate import EvaluateInteractiveConfig
        from stm_model.interactive.evaluate import describe_interactive as describe
        from stm_model.interactive.evaluate import evaluate_interactive as run_evaluation

        config = _parse(EvaluateInteractiveConfig, "stm evaluate --dataset davis-interactive", rest)
    else:
        config = _parse(EvaluateConfig, "stm evaluate", argv)
    try:
        summary = run_evaluation(config)
    except OtherRankFailed:
        return BAD_INPUT
    if Ranks().first:
        print(json.dumps(summary, indent=1) if config.json else describe(summary))
    return 0


def _take_option(argv: list[str], name: str, value: str) -> tuple[bool, list[str]]:
    """Whether an option has a value, and the other arguments."""
    for position in range(len(argv)):
        for given in ([f"{name}={value}"], [name, value]):
            if argv[position : position + len(given)] == given:
                return True, argv[:position] + argv[position + len(given) :]
    return False, argv


def interact(argv: Sequence[str]) -> int:
    """`stm interact`; see stm_model.commands.interact.InteractConfig."""
    from stm_model.commands.interact import InteractConfig
    from stm_model.commands.interact import interact as run_page

    return run_page(_parse(InteractConfig, "stm interact", argv, tyro.conf.PositionalRequiredArgs))


def info(argv: Sequence[str]) -> int:
    """`stm info`; see InfoConfig."""
    config = _parse(InfoConfig, "stm info", argv)
    import torch

    from stm_kernels import default_implementation
    from stm_model.network.weights import DEFAULT_WEIGHTS
    from stm_model.runtime import default_dtype

    devices = {f"cuda:{index}": torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    devices["cpu"] = platform.processor() or platform.machine()
    facts = {
        "versions": {
            "stm-kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
        },
        "devices": {
            device: {
                "name": name,
                "implementation": default_implementation(device),
                "dtype": dtype_name(default_dtype(device)),
            }
            for device, name in devices.items()
        },
        "weights": str(DEFAULT_WEIGHTS) if DEFAULT_WEIGHTS.is_file() else None,
    }
    if config.json:
        print(json.dumps(facts, indent=2))
        return 0
    for package, number in facts["versions"].items():
        print(f"{package:12} {number or 'not installed'}")
    for device, row in facts["devices"].items():
        print(f"{device:12} {row['name']}: reads memory with {row['implementation']}, tracks in {row['dtype']}")
    print(f"{'weights':12} {facts['weights'] or 'none in the package'}")
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "demo": (demo, "track objects through a made-up clip, to see it work"),
    "track": (track, "track the objects of a mask through a video"),
    "train": (train, "train the network"),
    "evaluate": (evaluate, "score the tracker, or a folder of masks, on a benchmark"),
    "interact": (interact, "segment a video with scribbles, in the browser"),
    "info": (info, "versions, devices and what would run on them"),
}


def _parse(config: type[Config], program: str, argv: Sequence[str], *markers: Any) -> Config:
    """Arguments to a config; tyro's framed complaint becomes one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config, prog=program, args=list(argv), config=(tyro.conf.FlagCreatePairsOff, *markers))
    except SystemExit as stop:
        if not stop.code:
            raise
    lines = re.sub(r"\x1b\[[0-9;]*m", "", complaint.getvalue()).splitlines()
    said = []
    # below a title comes what is wrong, then a rule or an empty line; what is set in deeper is an argument's help text
    for line in lines[1 if lines[0].startswith("╭") else 2 :]:
        line = line.strip("│╰╯")
        if not line.strip() or line.strip().startswith(("─", "---")):
            break
        if not line.startswith(" " * 8):
            said.append(line.strip())
    raise CommandError(f"{' '.join(said)} (see {program} --help)")


def _usage() -> str:
    rows = [f"  {name:8} {description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(
        ["usage: stm COMMAND [options]", "", "Video object segmentation with a space-time memory.", "", *rows, ""]
        + ["stm COMMAND --help lists a command's options; stm --version the version."]
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line, without the source line that Python shows."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"stm: warning: {message}", file=sys.stderr)
        yield


def run() -> None:
    """Run the command as a process of its own, and end it."""
    exit_code = main()
    if "WORLD_SIZE" in os.environ:
        # one process of many leaves at once: a thread of its process group may outlive what it needs
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)

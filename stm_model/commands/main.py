"""The `stm` command: arguments to a config, the config to its command, errors to exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import tyro

# a command's file is imported when it is asked for, and torch, PyAV and the model by what it runs: help answers at once
from stm_model import __version__
from stm_model.commands.exits import BAD_INPUT, INTERRUPTED, fail
from stm_model.runtime import OtherRankFailed, is_out_of_memory, one_line

Config = TypeVar("Config")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `stm` with the arguments after it, None for the process's; 0, 2 for bad input (one line on stderr), 130
    interrupted.
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
            raise ValueError(f"unknown command {name!r}; expected {', '.join(COMMANDS)}")
        with _short_warnings():
            return COMMANDS[name][0](rest)
    except OtherRankFailed:  # which says why
        return BAD_INPUT
    except (ValueError, OSError) as error:
        return fail(one_line(error), BAD_INPUT)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return fail(one_line(error), BAD_INPUT)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except SystemExit as stop:  # tyro, after showing a command's help
        return int(stop.code or 0)


def run() -> None:
    """Run the command as a process of its own, and end it."""
    exit_code = main()
    if "WORLD_SIZE" in os.environ:
        # one process of many leaves at once: a thread of its process group may outlive what it needs
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _demo(argv: Sequence[str]) -> int:
    from stm_model.commands.demo import DemoConfig, demo
    from stm_model.io.files import locked

    config = _parse(DemoConfig, "stm demo", argv)
    with locked(config.out):
        return demo(config)


def _track(argv: Sequence[str]) -> int:
    from stm_model.commands.track import TrackConfig, track

    config = _parse(TrackConfig, "stm track", argv)
    if config.mask is not None:
        return track(config)
    from stm_model.commands.batch import track_all

    return track_all(config)


def _train(argv: Sequence[str]) -> int:
    from stm_model.commands.train import PRESETS, train

    preset, rest = _choose("preset", tuple(PRESETS), "stm train", argv)
    return train(_parse(PRESETS[preset], f"stm train --preset {preset}", rest))


def _evaluate(argv: Sequence[str]) -> int:
    from stm_model.commands.evaluate import BENCHMARKS, EvaluateConfig, EvaluateInteractiveConfig, evaluate

    dataset, rest = _choose("dataset", (*BENCHMARKS, "davis-interactive"), "stm evaluate", argv)
    if dataset == "davis-interactive":
        return evaluate(_parse(EvaluateInteractiveConfig, "stm evaluate --dataset davis-interactive", rest))
    return evaluate(_parse(EvaluateConfig, "stm evaluate", argv))


def _interact(argv: Sequence[str]) -> int:
    from stm_model.commands.interact import InteractConfig, interact

    return interact(_parse(InteractConfig, "stm interact", argv))


def _info(argv: Sequence[str]) -> int:
    from stm_model.commands.info import InfoConfig, info

    return info(_parse(InfoConfig, "stm info", argv))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "demo": (_demo, "track objects through a made-up clip, to see it work"),
    "track": (_track, "track the objects of a mask through a video"),
    "train": (_train, "train the network"),
    "evaluate": (_evaluate, "score the tracker, or a folder of masks, on a benchmark"),
    "interact": (_interact, "segment a video with scribbles, in the browser"),
    "info": (_info, "versions, devices and what would run on them"),
}


def _usage() -> str:
    rows = [f"  {name:8} {description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(
        ["usage: stm COMMAND [options]", "", "Video object segmentation with a space-time memory.", "", *rows, ""]
        + ["stm COMMAND --help lists a command's options; stm --version the version."]
    )


def _parse(config: type[Config], program: str, argv: Sequence[str]) -> Config:
    """Arguments to a config. Raises a ValueError of one line for what tyro refuses."""
    with _one_line_refusal(program):
        return tyro.cli(config, prog=program, args=argv, config=(tyro.conf.FlagCreatePairsOff,))


def _choose(option: str, choices: tuple[str, ...], program: str, argv: Sequence[str]) -> tuple[str, list[str]]:
    """The value of an option that decides what the others are, by default the first, and the arguments without it."""
    kind: Any = dataclasses.make_dataclass("Choice", [(option, Literal[choices], choices[0])])
    with _one_line_refusal(program):
        choice, rest = tyro.cli(kind, prog=program, args=argv, return_unknown_args=True, add_help=False)
    return getattr(choice, option), rest


@contextlib.contextmanager
def _one_line_refusal(program: str) -> Iterator[None]:
    """Turn the framed message with which tyro exits into a ValueError of one line: tyro has no public way to get it."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip("│╰╯") for line in re.sub(r"\x1b\[[0-9;]*m", "", message.getvalue()).splitlines()]
        # a title, what is wrong, a rule or an empty line, hints; help texts are set in by eight columns
        start = next(place for place, line in enumerate(lines[1:], 1) if line.strip(" ─-"))
        end = next((place for place, line in enumerate(lines) if place > start and not line.strip(" ─-╭╮")), None)
        said = [line.strip() for line in lines[start:end] if not line.startswith(" " * 8)]
        raise ValueError(f"{' '.join(said).rstrip('.')} (see {program} --help)") from None


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line, without the source line that Python shows."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"stm: warning: {message}", file=sys.stderr)
        yield

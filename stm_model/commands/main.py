"""The `stm` command: arguments to a config, the config to its command, errors to exit codes."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module

# a command's file is imported when it is asked for, and torch, PyAV and the model by what it runs: help answers at once
from stm_model import __version__
from stm_model.commands.exits import BAD_INPUT, fail, interrupted, nobody_reads, signals_interrupt, was_interrupted
from stm_model.runtime import OtherRankFailed, is_out_of_memory, keep_freed_memory, one_line

Command = Callable[[], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `stm` with the arguments after it, None for the process's; 0, 2 for bad input (one line on stderr), 128 and
    the number of the signal that ended it: 130 for Ctrl-C.
    """
    with signals_interrupt():
        try:
            return _run(list(sys.argv[1:] if argv is None else argv) or ["--help"])
        except BaseException as error:
            # what is interrupted may fail in its own way: a worker that the same signal ended, half an import
            if isinstance(error, KeyboardInterrupt) or was_interrupted():
                return interrupted()
            raise


def run() -> None:
    """Run the command as a process of its own, and end it."""
    # threads that wait sleep: where another process keeps a core busy, threads that spin wait for each other's turn.
    # OpenMP reads it when torch is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    exit_code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        exit_code = nobody_reads()
    if "WORLD_SIZE" in os.environ:
        # one process of many leaves at once: a thread of its process group may outlive what it needs
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _run(arguments: list[str]) -> int:
    _print_anything()
    name, *rest = arguments
    try:
        if name in ("-h", "--help"):
            print(_usage())
            return 0
        if name == "--version":
            print(f"stm-kernels {__version__}")
            return 0
        if name not in COMMANDS:
            raise ValueError(f"unknown command {name!r}; expected {', '.join(COMMANDS)}")
        if sys.stderr.isatty() and not {"-h", "--help"} & set(rest):
            # importing torch takes seconds, and `stm train` does so to check its options
            print("loading…", file=sys.stderr, flush=True)
        command = COMMANDS[name][0](rest)
        with _short_warnings():
            return command()
    except OtherRankFailed:  # which says why
        return BAD_INPUT
    except Exception as error:
        if type(error) is BrokenPipeError:  # PyAV has one of its own
            return nobody_reads()
        foreseen = isinstance(error, (ValueError, OSError)) or is_out_of_memory(error)
        # pathlib's, up to Python 3.12
        foreseen |= isinstance(error, RuntimeError) and str(error).startswith("Symlink loop")
        if was_interrupted() or not foreseen:
            raise
        return fail(one_line(error), BAD_INPUT)
    except SystemExit as stop:  # tyro, after showing a command's help
        return int(stop.code or 0)


def _plain(argv: Sequence[str], name: str) -> Command:
    """The command `name` of the file of that name."""
    from stm_model.commands.options import parse

    module = import_module(f"stm_model.commands.{name}")
    return partial(getattr(module, name), parse(getattr(module, f"{name.capitalize()}Config"), f"stm {name}", argv))


def _track(argv: Sequence[str]) -> Command:
    from stm_model.commands.options import parse
    from stm_model.commands.track import TrackConfig, named, track

    config = named(parse(TrackConfig, "stm track", argv))

    def track_listed() -> int:
        from stm_model.commands.batch import track_all

        return track_all(config)

    return track_listed if config.mask is None else partial(track, config)


def _train(argv: Sequence[str]) -> Command:
    from stm_model.commands.options import choose, parse
    from stm_model.commands.train import PRESETS, train

    preset, rest = choose("preset", tuple(PRESETS), "stm train", argv)
    note = f"Presets: {', '.join(PRESETS)}."
    return partial(train, parse(PRESETS[preset], f"stm train --preset {preset}", rest, note))


def _evaluate(argv: Sequence[str]) -> Command:
    from stm_model.commands.evaluate import BENCHMARKS, EvaluateConfig, EvaluateInteractiveConfig, evaluate
    from stm_model.commands.options import choose, parse

    dataset, rest = choose("dataset", BENCHMARKS, "stm evaluate", argv)
    if dataset == "davis-interactive":
        return partial(evaluate, parse(EvaluateInteractiveConfig, "stm evaluate --dataset davis-interactive", rest))
    return partial(evaluate, parse(EvaluateConfig, "stm evaluate", argv))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], Command], str]] = {
    "demo": (partial(_plain, name="demo"), "track objects through a made-up clip, to see it work"),
    "track": (_track, "track the objects of a mask through a video"),
    "train": (_train, "train the network"),
    "evaluate": (_evaluate, "score the tracker, or a folder of masks, on a benchmark"),
    "interact": (partial(_plain, name="interact"), "segment a video with scribbles, in the browser"),
    "convert": (partial(_plain, name="convert"), "write masks in the formats of other tools, and read theirs"),
    "info": (partial(_plain, name="info"), "versions, devices and what would run on them"),
}
"""What reads the arguments of a command and returns it, ready to run; what it does."""


def _usage() -> str:
    rows = [f"  {name:8} {description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(
        ["usage: stm COMMAND [options]", "", "Video object segmentation with a space-time memory.", "", *rows, ""]
        + ["stm COMMAND --help lists a command's options; stm --version the version."]
    )


def _print_anything() -> None:
    """What a terminal's encoding lacks, or a file's name that is no text, is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line, without the source line that Python shows; none of what an interrupt cut off."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if not was_interrupted():
            print(f"stm: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield

"""What the tests of commands share."""

import sys
from collections.abc import Callable

STM = (
    sys.executable,
    "-c",
    # tests that were started in the background of a shell ignore Ctrl-C or SIGHUP, and their children would too
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "if hasattr(signal, 'SIGHUP'): signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    "from stm_model.commands.main import run; run()",
)
"""The `stm` command in a process of its own."""


def refused(result: tuple[int, str, str], *parts: str) -> bool:
    """Whether a command ended with exit code 2 and one line that has these parts, and printed nothing else."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("stm: error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err
    return True


def gave_up(main: Callable[[], None], monkeypatch, *arguments: object) -> str | None:
    """Run a script's `main` with arguments: what it says as it gives up, None where it does not."""
    monkeypatch.setattr("sys.argv", ["script", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return str(stop)
    return None

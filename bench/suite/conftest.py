"""`make bench`: each part of the pipeline in alternation with its naive twin, after a check that both agree.

With `--quick` small sizes on one thread, timed on the processor, which other work on the machine hardly lengthens.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.compare import Race, interval
from bench.harness import table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small sizes, and fail where the advantage is lost: a minute")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick"):
        torch.set_num_threads(1)
        config.option.benchmark_timer = "time.process_time"


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether sizes should be small."""
    return request.config.getoption("--quick")


@pytest.fixture
def race(benchmark: Any, quick: bool) -> Callable[..., None]:
    """Times a function in alternation with its naive twin.

    Call it once both are known to agree: `race(ours, naive, rounds, least)`. With `--quick` it fails where ours is not
    `least` times as fast as the twin of the same run; `least` leaves room for noise and for other machines.
    """

    def run(ours: Callable[[], Any], naive: Callable[[], Any], rounds: int, least: float) -> None:
        seconds: list[float] = []
        timer = time.process_time if quick else time.perf_counter

        def twin() -> None:
            start = timer()
            naive()
            seconds.append(timer() - start)

        naive(), ours()
        benchmark.pedantic(ours, setup=twin, rounds=max(5, rounds // 3) if quick else rounds)
        if benchmark.disabled:
            return
        found = Race(benchmark.stats.stats.data, seconds)
        benchmark.extra_info |= {"naive": seconds, "ratio": found.ratio, "interval": interval(found.ratios)}
        if quick:
            assert found.ratio >= least, f"{found.ratio:.2f} times as fast as its naive twin, expected at least {least}"

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    # the name of somebody's machine is nobody's business
    machine_info.pop("node", None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    races = [bench for bench in config._benchmarksession.benchmarks if "ratio" in bench.extra_info]
    if not races:
        return
    clock = "of the processor" if config.getoption("--quick") else f"at a load of {os.getloadavg()[0]:.1f}"
    rows = []
    for bench in races:
        race = Race(bench.stats.data, bench.extra_info["naive"])
        naive, ours = (1e3 * statistics.median(seconds) for seconds in (race.naive, race.ours))
        rows.append((bench.name, naive, ours, race.ratio, *bench.extra_info["interval"]))
    terminalreporter.write_line(f"\nmedian milliseconds {clock}, {torch.get_num_threads()} threads")
    terminalreporter.write_line(table(("", "naive", "ours", "times faster", "from", "to"), rows))

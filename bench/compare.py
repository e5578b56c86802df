"""Tell a regression from noise: python bench/compare.py BEFORE.json AFTER.json

Both files are of `make bench` (pytest-benchmark's JSON). Each benchmark was timed in alternation with its naive twin;
a machine that is slower today slows both. So what is compared is how many times faster than the twin it was. The
interval is a bootstrap's over the rounds of both runs. Exit code 1 when something became slower.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Race:
    """The seconds of a benchmark and of its naive twin, round by round."""

    ours: Sequence[float]
    naive: Sequence[float]

    @property
    def ratio(self) -> float:
        """How many times faster than its twin, by medians."""
        return float(np.median(self.naive) / np.median(self.ours))

    @property
    def ratios(self) -> np.ndarray:
        """The ratio of resampled rounds."""
        random = np.random.default_rng(0)
        return _medians(self.naive, random) / _medians(self.ours, random)


def _medians(seconds: Sequence[float], random: np.random.Generator) -> np.ndarray:
    picks = random.integers(len(seconds), size=(RESAMPLES, len(seconds)))
    return np.median(np.asarray(seconds)[picks], axis=1)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle of a bootstrap's values that holds their `CONFIDENCE` share."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def change(before: Race, after: Race) -> tuple[float, float, float]:
    """How many times faster `after` is than `before`, beside its twin: by medians, and its interval."""
    # the draws of both must not be the same ones: the second is turned round
    values = after.ratios / before.ratios[::-1]
    return after.ratio / before.ratio, *interval(values)


def verdict(low: float, high: float, least: float) -> str:
    """What an interval says, where changes below the share `least` count for nothing."""
    if high < 1 - least:
        return "slower"
    if low > 1 / (1 - least):
        return "faster"
    return "no difference seen" if low > 1 - least and high < 1 / (1 - least) else "too noisy to tell"


def read(path: Path) -> dict[str, Race]:
    """The races of a file. Raises a ValueError where it holds none."""
    try:
        entries = json.loads(path.read_text())["benchmarks"]
        races = {entry["name"]: Race(entry["stats"]["data"], entry["extra_info"]["naive"]) for entry in entries}
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path}: expected the JSON of `make bench` ({type(error).__name__}: {error})") from error
    if not races:
        raise ValueError(f"{path}: expected at least one benchmark, got none")
    return races


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=0.05, help="smallest share that counts as a change")
    options = parser.parse_args(arguments)
    try:
        before, after = read(options.before), read(options.after)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    shared = [name for name in before if name in after]
    if not shared:
        print(f"{options.before} and {options.after} have no benchmark in common", file=sys.stderr)
        return 2
    width = max(map(len, shared))
    print(f"{'':{width}}  before   after  after / before")
    found = []
    for name in shared:
        middle, low, high = change(before[name], after[name])
        found.append(verdict(low, high, options.least))
        print(
            f"{name:{width}}  {before[name].ratio:5.2f}x  {after[name].ratio:5.2f}x  "
            f"{middle:5.2f} ({low:.2f} to {high:.2f})  {found[-1]}"
        )
    for name in sorted(before.keys() ^ after.keys()):
        print(f"{name:{width}}  only in {options.before if name in before else options.after}")
    print(f"{found.count('slower')} of {len(shared)} slower, {found.count('faster')} faster")
    return 1 if "slower" in found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Tell a regression from noise: python bench/compare.py BEFORE.json AFTER.json

Both files are of `make bench` (pytest-benchmark's JSON). Each benchmark was timed in alternation with its naive twin;
a machine that is slower today slows both. So what is compared is how many times faster than the twin it was. The
interval of 95 % is a bootstrap's over the rounds of both runs. Exit code 1 when something became slower.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import table

RESAMPLES = 4000


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
        naive, ours = (
            np.median(random.choice(seconds, (RESAMPLES, len(seconds))), axis=1) for seconds in (self.naive, self.ours)
        )
        return naive / ours


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle of a bootstrap's values that holds 95 % of them."""
    low, high = np.percentile(values, [2.5, 97.5])
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


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=0.05, help="smallest share that counts as a change")
    arguments = parser.parse_args(words)
    try:
        before, after = read(arguments.before), read(arguments.after)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    rows = []
    for name in before.keys() & after.keys():
        middle, low, high = change(before[name], after[name])
        said = verdict(low, high, arguments.least)
        rows.append((name, before[name].ratio, after[name].ratio, middle, low, high, said))
    print(table(("", "before", "after", "after / before", "from", "to", ""), sorted(rows)))
    for name in sorted(before.keys() ^ after.keys()):
        print(f"{name}: only in {arguments.before if name in before else arguments.after}")
    verdicts = [row[-1] for row in rows]
    print(f"{verdicts.count('slower')} of {len(rows)} slower, {verdicts.count('faster')} faster")
    # nothing compared is no success either
    return 2 if not rows else int("slower" in verdicts)


if __name__ == "__main__":
    sys.exit(main())

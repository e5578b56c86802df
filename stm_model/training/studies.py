"""What a setting does to training: short runs that differ in it alone, and a table of their held-out scores.

python -m stm_model.training.studies --out OUT --variant "wide=--decoder-channels 128" --variant "l2=--similarity l2"
    -- --preset lite --trunk TRUNK --data DAVIS --steps 500

What stands behind `--` are the options of `stm train` that all runs share; each variant adds its own, and the run named
`reference` adds none. Every run is made once with each seed. OUT gets a folder for each; one that is done is not
trained again, one that was stopped goes on. Differences are means over the seeds, against the reference of that seed.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stm_model.io.files import write_json
from stm_model.progress import Progress

REFERENCE = "reference"
Outcome = dict[str, float]


def outcome(run: Path) -> Outcome | None:
    """Held-out J and F, mean loss over the last fifth and seconds per step of a run; None if it is not at its end."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    scores = [line for line in lines if "J" in line]
    logs = [line for line in lines if "loss" in line]
    if not scores or not (run / "done").is_file():
        return None
    losses = [line["loss"] for line in logs if line["step"] > 0.8 * scores[-1]["step"]]
    found = {"J": scores[-1]["J"], "F": scores[-1]["F"]}
    return found | {"loss": statistics.mean(losses), "seconds_per_step": logs[-1]["seconds_per_step"]}


def train(run: Path, options: Sequence[str]) -> Outcome:
    """Train by `stm train`, if that is not done, and what came of it; its output goes to a log beside the run."""
    if (found := outcome(run)) is not None:
        return found
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.with_suffix(".log")
    with open(log, "w") as output:
        command = [sys.executable, "-m", "stm_model", "train", *options, "--out", str(run)]
        finished = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if finished.returncode == 0:
        (run / "done").touch()
    if (found := outcome(run)) is None:
        raise ValueError(f"{run.name} did not end with a held-out score; see {log}")
    return found


def table(results: dict[str, list[Outcome]]) -> str:
    """The results as Markdown, a line for each variant, a column of J for each seed."""
    reference = results[REFERENCE]
    lines = [f"| | {' | '.join(f'J, seed {seed}' for seed in range(len(reference)))} | ΔJ | ΔF | loss | s/step |"]
    lines.append("| --- " * (len(reference) + 5) + "|")
    for name, runs in results.items():
        more = [statistics.mean(run[key] - base[key] for run, base in zip(runs, reference)) for key in "JF"]
        cells = [f"{run['J']:.3f}" for run in runs] + [f"{value:+.3f}" for value in more]
        cells += [f"{statistics.mean(run[key] for run in runs):.3f}" for key in ("loss", "seconds_per_step")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _variant(word: str) -> tuple[str, list[str]]:
    name, separator, options = word.partition("=")
    if not separator or not name or name == REFERENCE or "/" in name:
        raise argparse.ArgumentTypeError(f"expected NAME=OPTIONS with a name of its own, got {word!r}")
    return name, shlex.split(options)


def main(words: Sequence[str] | None = None) -> None:
    """Run a study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--variant", type=_variant, action="append", default=[], metavar="NAME=OPTIONS")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each variant, with the seeds 0, 1, …")
    parser.add_argument("--together", type=int, default=1, help="how many runs at once")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("shared", nargs="+", metavar="-- OPTIONS", help="of `stm train`, for all runs")
    arguments = parser.parse_args(words)
    if min(arguments.seeds, arguments.together) < 1:
        parser.error("--seeds, --together: expected at least 1")
    variants = {REFERENCE: []} | dict(arguments.variant)
    jobs = [(name, seed) for name in variants for seed in range(arguments.seeds)]
    results: dict[str, list[Outcome]] = {name: [] for name in variants}
    with ThreadPoolExecutor(arguments.together) as pool:
        running = {
            (name, seed): pool.submit(
                train, arguments.out / f"{name}-{seed}", [*arguments.shared, *variants[name], "--seed", str(seed)]
            )
            for name, seed in jobs
        }
        try:
            for (name, _), run in Progress(running.items(), desc="train", unit="run"):
                results[name].append(run.result())
        except ValueError as error:
            pool.shutdown(cancel_futures=True)
            raise SystemExit(f"studies: {error}") from None
    print(table(results))
    if arguments.json:
        write_json(arguments.json, {"shared": arguments.shared, "variants": variants, "results": results})


if __name__ == "__main__":
    main()

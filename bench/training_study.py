"""What helps training: python bench/training_study.py --data DAVIS --trunk TRUNK --out OUT

Short trainings of the preset `lite` that differ in one setting each, with the same seeds and so, where the setting does
not change them, the same clips. OUT gets a folder for each; what is there already is not trained again. Prints a table
of held-out J and F and of the loss, and with --results writes a JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.track import device_name
from stm_model.io.files import write_json
from stm_model.runtime import default_device

BASE = {
    "--key-channels": "64",
    "--value-channels": "128",
    "--decoder-channels": "64",
    "--similarity": "dot",
    "--crop": "176",
    "--crop-width": "288",
    "--max-skip": "5 25",
    "--paste": "0.35",
    "--distract": "0.15",
    "--replace": "0.15",
    "--stills": "0.35",
    "--color": "0.3",
    "--motion": "0.3",
    "--warmup": "100",
}
VARIANTS: dict[str, dict[str, str]] = {
    "reference": {},
    "decoder of 128": {"--decoder-channels": "128"},
    "keys of 128": {"--key-channels": "128"},
    "values of 256": {"--value-channels": "256"},
    "distance": {"--similarity": "l2"},
    "square views": {"--crop": "192", "--crop-width": "192"},
    "large skips at once": {"--max-skip": "25 25"},
    "no stills": {"--stills": "0"},
    "colours left as they are": {"--color": "0"},
    "no motion added": {"--motion": "0"},
    "pasted objects are followed": {"--distract": "0", "--replace": "0"},
    "nothing pasted": {"--paste": "0", "--distract": "0", "--replace": "0"},
}
"""What differs from BASE, by name."""


def folder(out: Path, name: str, seed: int) -> Path:
    """Of a run."""
    return out / f"{name.replace(' ', '-')}-{seed}"


def command(arguments: argparse.Namespace, name: str, seed: int) -> list[str]:
    """That trains a variant."""
    settings = BASE | VARIANTS[name] | {"--steps": str(arguments.steps), "--seed": str(seed)}
    paths = {"--data": arguments.data, "--trunk": arguments.trunk, "--out": folder(arguments.out, name, seed)}
    options = [word for option, value in settings.items() for word in (option, *value.split())]
    files = [str(word) for pair in paths.items() for word in pair]
    return [sys.executable, "-m", "stm_model", "train", "--preset", "lite", *options, *files]


def outcome(run: Path, steps: int) -> dict[str, float] | None:
    """Held-out J and F, mean loss over the last fifth and seconds per step of a run; None if it is not at its end."""
    if not (run / "metrics.jsonl").is_file():
        return None
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "J" in line and line["step"] == steps]
    losses = [line["loss"] for line in lines if "loss" in line and line["step"] > 0.8 * steps]
    if not scores or not losses:
        return None
    seconds = next(line["seconds_per_step"] for line in reversed(lines) if "seconds_per_step" in line)
    return {
        "J": scores[-1]["J"],
        "F": scores[-1]["F"],
        "loss": statistics.mean(losses),
        "seconds_per_step": seconds,
    }


def train(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    """Train a variant if that is not done, one thread of a CPU each where several are trained together."""
    run = folder(arguments.out, name, seed)
    found = outcome(run, arguments.steps)
    if found is None:
        run.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if arguments.together > 1 else {})
        with open(run.with_suffix(".log"), "w") as log:
            subprocess.run(command(arguments, name, seed), env=environment, stdout=log, stderr=log, check=False)
        found = outcome(run, arguments.steps)
    if found is None:
        raise SystemExit(f"training_study: {name}, seed {seed}: did not end; see {run.with_suffix('.log')}")
    return found


def table(results: dict[str, dict[int, dict[str, float]]], seeds: list[int]) -> str:
    """The results as Markdown; differences are means over the seeds, each against the reference of that seed."""
    reference = results["reference"]
    lines = [f"| | {' | '.join(f'J, seed {seed}' for seed in seeds)} | J, more | F, more | loss | seconds a step |"]
    lines.append("| --- " * (len(seeds) + 5) + "|")
    for name, runs in results.items():
        more = [statistics.mean(runs[seed][what] - reference[seed][what] for seed in seeds) for what in "JF"]
        means = [statistics.mean(runs[seed][what] for seed in seeds) for what in ("loss", "seconds_per_step")]
        scores = " | ".join(f"{runs[seed]['J']:.3f}" for seed in seeds)
        differences = " | ".join("" if name == "reference" else f"{value:+.3f}" for value in more)
        lines.append(f"| {name} | {scores} | {differences} | {means[0]:.3f} | {means[1]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in DAVIS' layout")
    parser.add_argument("--trunk", type=Path, required=True, help="weights of EfficientNet-Lite0")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=[*VARIANTS], metavar="NAME", help="variants")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--together", type=int, default=1, help="how many runs at once")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    for path in (arguments.data, arguments.trunk):
        if not path.exists():
            parser.error(f"{path}: no such file or folder")
    names = dict.fromkeys(["reference", *arguments.only])
    jobs = [(name, seed) for name in names for seed in arguments.seeds]
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    with ThreadPoolExecutor(arguments.together) as pool:
        running = {job: pool.submit(train, arguments, *job) for job in jobs}
        try:
            for (name, seed), run in tqdm(running.items(), desc="runs", unit="run"):
                results[name][seed] = run.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print(table(results, arguments.seeds))
    if arguments.results:
        machine = {"date": date.today().isoformat(), "device": device_name(str(default_device()))}
        settings = {"together": arguments.together, "base": BASE, "variants": VARIANTS, "steps": arguments.steps}
        write_json(arguments.results, {**machine, **settings, "results": results})


if __name__ == "__main__":
    main()

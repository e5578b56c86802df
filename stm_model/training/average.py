"""Average the weights of runs that went on from one another: `python -m stm_model.training.average A=1 B=2 --out FILE`.

FILE gets the mean of our .safetensors files A, B, …, each taken as often as the number behind it says, in float16 as
training writes it. Source: Wortsman et al., Model soups, ICML 2022.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stm_model.network.weights import read_tensors, write_tensors


def average(parts: list[tuple[dict[str, Tensor], float]]) -> dict[str, Tensor]:
    """The mean, by their weights, of tensors of the same names and shapes; integer tensors are the first's.

    Raises:
        ValueError: names or shapes differ; the first that does is named.
    """
    first, total = parts[0][0], sum(weight for _, weight in parts)
    for tensors, _ in parts[1:]:
        for name in sorted(first.keys() | tensors.keys()):
            shapes = [tuple(each[name].shape) if name in each else None for each in (first, tensors)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{name}: expected one shape in all files, got {shapes[0]} and {shapes[1]}")
    return {
        name: torch.stack([weight / total * tensors[name].double() for tensors, weight in parts]).sum(0)
        if value.is_floating_point()
        else value
        for name, value in first.items()
    }


def _part(word: str) -> tuple[Path, float]:
    """FILE=NUMBER as an argument."""
    path, _, number = word.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    if not path or not 0 < weight < float("inf"):
        raise ValueError(f"{word}: expected FILE=NUMBER with a number above 0")
    return Path(path), weight


def main(words: Sequence[str] | None = None) -> None:
    """Average the files that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE=NUMBER")
    parser.add_argument("--out", type=Path, required=True, help="must not exist")
    arguments = parser.parse_args(words)
    try:
        if arguments.out.exists():
            raise ValueError(f"--out: {arguments.out} exists")
        parts = [(read_tensors(path), weight) for path, weight in map(_part, arguments.files)]
        write_tensors(average(parts), arguments.out, torch.float16)
    except (OSError, ValueError) as error:
        raise SystemExit(f"average: {error}") from None


if __name__ == "__main__":
    main()

"""Time of F beside the official algorithm: python bench/metrics.py [--vectors FOLDER] [--out FILE]

Both sides score the same pairs of masks on one core, and each F is checked to agree to 1e-9 before its time counts. The
peer grows whole contours by a disk and counts what they cover, as published, with SciPy's binary dilation (what
scikit-image calls) and, where it is installed, with OpenCV's. Without --vectors the masks are of a procedural clip.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy.ndimage import binary_dilation

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import alternate, describe, options, table, write_json
from stm_model.data.synthetic import procedural_clip
from stm_model.evaluation.metrics import contour_accuracy, region_similarity

SIZE = (480, 854)
Pair = tuple[np.ndarray, np.ndarray]


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the next one to the right, below, or both; the mask goes on past its edge."""
    wide = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ wide[:-1, 1:]) | (mask ^ wide[1:, :-1]) | (mask ^ wide[1:, 1:])


def published_contour_accuracy(prediction: np.ndarray, truth: np.ndarray, dilate: Callable) -> float:
    """F by growing whole contours, as the measure is published (Perazzi et al., CVPR 2016)."""
    reach = math.ceil(0.008 * np.linalg.norm(truth.shape))
    offsets = np.arange(-reach, reach + 1)
    disk = offsets[:, None] ** 2 + offsets**2 <= reach**2
    predicted, true = contour(prediction), contour(truth)
    count, true_count = predicted.sum(), true.sum()
    if not count or not true_count:
        return float(count == true_count)
    precision = (predicted & dilate(true, disk)).sum() / count
    recall = (true & dilate(predicted, disk)).sum() / true_count
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def dilations() -> dict[str, Callable]:
    """What the published algorithm can grow its contours with here."""
    found = {"SciPy": binary_dilation}
    try:
        import cv2
    except ImportError:
        return found
    cv2.setNumThreads(1)
    found["OpenCV"] = lambda mask, disk: cv2.dilate(mask.astype(np.uint8), disk.astype(np.uint8)).astype(bool)
    return found


def procedural_pairs(count: int = 12, size: tuple[int, int] = SIZE) -> list[Pair]:
    """Masks of a clip, each against the one two frames later."""
    _, labels = procedural_clip(count + 2, size, 2, seed=0)
    return [(labels[index + 2] == 1, labels[index] == 1) for index in range(count)]


def vector_pairs(folder: Path) -> list[Pair]:
    """The mask pairs of the evaluation vectors that have a whole frame's size."""
    packed, pairs = np.load(folder / "vectors.npz"), []
    for pair in json.loads((folder / "vectors.json").read_text())["pairs"]:
        shape = pair["shape"]
        if shape[0] >= SIZE[0]:
            masks = [np.unpackbits(packed[f"{pair['i']}_{name}"], count=math.prod(shape)) for name in ("pred", "gt")]
            pairs.append(tuple(mask.reshape(shape).astype(bool) for mask in masks))
    return pairs


def main(words: Sequence[str] | None = None, pairs: list[Pair] | None = None) -> int:
    parser = options(__doc__, repeats=15, threads=1)
    parser.add_argument("--vectors", type=Path, help="folder with vectors.json and vectors.npz")
    arguments = parser.parse_args(words)
    if arguments.vectors and not (arguments.vectors / "vectors.json").is_file():
        parser.error(f"--vectors: no vectors.json in {arguments.vectors}")
    pairs = pairs or (vector_pairs(arguments.vectors) if arguments.vectors else procedural_pairs())
    measures: dict[str, Callable] = {"F, ours": contour_accuracy, "J, ours": region_similarity}
    for name, dilate in dilations().items():
        measures[f"F, published algorithm with {name}"] = measure = partial(published_contour_accuracy, dilate=dilate)
        for pair in pairs:
            ours, theirs = contour_accuracy(*pair), measure(*pair)
            if abs(ours - theirs) > 1e-9:
                print(f"metrics: F {ours}, but {theirs} by the published algorithm with {name}", file=sys.stderr)
                return 1
    calls = {name: lambda measure=measure: [measure(*pair) for pair in pairs] for name, measure in measures.items()}
    seconds = alternate(calls, arguments.repeats)
    # the least: what else the machine does only adds
    each = {name: 1e3 * times["least"] / len(pairs) for name, times in seconds.items()}
    print(f"{len(pairs)} pairs of masks, {pairs[0][0].shape[0]} rows, one core; every F agrees to 1e-9")
    print(table(("", "ms a pair", "times ours"), [(name, one, one / each["F, ours"]) for name, one in each.items()]))
    write_json(describe("cpu") | {"pairs": len(pairs), "milliseconds": each}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time of F and J beside the official algorithm: python bench/metrics.py [--vectors FOLDER] [--out FILE]

Both sides score the same pairs of masks on one core, and each F is checked to agree to 1e-9 before its time counts. The
peer grows whole contours by a disk and counts what they cover, as published, with SciPy's binary dilation (what
scikit-image calls) and, where it is installed, with OpenCV's. Without --vectors the masks are of a procedural clip.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from scipy.ndimage import binary_dilation

from stm_model.evaluation.metrics import contour_accuracy, region_similarity

SIZE = (480, 854)
Pair = tuple[np.ndarray, np.ndarray]


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the next one to the right, below, or both; the mask goes on past its edge."""
    right, below = np.empty_like(mask), np.empty_like(mask)
    right[:, :-1], right[:, -1] = mask[:, 1:], mask[:, -1]
    below[:-1], below[-1] = mask[1:], mask[-1]
    diagonal = np.empty_like(mask)
    diagonal[:-1], diagonal[-1] = right[1:], right[-1]
    return (mask ^ right) | (mask ^ below) | (mask ^ diagonal)


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


def procedural_pairs(count: int = 12) -> list[Pair]:
    """Masks of a clip, each against the one two frames later."""
    from stm_model.data.synthetic import procedural_clip

    _, labels = procedural_clip(count + 2, SIZE, 2, seed=0)
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


def milliseconds(measure: Callable, pairs: list[Pair], repeats: int) -> list[float]:
    """The quickest of the repeats for each pair: what else the machine does only adds."""
    times = []
    for pair in pairs:
        runs = []
        for _ in range(repeats):
            start = time.perf_counter()
            measure(*pair)
            runs.append(1e3 * (time.perf_counter() - start))
        times.append(min(runs))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, help="folder with vectors.json and vectors.npz")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    pairs = vector_pairs(arguments.vectors) if arguments.vectors else procedural_pairs()
    rows = {
        "F, ours": milliseconds(contour_accuracy, pairs, arguments.repeats),
        "J, ours": milliseconds(region_similarity, pairs, arguments.repeats),
    }
    for name, dilate in dilations().items():
        for pair in pairs:
            ours, theirs = contour_accuracy(*pair), published_contour_accuracy(*pair, dilate)
            assert abs(ours - theirs) <= 1e-9, f"{name}: F {theirs} instead of {ours}"
        measure = lambda *pair, dilate=dilate: published_contour_accuracy(*pair, dilate)  # noqa: E731
        rows[f"F, published algorithm with {name}"] = milliseconds(measure, pairs, arguments.repeats)
    ours = rows["F, ours"]
    print(f"{len(pairs)} pairs of masks, {SIZE[0]} rows, one core; every F agrees to 1e-9")
    for name, times in rows.items():
        ratio = [peer / own for peer, own in zip(times, ours, strict=True)]
        print(f"{name:38} {statistics.median(times):8.3f} ms a pair, {statistics.median(ratio):7.1f}× ours")
    if arguments.out:
        command = " ".join(["python", *sys.argv])
        versions = {"python": platform.python_version(), "numpy": np.__version__}
        report = {"command": command, "date": date.today().isoformat(), "versions": versions, "milliseconds": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

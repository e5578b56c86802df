"""Weights for the released STM's parameter names and shapes: a function of the names, the same with any NumPy.

RandomState's streams never change. Normalization and gains keep the activations of the untrained network in range.
"""

import json
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def make() -> dict[str, np.ndarray]:
    """Name → array, for every name and shape in manifest.json."""
    gains = json.loads((HERE / "gains.json").read_text())
    shapes = json.loads((HERE / "manifest.json").read_text())
    return {name: _array(name, shape, gains.get(name, 1.0)) for name, shape in shapes.items()}


def _array(name: str, shape: list[int], gain: float) -> np.ndarray:
    random = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    count = int(np.prod(shape))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith(".mean") and len(shape) == 4:
        values = np.float32([0.485, 0.456, 0.406])
    elif name.endswith(".std"):
        values = np.float32([0.229, 0.224, 0.225])
    elif name.endswith("running_mean"):
        values = 0.1 * random.randn(count)
    elif name.endswith("running_var"):
        values = 0.5 + random.rand(count)
    elif len(shape) == 4:
        values = random.randn(count) * np.sqrt(2.0 / np.prod(shape[1:]))
    elif name.endswith("weight"):
        # the last batch norm of a bottleneck is small, as after training
        values = (0.2 if ".bn3." in name else 1.0) * (1.0 + 0.2 * random.randn(count))
    else:
        values = 0.1 * random.randn(count)
    return (np.asarray(values).reshape(shape) * gain).astype(np.float32)

"""What a tracker is given, checked: frames and label maps."""

from __future__ import annotations

import numpy as np
from torch import Tensor

VOID = 255
"""The label of pixels nobody knows."""


def objects_in(mask: np.ndarray) -> set[int]:
    """The labels of the objects in a mask."""
    return set(np.unique(mask).tolist()) - {0, VOID}


def check_frame(frame: np.ndarray, index: int, size: tuple[int, int] | None) -> np.ndarray:
    """Raise a ValueError unless a frame is uint8 `[H, W, 3]` of the size of those before it."""
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        form = f"{frame.dtype} {list(frame.shape)}" if hasattr(frame, "dtype") else type(frame).__name__
        raise ValueError(f"frame {index}: expected a uint8 array [H, W, 3], got {form}")
    if 0 in frame.shape:
        raise ValueError(f"frame {index}: expected at least one pixel, got {list(frame.shape)}")
    if size is not None and frame.shape[:2] != size:
        raise ValueError(
            f"frame {index}: expected {by(size)} pixels (height×width) like frame 0, got {by(frame.shape)}"
        )
    return frame


def check_mask(mask: np.ndarray | Tensor, index: int) -> np.ndarray:
    """A label map as uint8 `[H, W]`; raise a ValueError that says why it is none."""
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.ndim != 2:
        raise ValueError(f"mask of frame {index}: expected [H, W], got {list(array.shape)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"mask of frame {index}: expected label values, got NaN or infinity")
    if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and (array != np.round(array)).any()):
        raise ValueError(f"mask of frame {index}: expected whole label values 0…255, got {array.dtype}")
    if array.size and (array.min() < 0 or array.max() > 255):
        raise ValueError(f"mask of frame {index}: expected labels 0…255, got {array.min()}…{array.max()}")
    return array.astype(np.uint8)


def by(shape: tuple[int, ...]) -> str:
    """A size as height×width."""
    return f"{shape[0]}×{shape[1]}"

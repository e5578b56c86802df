"""Frames and masks as they are given: checked, and brought to the network's size, format and device."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stm_model.network import STRIDE

Frame = Any
"""A uint8 array or tensor `[H, W, 3]`, or a PIL image of mode RGB; once checked no PIL image any more."""


def check_frame(frame: Frame, index: int, size: tuple[int, int] | None) -> Frame:
    """A frame as a uint8 array or tensor `[H, W, 3]`, on the device where it is; raise a ValueError unless it has that
    form and the size of those before it.
    """
    if not isinstance(frame, (np.ndarray, Tensor)) and hasattr(frame, "__array_interface__"):
        frame = np.asarray(frame)
    if isinstance(frame, Tensor):
        _check_dense(frame, f"frame {index}")
    form = f"{frame.dtype} {list(frame.shape)}" if hasattr(frame, "dtype") else type(frame).__name__
    if (
        not isinstance(frame, (np.ndarray, Tensor))
        or frame.dtype not in (np.uint8, torch.uint8)
        or frame.ndim != 3
        or frame.shape[2] != 3
    ):
        raise ValueError(f"frame {index}: expected a uint8 array or tensor [H, W, 3], or an RGB PIL image, got {form}")
    if 0 in frame.shape:
        raise ValueError(f"frame {index}: expected at least one pixel, got {list(frame.shape)}")
    if size is not None and frame.shape[:2] != size:
        raise ValueError(f"frame {index}: expected [H, W] = {list(size)} like frame 0, got {list(frame.shape[:2])}")
    return frame


def as_array(frame: Frame) -> np.ndarray:
    """A checked frame in the host's memory."""
    return frame.detach().cpu().numpy() if isinstance(frame, Tensor) else frame


def _check_dense(tensor: Tensor, name: str) -> None:
    """Raise a ValueError unless a tensor has a value at each place."""
    kind = "nested" if tensor.is_nested else "meta" if tensor.is_meta else "sparse"
    if tensor.is_nested or tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor with values, got a {kind} one")


def check_index(index: int, frame_count: int | None) -> int:
    """The frame of a mask; raise a ValueError if there is no such frame. `frame_count` is None if unknown."""
    if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
        raise ValueError(f"masks: expected whole frame numbers as keys, got {index!r}")
    if index < 0 or (frame_count is not None and index >= frame_count):
        last = "" if frame_count is None else f" to {frame_count - 1}"
        raise ValueError(f"masks: expected frame numbers from 0{last}, got {index}")
    return int(index)


def check_mask(mask: np.ndarray | Tensor, index: int) -> np.ndarray:
    """A label map as uint8 `[H, W]`; raise a ValueError that says what is wrong with it."""
    if isinstance(mask, Tensor):
        _check_dense(mask, f"mask of frame {index}")
    try:
        if isinstance(mask, Tensor):
            # NumPy has neither bfloat16 nor the formats of eight bits
            mask = (mask.float() if mask.is_floating_point() else mask).detach().cpu().numpy()
        array = np.asarray(mask)
    except (TypeError, ValueError, NotImplementedError) as error:
        # numbers in pairs or quantized, rows of different lengths
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask of frame {index}: expected whole label values [H, W], got {kind}") from error
    if array.ndim != 2:
        raise ValueError(f"mask of frame {index}: expected [H, W], got {list(array.shape)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"mask of frame {index}: expected label values, got NaN or infinity")
    if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and (array != np.round(array)).any()):
        raise ValueError(f"mask of frame {index}: expected whole label values 0…255, got {array.dtype}")
    if array.size and (array.min() < 0 or array.max() > 255):
        raise ValueError(f"mask of frame {index}: expected labels 0…255, got {array.min()}…{array.max()}")
    return array.astype(np.uint8)


def check_side(shorter_side: int | None) -> None:
    """Raise a TypeError unless a shorter side is a number, a ValueError unless such frames have a position."""
    if shorter_side is not None and (isinstance(shorter_side, bool) or not isinstance(shorter_side, (int, np.integer))):
        raise TypeError(f"size: expected a whole number of pixels, got {shorter_side!r}")
    if shorter_side is not None and shorter_side < STRIDE:
        raise ValueError(f"size: expected at least {STRIDE} pixels, got {shorter_side}")


def check_spacing(spacing: int) -> None:
    """Raise a TypeError unless a spacing of positions is a whole number, a ValueError unless it is at least 1."""
    if isinstance(spacing, bool) or not isinstance(spacing, (int, np.integer)):
        raise TypeError(f"spacing: expected a whole number of rows and columns, got {spacing!r}")
    if spacing < 1:
        raise ValueError(f"spacing: expected at least 1, got {spacing}")


def scaled_size(frame_size: tuple[int, int], shorter_side: int | None) -> tuple[int, int]:
    """Height and width of a frame once its shorter side has so many pixels; None keeps its size."""
    height, width = frame_size
    if shorter_side is None:
        return height, width
    factor = shorter_side / min(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def prepare_frame(frame: Frame, size: tuple[int, int], device: torch.device) -> Tensor:
    """uint8 `[H, W, 3]` → float32 `[1, 3, h, w]` in 0…1, resized to `size` (h, w) and not yet padded."""
    if not isinstance(frame, Tensor):
        # some frames cannot be written to, which torch warns of
        frame = torch.from_numpy(np.require(frame, requirements=["C", "W"]))
    pixels = frame.to(device).permute(2, 0, 1)[None]
    if size != pixels.shape[-2:]:
        # a CPU has fast bytes, a GPU none
        pixels = pixels if device.type == "cpu" else pixels.float()
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True).clamp_(0, 255)
    # NCHW here, so that the weights alone decide the memory format of the convolutions
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def prepare_mask(mask: np.ndarray, size: tuple[int, int], device: torch.device) -> Tensor:
    """uint8 labels `[H, W]` → uint8 `[h, w]`, each pixel with its nearest neighbour's label."""
    labels = torch.from_numpy(np.ascontiguousarray(mask)).to(device)
    if size == mask.shape:
        return labels
    return F.interpolate(labels[None, None].float(), size, mode="nearest-exact")[0, 0].to(torch.uint8)


def pad_to_stride(maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Zero-pad `[…, H, W]` to multiples of 16 on both sides, the odd pixel below and right.

    Returns:
        The padded maps and the rows and columns added at the top and at the left.
    """
    rows, columns = (-maps.shape[-2]) % STRIDE, (-maps.shape[-1]) % STRIDE
    top, left = rows // 2, columns // 2
    return F.pad(maps, (left, columns - left, top, rows - top)), (top, left)


def winners_of(probabilities: Tensor) -> np.ndarray:
    """`[n + 1, h, w]` → uint8 `[h, w]`: of each pixel the channel with the largest one, the first of equals."""
    if len(probabilities) == 2:
        # finding the index of the larger takes some times as long
        return (probabilities[1] > probabilities[0]).cpu().numpy().view(np.uint8)
    # not argmax, which takes ten times as long over a strided axis on a CPU
    return probabilities.max(0).indices.to(torch.uint8).cpu().numpy()


def check_size(mask: np.ndarray, frame: Frame, index: int) -> None:
    """Raise a ValueError unless a mask has the size of its frame."""
    if mask.shape != frame.shape[:2]:
        size, found = list(frame.shape[:2]), list(mask.shape)
        raise ValueError(f"mask of frame {index}: expected [H, W] = {size} like its frame, got {found}")

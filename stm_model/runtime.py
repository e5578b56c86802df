"""The weights in the package; where a network runs, in which number format; what its process takes; one-line errors."""

from __future__ import annotations

import ctypes
import errno
import platform
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

# torch is imported where it is used: the commands' options are read without it
if TYPE_CHECKING:
    import numpy as np
    import torch


Item = TypeVar("Item")


DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "stm_shared.safetensors"
"""The weights that come with the package; their card lies beside them."""
DEFAULT_INTERACTIVE_WEIGHTS = DEFAULT_WEIGHTS.with_name("stm_interactive.safetensors")
"""The weights guided by scribbles that come with the package."""
USUAL_SIZE = 480
"""Shorter side in pixels at which a network with the package's weights runs, unless another one is asked for."""
CLOSE_SIZE = 600
"""Likewise, where an object is `SMALL`."""
SMALL = 0.01
"""Share of the frame below which an object is small: at 480 pixels it fills fewer than 16 positions of the memory."""

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""Those that end a command in order: what is done is kept."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h."""

STDIN = "-"
LIVE_SCHEMES = ("rtsp", "rtsps", "rtmp", "tcp", "udp", "rtp", "srt", "http", "https")


def is_live(source: str | Path) -> bool:
    """Whether a source is stdin (`-`), a camera (`/dev/video0`) or a network address, of which nothing comes twice."""
    scheme, colon, _ = str(source).partition("://")
    return source == STDIN or str(source).startswith("/dev/video") or (bool(colon) and scheme in LIVE_SCHEMES)


def chosen_side(
    size: int | None,
    checkpoint: Path | None,
    frame_size: Sequence[int],
    masks: Mapping[int, np.ndarray] | None = None,
) -> int | None:
    """Shorter side in pixels at which a network runs on frames `[H, W]` of this size; None is their own.

    Args:
        size: what was asked for; None is `USUAL_SIZE`, or `CLOSE_SIZE` for small objects; with other weights than the
            package's the frames' own.
        checkpoint: where the weights are from; None are the default ones.
        frame_size: height and width in pixels.
        masks: frame → its label map; the first of them says how large the objects are.
    """
    from stm_model.labels import smallest_share

    if size is None and checkpoint in (None, DEFAULT_WEIGHTS, DEFAULT_INTERACTIVE_WEIGHTS):
        size = CLOSE_SIZE if masks and smallest_share(masks[min(masks)]) < SMALL else USUAL_SIZE
    return None if size == min(frame_size) else size


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Which network runs, where and how: options that several commands share."""

    checkpoint: Path | None = None
    """A released .pth or our .safetensors; None takes the weights that come with the package."""
    size: int | None = None
    """Shorter side in pixels at which the network runs. None takes 480 with the package's weights, or 600 where an
    object fills less than a hundredth of its first frame, and the video's own with others. Masks always have the
    video's size."""
    device: str | None = None
    """Where to run, like cpu or cuda:0; None takes the GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    """Number format of the network; None takes bfloat16 where the device computes it natively, else float32. int8 is
    for CPUs: convolutions in eight bits, the rest in float32."""


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(device: str | torch.device | None) -> torch.device:
    """A device by its name, the default one for None. Raises a ValueError where it cannot be used."""
    import torch

    try:
        found = default_device() if device is None else torch.device(device)
        # asks for a value, which the meta device has none of
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device} cannot be used here ({one_line(error)})") from error
    return found


def device_name(device: torch.device) -> str:
    """What the maker calls the device."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where the device computes it natively, else float32."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        # not where ONEDNN_MAX_CPU_ISA keeps oneDNN from it
        native = native and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def check_int8(device: torch.device) -> None:
    """Raise a ValueError where convolutions cannot run in eight bits."""
    import torch

    if device.type != "cpu" or not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        found = device if device.type != "cpu" else "one that PyTorch has no oneDNN for"
        raise ValueError(f"dtype: int8 expected an x86 CPU, got {found}")


def warn_if_emulated(dtype: torch.dtype, device: torch.device) -> None:
    """Say so where a processor has no instructions for a number format that was asked for."""
    import torch

    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if device.type == "cpu" and dtype in native and not native[dtype]():
        name = dtype_name(dtype)
        warnings.warn(
            f"dtype: this processor emulates {name}, which takes some 20 times as long as float32", stacklevel=3
        )


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def held_process_memory() -> int | None:
    """Memory this process holds, in bytes; None where the system does not say."""
    return _status_bytes("VmRSS")


def peak_process_memory() -> int | None:
    """Most memory this process ever held, in bytes; None where the system does not say."""
    # getrusage counts what the parent held when this process was started, so it is asked only where nothing else is
    if (peak := _status_bytes("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status_bytes(field_name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field_name + ":")), None)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for what is allocated next, where it is glibc; for a process of its own.

    Left to itself it gives maps of a few megabytes back to the system, and asks for as much again for the next frame,
    which it has to fill with zeros first.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 512 * 2**20)


def timed(items: Iterable[Item], spent: dict[str, float], name: str, within: str | None = None) -> Iterator[Item]:
    """The items, adding the seconds until each comes to `spent[name]`, and taking them from those of `within`."""
    iterator = iter(items)
    while True:
        started = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            took = time.perf_counter() - started
            spent[name] += took
            if within is not None:
                spent[within] -= took
        yield item


class OtherRankFailed(Exception):
    """Raised in a process of torchrun's that waits for one that ended; that one says why."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the process or of a GPU ran out, or what it may address (`ulimit -v`)."""
    # EAGAIN: a thread cannot be started, for want of its stack
    lacking = isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EAGAIN)
    return lacking or isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "can't start new thread", "failed to map segment")
"""How libraries say it."""


def one_line(error: BaseException) -> str:
    """What an error says, as one line."""
    if isinstance(error, OSError) and error.strerror and not is_out_of_memory(error):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    said = " ".join(str(error).strip().partition("\n")[0].split()) or type(error).__name__
    return said if "out of memory" in said or not is_out_of_memory(error) else f"out of memory ({said})"

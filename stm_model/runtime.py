"""Where the network runs and with which numbers, unless the caller says otherwise; what its process holds."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where the device computes it natively, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


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

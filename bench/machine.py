"""What a measurement was made on."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# only read: nothing here changes a setting of the GPU
QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions and revision."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    found: dict[str, Any] = {"device": device_name(device), "versions": versions, "revision": revision()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
        found["cache_bytes"] = cache_bytes(device)
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), Triton's interpreter"


def cache_bytes(device: torch.device) -> int:
    """Of the second-level cache; 0 on a CPU, where nothing is rotated."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def clocks(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks, power and temperature of this moment; None where nvidia-smi does not answer."""
    if device.type != "cuda":
        return None
    try:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "-i", str(device.index or 0)]
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(QUERY.split(","), (value.strip() for value in line.split(","))))


def revision() -> str | None:
    """The commit of this checkout, marked where files differ from it; None where there is no git."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def clock(device: torch.device) -> float:
    """Seconds: of processor time on a CPU, so that what else the machine does counts little; else of the clock."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


class Peak:
    """Most bytes held since `reset`, on a GPU by tensors, on a CPU by the process."""

    def __init__(self, device: torch.device | str):
        self.on_gpu = torch.device(device).type == "cuda"

    def reset(self) -> int:
        """Forget earlier peaks; the bytes held now."""
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        # 5 sets the kernel's high-water mark back to what the process holds now
        Path("/proc/self/clear_refs").write_text("5")
        return self._of_process("VmRSS")

    def read(self) -> int:
        if self.on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return self._of_process("VmHWM")

    @staticmethod
    def _of_process(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

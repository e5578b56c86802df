"""`stm info`: versions, devices and what would run on them."""

import json
import platform
from dataclasses import dataclass

from stm_model import __version__
from stm_model.runtime import default_dtype, device_name, dtype_name


@dataclass(frozen=True)
class InfoConfig:
    """Show versions, devices and what would run on them."""

    json: bool = False
    """Print JSON."""


def info(config: InfoConfig) -> int:
    """Print what is installed and what would run; the exit code."""
    import torch

    from stm_kernels import default_implementation
    from stm_model.runtime import DEFAULT_WEIGHTS

    found = [*(torch.device("cuda", index) for index in range(torch.cuda.device_count())), torch.device("cpu")]
    devices = {str(device): device_name(device) for device in found}
    if instructions := _instructions():
        devices["cpu"] += f" ({', '.join(instructions)})"
    versions: dict[str, str | None] = {
        "stm-kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    versions["triton"] = _triton_version()
    weights = str(DEFAULT_WEIGHTS) if DEFAULT_WEIGHTS.is_file() else None
    rows = {
        device: {
            "name": name,
            "implementation": default_implementation(device),
            "dtype": dtype_name(default_dtype(device)),
        }
        for device, name in devices.items()
    }
    if config.json:
        print(json.dumps({"versions": versions, "devices": rows, "weights": weights}, indent=2))
        return 0
    for package, number in versions.items():
        print(f"{package:12} {number or 'not installed'}")
    for device, row in rows.items():
        print(f"{device:12} {row['name']}: reads memory with {row['implementation']}, tracks in {row['dtype']}")
    if rows["cpu"]["dtype"] == "float32" and len(rows) == 1:
        print(f"{'':12} --dtype int8 tracks faster here")
    print(f"{'weights':12} {weights or 'none in the package'}")
    return 0


def _instructions() -> list[str]:
    """Instructions of the processor that make a difference, the oldest first."""
    import torch

    known = {"AVX2": "avx2", "AVX-512": "avx512", "VNNI": "vnni", "bfloat16": "avx512_bf16", "AMX": "amx_tile"}
    return [name for name, asked in known.items() if getattr(torch.cpu, f"_is_{asked}_supported", bool)()]


def _triton_version() -> str | None:
    """Of the module: what installed it has another name on Windows and for AMD's GPUs."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__

"""Checkpoints: the released `.pth`, with or without `module.`, and our safetensors."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stm_model.network import STM, STMConfig

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "stm_small.safetensors"
"""The weights that come with the package; their card lies beside them."""


class CheckpointError(ValueError):
    """A file that is no checkpoint, or whose tensors are not those of an STM."""


def load_model(
    path: str | os.PathLike | None = None, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> STM:
    """See `STM.load`."""
    device = torch.device(device) if device is not None else default_device()
    tensors = read_tensors(DEFAULT_WEIGHTS if path is None else Path(path))
    config = infer_config(tensors)
    with torch.device("meta"):
        model = STM(config)
    _check_names(model.state_dict(), tensors, path or DEFAULT_WEIGHTS)
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False)
    return model.eval().to(device, dtype or default_dtype(device), memory_format=torch.channels_last)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a `.pth` or `.safetensors` file, without `module.`, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"checkpoint: {path} can't be read: {reason}") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"checkpoint: {path}: expected a dictionary of named tensors")
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def infer_config(tensors: dict[str, Tensor]) -> STMConfig:
    """The network's shape, read off its tensors; the released shape where a tensor is missing."""
    released = STMConfig()

    def rows(name: str, default: int) -> int:
        return tensors[name].shape[0] if name in tensors and tensors[name].ndim else default

    is_resnet50 = any(re.search(r"\.res2\.0\.conv3\.weight$", name) for name in tensors)
    is_resnet18 = not is_resnet50 and "Encoder_Q.res2.0.conv2.weight" in tensors
    return STMConfig(
        backbone="resnet18" if is_resnet18 else "resnet50",
        key_channels=rows("KV_Q_r4.Key.weight", released.key_channels),
        value_channels=rows("KV_Q_r4.Value.weight", released.value_channels),
        decoder_channels=rows("Decoder.convFM.weight", released.decoder_channels),
    )


def _check_names(expected: dict[str, Tensor], found: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Raise a CheckpointError that names the first five tensors that differ."""
    differences = [f"missing {name}" for name in expected if name not in found]
    differences += [f"unexpected {name}" for name in found if name not in expected]
    differences += [
        f"{name} {list(found[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    if differences:
        shown = "; ".join(differences[:5])
        rest = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CheckpointError(f"checkpoint: {path} does not hold an STM: {shown}{rest}")


def save_model(model: STM, path: str | os.PathLike, *, dtype: torch.dtype | None = None) -> None:
    """Write a network's tensors as safetensors, to a temporary name first.

    Args:
        model: the network.
        path: where to, ending in `.safetensors`.
        dtype: floating-point type in the file; None keeps each tensor's own.
    """
    path = Path(path)
    tensors = {
        name: value.detach().cpu().to(dtype if dtype and value.is_floating_point() else value.dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    temporary = path.with_name(path.name + ".part")
    save_file(tensors, temporary)
    os.replace(temporary, path)


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where the device computes it natively, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    else:
        native = False
    return torch.bfloat16 if native else torch.float32

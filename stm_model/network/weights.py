"""Checkpoints as named tensors: the released `.pth`, with or without `module.`, and our safetensors."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stm_model.io.files import whole


class CheckpointError(ValueError):
    """A file that is no checkpoint, or whose tensors are not those of the network."""


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The named tensors of a `.pth` or `.safetensors` file, without `module.`, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file holds no named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")
    tensors: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        # a file that is no checkpoint makes its reader fail in any way: IndexError, KeyError, UnpicklingError, …
        said = "" if isinstance(error, LookupError) else str(error).strip()
        reason = (said or f"it is no file of torch.save ({type(error).__name__})").splitlines()[0].partition(". ")[0]
        raise CheckpointError(f"checkpoint: {path} can't be read: {reason}") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"checkpoint: {path}: expected a dictionary of named tensors")
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def check_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: str | os.PathLike, kind: str = "an STM"
) -> None:
    """Raise a CheckpointError that names the first five tensors that differ in name or shape."""
    differences = [f"missing {name}" for name in expected if name not in found]
    differences += [f"unexpected {name}" for name in found if name not in expected]
    differences += [
        f"{name} {list(found[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    if differences:
        rest = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CheckpointError(f"checkpoint: {path} does not hold {kind}: {'; '.join(differences[:5])}{rest}")


def check_finite(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Raise a CheckpointError that names the first five tensors with NaN or infinity in them."""
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        rest = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        dtype = str(tensors[bad[0]].dtype).removeprefix("torch.")
        raise CheckpointError(f"checkpoint: {path} has NaN or infinity, in {dtype}, in {', '.join(bad[:5])}{rest}")


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write named tensors as safetensors, to a temporary name first.

    Args:
        tensors, path: what to write, and where to, ending in `.safetensors`.
        dtype: floating-point type in the file; None keeps each tensor's own.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored = {
        name: value.detach().cpu().to(dtype if dtype and value.is_floating_point() else value.dtype).contiguous()
        for name, value in tensors.items()
    }
    with whole(path) as partial:
        try:
            save_file(stored, partial)
        except SafetensorError as error:
            # a missing folder or a full disk, without an error number
            raise OSError(f"{path}: cannot be written ({error})") from error
        # safetensors writes for the owner alone; a file among a package's others is for everybody
        partial.chmod(0o644)

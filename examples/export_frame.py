"""The whole step of one frame as one exported program: encode, read, decode, aggregate, remember.

python examples/export_frame.py
"""

import tempfile
import warnings

import torch
from compare import report
from torch import Tensor, nn

from stm_kernels import memory_read
from stm_model import STM
from stm_model.network import as_positions, other_object_masks, soft_aggregate


class Before(nn.Module):
    """A frame is segmented and remembered; the read holds the affinity."""

    def __init__(self, model: STM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, frame: Tensor, previous: Tensor, memory_key: Tensor, memory_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Segment a frame and make what to remember of it.

        Args:
            frame: `[1, 3, H, W]` RGB in 0…1, H and W multiples of 16.
            previous: `[K, H, W]` masks of the K objects in the frame before.
            memory_key, memory_value: `[1, N, C]` and `[K, N, V]`, N positions remembered; the objects share the keys.

        Returns:
            Probabilities `[K + 1, H, W]`, background first, and what to append to the memory: `[1, H·W/256, C]` and
            `[K, H·W/256, V]`.
        """
        objects, height, width = len(memory_value), frame.shape[2] // 16, frame.shape[3] // 16
        query = self.model.encode_query(frame)
        query_key = as_positions(query.key)
        logits = 2 * query_key @ memory_key.mT - memory_key.square().sum(2)[:, None]
        affinity = (logits * memory_key.shape[2] ** -0.5).softmax(2)
        read = affinity @ memory_value
        read = read.mT.unflatten(2, (height, width))
        hint = previous, other_object_masks(previous)
        masks = soft_aggregate(self.model.segment(read, query, [objects], hint)).softmax(0)
        key, value = self.model.memorize(query, masks[1:], other_object_masks(masks[1:]), [objects])
        return masks, as_positions(key), as_positions(value)


class After(nn.Module):
    """A frame is segmented and remembered; in the exported program the read is one operator."""

    def __init__(self, model: STM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, frame: Tensor, previous: Tensor, memory_key: Tensor, memory_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Segment a frame and make what to remember of it.

        Args:
            frame: `[1, 3, H, W]` RGB in 0…1, H and W multiples of 16.
            previous: `[K, H, W]` masks of the K objects in the frame before.
            memory_key, memory_value: `[1, N, C]` and `[K, N, V]`, N positions remembered; the objects share the keys.

        Returns:
            Probabilities `[K + 1, H, W]`, background first, and what to append to the memory: `[1, H·W/256, C]` and
            `[K, H·W/256, V]`.
        """
        objects, height, width = len(memory_value), frame.shape[2] // 16, frame.shape[3] // 16
        query = self.model.encode_query(frame)
        query_key = as_positions(query.key)
        beside = memory_value.transpose(0, 1).flatten(1)[None]
        read = memory_read(query_key, memory_key, beside, similarity="l2")
        read = read[0].unflatten(1, (objects, -1)).transpose(0, 1)
        read = read.mT.unflatten(2, (height, width))
        hint = previous, other_object_masks(previous)
        masks = soft_aggregate(self.model.segment(read, query, [objects], hint)).softmax(0)
        key, value = self.model.memorize(query, masks[1:], other_object_masks(masks[1:]), [objects])
        return masks, as_positions(key), as_positions(value)


def inputs(seed: int, frames: int = 2) -> dict[str, Tensor]:
    """A frame of noise and a memory of two objects over some frames, at the sizes of the default weights."""
    generator = torch.Generator().manual_seed(seed)
    positions = frames * 4 * 5
    return {
        "frame": torch.rand(1, 3, 64, 80, generator=generator),
        "previous": torch.rand(2, 64, 80, generator=generator) / 2,
        "memory_key": torch.randn(1, positions, 64, generator=generator),
        "memory_value": torch.randn(2, positions, 128, generator=generator),
    }


def export(step: nn.Module) -> torch.export.ExportedProgram:
    """The step as a program for frames of one size and a memory of any number of positions, via a file."""
    positions = torch.export.Dim("positions", min=2, max=2**20)
    lengths = {"frame": None, "previous": None, "memory_key": {1: positions}, "memory_value": {1: positions}}
    with warnings.catch_warnings(), tempfile.NamedTemporaryFile(suffix=".pt2") as file:
        # torch's own exporter warns about torch's own use of it
        warnings.simplefilter("ignore")
        program = torch.export.export(step, (), inputs(0), dynamic_shapes=lengths)
        torch.export.save(program, file.name)
        return torch.export.load(file.name)


def main() -> None:
    """Compare the steps, then the exported one with the eager one for a longer memory."""
    model = STM.load(device="cpu", dtype=torch.float32)
    before, after = Before(model), After(model)
    report(before, after, inputs)
    program = export(after.float())
    longer = inputs(1, frames=7)
    with torch.no_grad():
        pairs = zip(program.module()(**longer), before.float()(**longer))
    difference = max((new - old).abs().amax().item() for new, old in pairs)
    print(f"exported step with a memory of 7 frames: max |new - old| {difference:.1e}")


if __name__ == "__main__":
    main()

"""A module of your own in a training loop of your own: autocast, torch.compile and DistributedDataParallel stay.

python examples/training_loop.py                                # one process
torchrun --nproc-per-node 2 examples/training_loop.py           # one process for every half of the batch
"""

import os
import tempfile

import torch
import torch.distributed as dist
from compare import changed_lines
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stm_kernels import space_time_memory_read

STEPS, CLIPS = 5, 4


class Before(nn.Module):
    """Keys and values by convolutions, a memory of two frames, a read that holds the affinity."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Conv2d(3, 32, 3, padding=1)
        self.value = nn.Conv2d(4, 64, 3, padding=1)
        self.head = nn.Conv2d(64, 1, 1)

    def forward(self, frames: Tensor, masks: Tensor) -> Tensor:
        """`[B, 3, 3, H, W]` frames and `[B, 2, 1, H, W]` masks of the first two → logits `[B, H, W]` of the third."""
        keys = rearrange(self.key(frames.flatten(0, 1)), "(b t) c h w -> b c t h w", t=3)
        remembered = torch.cat([frames[:, :2], masks], 2).flatten(0, 1)
        values = rearrange(self.value(remembered), "(b t) v h w -> b v t h w", t=2)
        logits = einsum(keys[:, :, :2].flatten(2), keys[:, :, 2].flatten(2), "b c n, b c m -> b m n") * 32**-0.5
        read = einsum(logits.softmax(2).to(values.dtype), values.flatten(2), "b m n, b v n -> b v m")
        return self.head(read.unflatten(2, frames.shape[3:]))[:, 0]


class After(nn.Module):
    """Keys and values by convolutions, a memory of two frames, the read of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Conv2d(3, 32, 3, padding=1)
        self.value = nn.Conv2d(4, 64, 3, padding=1)
        self.head = nn.Conv2d(64, 1, 1)

    def forward(self, frames: Tensor, masks: Tensor) -> Tensor:
        """`[B, 3, 3, H, W]` frames and `[B, 2, 1, H, W]` masks of the first two → logits `[B, H, W]` of the third."""
        keys = rearrange(self.key(frames.flatten(0, 1)), "(b t) c h w -> b c t h w", t=3)
        remembered = torch.cat([frames[:, :2], masks], 2).flatten(0, 1)
        values = rearrange(self.value(remembered), "(b t) v h w -> b v t h w", t=2)
        read = space_time_memory_read(keys[:, :, 2], keys[:, :, :2], values)
        return self.head(read)[:, 0]


def clips(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three frames of noise each, and what is bright in the first channel as masks and target."""
    frames = torch.randn(CLIPS, 3, 3, 12, 14, generator=torch.Generator().manual_seed(seed))
    masks = (frames[:, :, :1] > 0).float()
    return frames, masks[:, :2], masks[:, 2, 0]


def train(
    module: type[nn.Module], *, autocast: bool = True, compiled_by: str | None = "inductor", steps: int = STEPS
) -> tuple[list[float], dict[str, Tensor]]:
    """Train from the same start on the same clips, each process on its share; the loop knows nothing of the read.

    Returns:
        The loss of every step, of all clips, and the gradients of the first step.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    network = DistributedDataParallel(module())
    forward = torch.compile(network, backend=compiled_by) if compiled_by else network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses, first = [], {}
    for step in range(steps):
        frames, masks, targets = (part[rank::ranks] for part in clips(step))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = forward(frames, masks)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        first = first or {name: parameter.grad.clone() for name, parameter in network.module.named_parameters()}
        optimizer.step()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses, first


def main() -> None:
    """Train both modules and print their losses side by side."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/group", rank=0, world_size=1)
    (old, old_grads), (new, new_grads) = train(Before), train(After)
    if dist.get_rank() == 0:
        print(f"changed lines: {changed_lines(Before, After)}")
        for step, losses in enumerate(zip(old, new)):
            print("step {}: loss {:.5f} before, {:.5f} after".format(step, *losses))
        difference = max((old_grads[name] - new_grads[name]).abs().amax().item() for name in old_grads)
        print(f"largest difference of a gradient in the first step, in bfloat16: {difference:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

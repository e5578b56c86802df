"""Reads on the keys of a tracked video, exact and not: which one pays on a CPU?

    python bench/keys.py KEYS --record VIDEO --mask MASK [--frames 20] [--checkpoint FILE]    # writes KEYS.safetensors
    python bench/keys.py KEYS [--frames 1 5 20] [--values 512] [--out FILE]
    python bench/keys.py KEYS --blocks [--frames 1 5 20] [--out FILE]    # needs Triton, no GPU

The first one tracks a video until so many of its frames are remembered, evenly spread over it, and writes their keys
and values and the next query, in float32. The second one reads the newest of these frames, in alternation in one
process: seconds of the processor, extra memory, how far from the exact read, and the softmax mass that is left out.
--values draws values of another width: what is read, and so the time, is chosen by the keys alone. The third one counts
what Triton's reads would visit of them on a GPU: see bench/blocks.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import MIB, alternate, at_least, describe, options, table, write_json
from bench.read import CHOICES
from stm_kernels import memory_read
from stm_kernels.testing import extra_memory
from stm_model import STM, Tracker
from stm_model.io.masks import read_masks
from stm_model.io.video import open_video
from stm_model.network.weights import read_tensors, write_tensors


def record(video: Path, mask: Path, frames: int, checkpoint: Path | None) -> dict[str, Tensor]:
    """Keys `[1, N, C]` and values `[1, N, V]` of so many remembered frames, the query `[1, M, C]` that reads them, and
    the `size` of its picture, H and W.

    The objects that the first mask names share them, or the first one's are taken.

    Raises:
        ValueError: the video is too short, or an input makes no sense.
    """
    source = open_video(video)
    masks = read_masks(mask, source)
    every = max(1, ((source.frame_count or 0) - 1) // frames)
    tracker = Tracker(STM.load(checkpoint), memory=f"every:{every}", spacing=1)
    found: dict[str, Tensor] = {}
    for _ in tracker.track(source, {0: masks[0]}):
        assert tracker.bank is not None
        if found:
            return found | {"is_l2": torch.tensor(tracker.model.config.similarity == "l2")}
        memory = tracker.bank.memories[0]

        def noted(query_key: Tensor, cells: Tensor | None, memory=memory) -> Any:
            assert memory.pages is not None
            if len(memory.frames) == frames:
                key, value = (torch.cat(parts, 1)[:1].float() for parts in zip(*memory.pages.state()["pages"]))
                query = query_key[:1].flatten(2).mT.float()
                found.update({"query_key": query.clone(), "memory_key": key.clone(), "memory_value": value.clone()})
                found["size"] = torch.tensor(query_key.shape[-2:])
            return type(memory).read(memory, query_key, cells)

        memory.read = noted  # type: ignore[method-assign]
    raise ValueError(f"{video}: expected at least {frames + 2} frames, got {source.frame_count}")


def measure(tensors: dict[str, Tensor], frames: int, repeats: int) -> dict[str, Any]:
    """Every choice on the newest frames."""
    query_key = tensors["query_key"]
    newest = slice(-frames * query_key.shape[1], None)
    key, value = (tensors[name][:, newest] for name in ("memory_key", "memory_value"))
    similarity = "l2" if tensors["is_l2"] else "dot"

    def read(**choice: Any) -> tuple[Tensor, ...]:
        options = {"similarity": similarity, "return_lse": True, "return_skipped": True}
        return memory_read(query_key, key, value, **options, **choice)

    exact, lse, _ = read()
    found: dict[str, Any] = {}
    seconds = alternate({name: lambda choice=choice: read(**choice) for name, choice in CHOICES.items()}, repeats)
    for name, choice in CHOICES.items():
        out, own, skipped = read(**choice)
        found[name] = {
            "seconds": seconds[name],
            "times_exact": seconds["exact"]["processor"] / seconds[name]["processor"],
            "extra_bytes": extra_memory(lambda choice=choice: read(**choice)),
            "largest_error": ((out - exact).abs().max() / value.abs().max()).item(),
            # the log-sum-exp of top_k is that of the best alone
            "left_out": skipped.mean().item() if "skip" in choice else (1 - (own - lse).exp()).mean().item(),
        }
    return found


def shown(frames: int, found: dict[str, Any]) -> str:
    """What was measured as a table."""
    columns = ("seconds", "times exact", "extra MiB", "error", "left out")
    rows = [
        (name, each["seconds"]["processor"], each["times_exact"], each["extra_bytes"] / MIB)
        + (each["largest_error"], each["left_out"])
        for name, each in found.items()
    ]
    return table((f"{frames} frames", *columns), rows)


def _keys_file(name: str) -> Path:
    """What is written and read by this name: the suffix says how."""
    return Path(name if name.endswith(".safetensors") else f"{name}.safetensors")


def main(words: Sequence[str] | None = None) -> int:
    parser = options(__doc__, repeats=7, threads=1)
    parser.add_argument("keys", type=_keys_file, help="KEYS.safetensors, with or without the suffix")
    parser.add_argument("--record", type=Path, metavar="VIDEO")
    parser.add_argument("--mask", type=Path, help="of the first frame")
    parser.add_argument("--checkpoint", type=Path, help="weights; default: those of the package")
    parser.add_argument("--frames", type=at_least(1), nargs="+", help="remembered; default: 20 to record, then 1 5 20")
    parser.add_argument("--values", type=at_least(1), help="channels of drawn values, in place of those recorded")
    parser.add_argument("--blocks", action="store_true", help="count what Triton's reads visit, time nothing")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.record:
            if arguments.mask is None:
                raise ValueError("--mask: expected the mask of the first frame beside --record")
            frames = max(arguments.frames or [20])
            write_tensors(record(arguments.record, arguments.mask, frames, arguments.checkpoint), arguments.keys)
            return 0
        tensors = read_tensors(arguments.keys)
        if arguments.blocks and "size" not in tensors:
            raise ValueError(f"{arguments.keys}: expected keys with the size of their picture, record them again")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    held = tensors["memory_key"].shape[1] // tensors["query_key"].shape[1]
    counts = arguments.frames or [count for count in (1, 5, 20) if count <= held]
    if max(counts) > held:
        parser.error(f"--frames: expected at most the {held} that were recorded, got {max(counts)}")
    if arguments.values:
        generator = torch.Generator().manual_seed(0)
        shape = (*tensors["memory_key"].shape[:2], arguments.values)
        tensors["memory_value"] = torch.randn(shape, generator=generator)
    sizes = {"M": tensors["query_key"].shape[1], "C": tensors["query_key"].shape[2]}
    report = describe("cpu") | {"sizes": sizes | {"V": tensors["memory_value"].shape[2]}, "frames": {}}
    look, show = partial(measure, repeats=arguments.repeats), shown
    if arguments.blocks:
        # Triton is not everywhere
        from bench import blocks

        look, show = blocks.count, blocks.shown
    for count in counts:
        report["frames"][count] = found = look(tensors, count)
        print(show(count, found))
        write_json(report, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

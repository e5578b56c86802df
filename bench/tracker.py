"""Where a tracked frame's time goes, and what the processor could do: python bench/tracker.py [--out FILE]

A video file in, masks and an overlay out: 480×854, the default weights, 1, 2 and 5 objects, 5 remembered frames. The
seconds of each stage of the tracker as it runs by default, their share of the frame, the arithmetic, and the share of
the processor's ceiling: the speed of a large matrix product in the same number format. Beside it, in alternation in the
same process, the same network as plain PyTorch and public code run it: float32, eager, NCHW, batch norm as a layer of
its own, the memory concatenated for every frame, the whole affinity, the frame's maps expanded to every object. Then
frames a second of whole pipelines: naive in turn, by default with decoding and writing beside, as `stm track` does.

    python bench/tracker.py --network released --objects 2 --frames 20            # ResNet-50
    python bench/tracker.py --dtype int8                                          # convolutions in eight bits
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 python bench/tracker.py      # with AVX2 alone
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import stm_model.tracking.memory
from bench.harness import alternate, at_least, describe, options, synchronize, table, write_json
from stm_kernels import PagedMemory
from stm_model import STM, Tracker
from stm_model.data.synthetic import procedural_clip
from stm_model.evaluation.metrics import region_similarity
from stm_model.io.images import overlay
from stm_model.io.masks import write_mask
from stm_model.io.threads import Prefetch, Writer
from stm_model.io.video import VideoWriter, open_video
from stm_model.network import Query
from stm_model.network.winograd import WinogradConvolution
from stm_model.runtime import chosen_side, default_dtype, dtype_name
from stm_model.tracking.budget import MemoryRule
from stm_model.tracking.result import FrameResult
from stm_model.training.state import initialize

VERSIONS = ("naive", "default")
PARTS = {"query encoder": "encode_query", "memory encoder": "memorize", "decoder": "segment"}
"""Stages that are methods of the network."""
STAGES = ("decode", "query encoder", "memory encoder", "read", "decoder", "all else", "write")
"""All else: frames and masks resized, the masks of all objects aggregated, labels."""
NETWORK_STAGES = STAGES[1:5]
FILE_FRAMES = 24
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_CBWR")
"""Variables that keep oneDNN, PyTorch and MKL from instructions the processor has."""
PRODUCT = 2048


class PublicNetwork(STM):
    """A network that decodes as public code does."""

    def segment(self, memory_readout: Tensor, query: Query, objects_per_clip: list[int], *more: Any) -> Tensor:
        """As `STM.segment`, with the maps of the one frame expanded to all objects before the decoder."""
        objects = len(memory_readout)
        value, *maps = (each.expand(objects, -1, -1, -1) for each in (query.value, *query.features))
        expanded = query._replace(value=value, features=type(query.features)(*maps))
        return super().segment(memory_readout, expanded, [1] * objects, *more)


class PublicMemory(PagedMemory):
    """A memory that is read as public code does: joined for every frame, the whole affinity at once."""

    def read(self, query_key: Tensor, similarity: str = "dot", **_: Any) -> tuple[Tensor, Tensor]:
        """What is read, and zeros for the log-sum-exp, for which public code does not ask."""
        key, value = (torch.cat(parts, 1) for parts in zip(*self._pages.held()))
        logits = query_key @ key.mT
        if similarity == "l2":
            # what the softmax sees of the squared distance
            logits = 2 * logits - key.square().sum(2)[:, None]
        affinity = torch.softmax(logits * query_key.shape[2] ** -0.5, -1)
        return affinity @ value, query_key.new_zeros(query_key.shape[:2])


class PublicTracker(Tracker):
    """A tracker whose memory is a `PublicMemory`."""

    def track(self, *inputs: Any, **settings: Any) -> Iterator[FrameResult]:
        """As `Tracker.track`."""
        results = super().track(*inputs, **settings)
        while True:
            # only while this tracker works: others run in between
            with mock.patch.object(stm_model.tracking.memory, "PagedMemory", PublicMemory):
                result = next(results, None)
            if result is None:
                return
            yield result


def network_of(name: str) -> STM:
    """`default`: the weights in the package, `released`: the released shape; time does not depend on its weights."""
    if name == "default":
        return STM.load(device="cpu", dtype=torch.float32)
    torch.manual_seed(0)
    model = STM()
    initialize(model)
    return model.eval()


def build_tracker(
    version: str,
    model: STM,
    device: str,
    memory: MemoryRule | str,
    dtype: str | None = None,
    size: int | None = None,
) -> Tracker:
    """The default tracker in a number format, or the naive one."""
    if version == "naive":
        public = PublicNetwork(model.config)
        public.load_state_dict(model.state_dict())
        public = public.requires_grad_(False).eval().float().to(device, memory_format=torch.contiguous_format)
        tracker = PublicTracker(public, memory=memory, size=size, spacing=1)
        tracker.model = public
        return tracker
    model = model.to(device, float_dtype(device, dtype), memory_format=torch.channels_last)
    model.int8 = dtype == "int8"
    return Tracker(model, memory=memory, size=size, spacing=1)


def float_dtype(device: str, dtype: str | None) -> torch.dtype:
    """The number format of what is not in eight bits."""
    if dtype is None:
        return default_dtype(device)
    return torch.float32 if dtype == "int8" else getattr(torch, dtype)


def steady_memory(size: int) -> MemoryRule:
    """A rule with which frame `size` and every later one is segmented from `size` remembered frames."""
    return MemoryRule(kept=frozenset(range(size - 1)), first=False, previous=True)


def agreement(device: str, objects: int, size: tuple[int, int], dtype: str | None, frames: int = 12) -> float:
    """Least J over objects and frames between the masks of both versions, by the default weights at their own size."""
    clip, labels = procedural_clip(frames, size, objects, seed=0)
    masks = {}
    for version in VERSIONS:
        tracker = build_tracker(version, network_of("default"), device, "every:5", dtype, chosen_side(None, None, size))
        masks[version] = [result.labels for result in tracker.track(clip, {0: labels[0]})]
    return min(
        region_similarity(ours == label, naive == label)
        for ours, naive in zip(*masks.values(), strict=True)
        for label in range(1, objects + 1)
    )


def read_flops(query_key: Sequence[int], memory_key: Sequence[int], memory_value: Sequence[int], *_: Any, **__: Any):
    """Operations of a read, from the shapes of its tensors."""
    return 2 * query_key[0] * query_key[1] * memory_key[1] * (memory_key[2] + memory_value[2])


def convolution_flops(maps: int, weights: int) -> Callable[..., int]:
    """Counts the operations of a convolution, from shapes; the arguments at these places are its input and weights."""
    return lambda *shapes, out_shape, **_: conv_flop_count(shapes[maps], shapes[weights], out_shape)


def plain_convolution(convolution: WinogradConvolution, x: Tensor, *_: Tensor) -> Tensor:
    """The convolution as plain ones are computed, with as many operations; its values are not used."""
    _, channels, out_channels = convolution.weight.shape
    return nn.functional.conv2d(x, x.new_zeros(out_channels, channels, 3, 3), padding=1)


FLOPS = {
    torch.ops.stm_kernels.memory_read: read_flops,
    torch.ops.mkldnn._convolution_pointwise: convolution_flops(0, 1),
    torch.ops.mkldnn._convolution_pointwise_: convolution_flops(1, 2),
    torch.ops.onednn.qconv2d_pointwise: convolution_flops(0, 3),
}
"""How the operations are counted that PyTorch itself does not count."""


class Clock:
    """Seconds of the stages of one frame, on the wall and on the processor; and operations, where they are counted."""

    def __init__(self, device: str):
        self.device, self.counts = device, False
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what the block takes."""
        counter = FlopCounterMode(display=False, custom_mapping=FLOPS) if self.counts else nullcontext()
        synchronize(self.device)
        wall, processor = time.perf_counter(), time.process_time()
        with counter:
            yield
        synchronize(self.device)
        found = (time.perf_counter() - wall, time.process_time() - processor)
        operations = counter.get_total_flops() if isinstance(counter, FlopCounterMode) else 0
        self.spent[name] = [sum(pair) for pair in zip(self.spent[name], (*found, operations))]

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, what it takes counted."""

        def call(*arguments: Any, **settings: Any) -> Any:
            with self.stage(name):
                return function(*arguments, **settings)

        return call

    def take(self) -> dict[str, list[float]]:
        """What was counted since the last call."""
        spent = {name: self.spent[name] for name in (*STAGES, "track")}
        self.spent.clear()
        # of tracking, what no named stage took
        inside = zip(*(spent[name] for name in NETWORK_STAGES))
        spent["all else"] = [max(0.0, whole - sum(parts)) for whole, parts in zip(spent.pop("track"), inside)]
        return spent


class Pipeline:
    """A tracker between a video file and its output; its memory already holds the frames it is to be timed with."""

    def __init__(self, tracker: Tracker, device: str, remembered: int, video: Path, mask: np.ndarray, out: Path):
        self.clock, self.tracker, self.out = Clock(device), tracker, out
        self.source = itertools.chain.from_iterable(open_video(video) for _ in itertools.count())
        self.waiting: list[np.ndarray] = []
        self.track = tracker.track((self.waiting.pop() for _ in itertools.count()), {0: mask})
        out.mkdir()
        self.written = VideoWriter(out / "overlay.mp4")
        for _ in range(remembered):
            self.step()
        for stage, name in PARTS.items():
            setattr(tracker.model, name, self.clock.timed(stage, getattr(tracker.model, name)))
        tracker.bank.read = self.clock.timed("read", tracker.bank.read)
        self.clock.take()

    def step(self) -> dict[str, list[float]]:
        """Decode, track and write a frame; what its stages took."""
        with self.clock.stage("decode"):
            frame = next(self.source)
        self.waiting.append(frame)
        with self.clock.stage("track"):
            result = next(self.track)
        with self.clock.stage("write"):
            self.write(iter([(result.index, result.labels, frame)]))
        return self.clock.take()

    def operations(self) -> dict[str, float]:
        """Of the stages of a frame, which are not timed meanwhile."""
        self.clock.counts = True
        with mock.patch.multiple(WinogradConvolution, forward=plain_convolution, onto=plain_convolution):
            found = {stage: spent[2] for stage, spent in self.step().items()}
        self.clock.counts = False
        return found

    def write(self, items: Iterator[tuple[int, np.ndarray, np.ndarray]]) -> None:
        """Write masks and overlays."""
        for index, labels, frame in items:
            write_mask(self.out / f"{index:05d}.png", labels)
            self.written.write(overlay(frame, labels))

    def side_by_side(self) -> Iterator[None]:
        """Track with decoding and writing in threads of their own; every step is one frame."""
        with Prefetch(self.source) as ahead, Writer(self.write) as behind:
            for frame in ahead:
                self.waiting.append(frame)
                result = next(self.track)
                behind.put((result.index, result.labels, frame))
                yield


def stage_seconds(pipelines: dict[str, Pipeline], repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Median seconds of each stage, by version, frames in alternation after one each that does not count."""
    frames = [{version: pipeline.step() for version, pipeline in pipelines.items()} for _ in range(repeats + 1)][1:]
    return {
        version: {
            stage: {
                clock: statistics.median(frame[version][stage][place] for frame in frames)
                for place, clock in enumerate(("wall", "processor"))
            }
            for stage in STAGES
        }
        for version in pipelines
    }


def ceiling(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    left, right = torch.randn(2, PRODUCT, PRODUCT, device=device).to(dtype)
    out = torch.empty_like(left)
    return 2 * PRODUCT**3 / alternate({"": lambda: torch.mm(left, right, out=out)}, 5, device)[""]["least"]


def measure(arguments: argparse.Namespace, objects: int, remembered: int, folder: Path) -> dict[str, Any]:
    """Stages and pipelines of both versions, with so many objects and remembered frames."""
    device, size = arguments.device, (arguments.height, arguments.width)
    frames, labels = procedural_clip(FILE_FRAMES, size, objects, seed=0)
    video = folder / "clip.mp4"
    with VideoWriter(video) as writer:
        for frame in frames:
            writer.write(frame)

    pipelines = {}
    for version in VERSIONS:
        network, rule = network_of(arguments.network), steady_memory(remembered)
        tracker = build_tracker(version, network, device, rule, arguments.dtype)
        pipelines[version] = Pipeline(tracker, device, remembered, video, labels[0], folder / version)
    operations = pipelines["default"].operations()
    stages = stage_seconds(pipelines, arguments.repeats)
    beside = pipelines["default"].side_by_side()
    whole = alternate({"naive": pipelines["naive"].step, "default": lambda: next(beside)}, arguments.repeats, device)
    beside.close()
    for each in pipelines.values():
        each.written.close()
    found = {"objects": objects, "memory_frames": remembered, "stages": stages, "operations": operations}
    found["pipeline_seconds"] = {version: times["median"] for version, times in whole.items()}
    found["ratio"] = found["pipeline_seconds"]["naive"] / found["pipeline_seconds"]["default"]
    return found


def show(found: dict[str, Any], most: float) -> None:
    """A table of the stages and a line for the whole."""
    naive, default = ({name: each["wall"] for name, each in found["stages"][version].items()} for version in VERSIONS)
    operations = found["operations"] | {"whole": sum(found["operations"].values())}
    for seconds in (naive, default):
        seconds["whole"] = sum(seconds.values())
    rows = []
    for stage, seconds in default.items():
        row = [stage, naive[stage], seconds, naive[stage] / seconds, seconds / default["whole"]]
        if counted := operations[stage]:
            row += [counted / 1e9, counted / seconds / most]
        rows.append([*row, "", ""][:7])
    header = ("naive s", "default s", "faster", "share", "GFLOP", "of ceiling")
    print(table((f"{found['objects']} objects, {found['memory_frames']} remembered", *header), rows))
    speeds = ", ".join(f"{version} {1 / seconds:.2f}" for version, seconds in found["pipeline_seconds"].items())
    print(f"frames a second from file to files: {speeds}; {found['ratio']:.2f} times", flush=True)


def main(words: Sequence[str] | None = None) -> int:
    parser = options(__doc__, repeats=5)
    parser.add_argument("--network", choices=("default", "released"), default="default")
    parser.add_argument("--height", type=at_least(16), default=480)
    parser.add_argument("--width", type=at_least(16), default=854)
    parser.add_argument("--objects", type=at_least(1), nargs="+", default=[1, 2, 5])
    parser.add_argument("--frames", type=at_least(1), nargs="+", default=[5], help="remembered ones")
    formats = ("float32", "bfloat16", "int8")
    parser.add_argument("--dtype", choices=formats, help="of the default tracker; its own choice if not given")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    device, size = arguments.device, (arguments.height, arguments.width)
    dtype = float_dtype(device, arguments.dtype)
    most = ceiling(device, dtype)
    report = describe(device) | {"network": arguments.network, "frame": size}
    report |= {"dtype": arguments.dtype or dtype_name(dtype), "ceiling_dtype": dtype_name(dtype)}
    report |= {"ceiling": most, "instructions": torch.backends.cpu.get_cpu_capability()}
    report |= {name: os.environ.get(name) for name in ISA_LIMITS}
    report |= {"agreement_J": agreement(device, 2, size, arguments.dtype), "rows": []}
    print(f"{report['device']}, {report['threads']} threads, load {report['load']:.1f}, {size[0]}×{size[1]}")
    print(f"{arguments.network} network in {report['dtype']}")
    print(f"a large product in {report['ceiling_dtype']}: {most / 1e9:.0f} GFLOP/s")
    print(f"default weights: masks of both versions agree to J ≥ {report['agreement_J']:.4f}", flush=True)
    for objects, remembered in itertools.product(arguments.objects, arguments.frames):
        with tempfile.TemporaryDirectory() as folder:
            report["rows"].append(measure(arguments, objects, remembered, Path(folder)))
        show(report["rows"][-1], most)
        write_json(report, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

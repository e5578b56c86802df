"""What other engines make of the network: python bench/engines.py [--out FILE]

The three parts of the default network, for a frame of 480×864 with one object, by ONNX Runtime and by OpenVINO where
they are installed (pip install onnx onnxruntime openvino), in alternation with the network as the tracker runs it. The
memory read is ours in any case. A frame takes the encoder, the decoder, and a fifth of the memory encoder. The
difference is the greatest of a part's results from ours in float32, over their greatest value. Milliseconds are of
processor time, which other programs hardly lengthen.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import alternate, describe, options, table, write_json
from stm_model import STM
from stm_model.network import Query, fold_batch_norm, for_inference
from stm_model.network.encoders import FrameFeatures
from stm_model.runtime import default_dtype

FRAME_SHARES = {"encoder": 1.0, "decoder": 1.0, "memory encoder": 0.2}
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Encoder(nn.Module):
    """Frame to key, value and the maps of the decoder."""

    def __init__(self, model: STM):
        super().__init__()
        self.model = model

    def forward(self, frame: Tensor) -> tuple[Tensor, ...]:
        query = self.model.encode_query(frame)
        return query.key, query.value, *query.features


class Decoder(Encoder):
    """Readout, the maps and the masks of the frame before to probabilities."""

    def forward(self, readout: Tensor, stride16: Tensor, stride8: Tensor, stride4: Tensor, *previous: Tensor) -> Tensor:
        query = Query(readout, stride16, FrameFeatures(stride16, stride8, stride4))
        return self.model.segment(readout, query, [1], previous)  # type: ignore[arg-type]


class MemoryEncoder(Encoder):
    """Maps of a frame and masks to the value that is remembered."""

    def forward(self, value: Tensor, stride8: Tensor, guides: Tensor) -> Tensor:
        return self.model.Memory(Query(value, value, FrameFeatures(value, stride8, value)), guides, [1])


def run_openvino(part: nn.Module, inputs: tuple[Tensor, ...], precision: str, threads: int) -> Callable[[], Any]:
    import openvino

    traced = torch.jit.trace(part, inputs, check_trace=False)
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(openvino.convert_model(traced, example_input=inputs), "CPU", settings)
    request, arrays = compiled.create_infer_request(), [tensor.contiguous().numpy() for tensor in inputs]
    return lambda: [*request.infer(arrays, share_inputs=True, share_outputs=True).values()]


def run_onnxruntime(part: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], Any]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(part, inputs, f"{folder}/part.onnx", dynamo=False)
        session = onnxruntime.InferenceSession(f"{folder}/part.onnx", settings, ["CPUExecutionProvider"])
    feed = {slot.name: tensor.contiguous().numpy() for slot, tensor in zip(session.get_inputs(), inputs)}
    return lambda: session.run(None, feed)


def run_ours(part: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Callable[[], Any]:
    # maps between the parts are as the parts leave them; frames and masks come as they are read
    given = [
        tensor.to(dtype, memory_format=torch.channels_last) if tensor.ndim == 4 and tensor.shape[1] > 3 else tensor
        for tensor in inputs
    ]
    return torch.inference_mode()(lambda: part(*given))


def difference(found: Any, truth: Any) -> float:
    """Greatest difference of tensors or arrays, over the greatest value of the truth."""
    pairs = zip(*([parts] if isinstance(parts, Tensor) else parts for parts in (found, truth)))
    both = [(torch.as_tensor(one).float(), torch.as_tensor(true)) for one, true in pairs]
    return max(float((one - true).abs().max() / true.abs().max()) for one, true in both)


def measure(size: tuple[int, int], threads: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of each part by each engine, and how far its results are from ours in float32."""
    formats = [*dict.fromkeys((torch.float32, default_dtype("cpu")))]
    models = {dtype: for_inference(STM.load(device="cpu", dtype=dtype)) for dtype in formats}
    plain = fold_batch_norm(STM.load(device="cpu", dtype=torch.float32))
    generator = torch.Generator().manual_seed(0)
    frame, mask = (torch.rand(1, *shape, *size, generator=generator) for shape in ((3,), ()))
    with torch.inference_mode():
        _, value, *maps = Encoder(plain)(frame)
        readout = torch.randn(1, 128, *value.shape[2:], generator=generator)
    value, *maps = (tensor.clone() for tensor in (value, *maps))
    given = {
        "encoder": (Encoder, (frame,)),
        "decoder": (Decoder, (readout, *maps, mask, 1 - mask)),
        "memory encoder": (MemoryEncoder, (value, maps[1], torch.stack([mask, 1 - mask], 1))),
    }
    results: dict[str, Any] = {}
    for name, (kind, inputs) in given.items():
        runs = {f"ours, {PRECISIONS[dtype]}": run_ours(kind(models[dtype]), inputs, dtype) for dtype in formats}
        if find_spec("onnxruntime") and find_spec("onnx"):
            runs["ONNX Runtime, f32"] = run_onnxruntime(kind(plain), inputs, threads)
        if find_spec("openvino"):
            for dtype in formats:
                precision = PRECISIONS[dtype]
                runs[f"OpenVINO, {precision}"] = run_openvino(kind(plain), inputs, precision, threads)
        truth = runs["ours, f32"]()
        apart = {engine: difference(run(), truth) for engine, run in runs.items()}
        times = alternate(runs, repeats)
        results[name] = {
            engine: {"ms": times[engine]["processor"] * 1e3, "difference": apart[engine]} for engine in runs
        }
    return results


def main(words: Sequence[str] | None = None) -> int:
    parser = options(__doc__, repeats=15)
    parser.add_argument("--height", type=int, default=480, help="of a frame, a multiple of 16")
    parser.add_argument("--width", type=int, default=864)
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    parts = measure((arguments.height, arguments.width), arguments.threads, arguments.repeats)
    engines = [*parts["encoder"]]
    frame = {
        engine: sum(share * parts[name][engine]["ms"] for name, share in FRAME_SHARES.items()) for engine in engines
    }
    write_json(describe("cpu") | {"parts": parts, "frame_ms": frame}, arguments.out)
    rows = []
    for engine in engines:
        cells = [part[engine] for part in parts.values()]
        rows.append((engine, *(cell["ms"] for cell in cells), frame[engine], max(cell["difference"] for cell in cells)))
    print(table(("ms", *parts, "a frame", "difference"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

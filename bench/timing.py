"""How long a call takes, on a GPU by its own clock and without the gaps between launches."""

import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]

# a call shorter than this is replayed from a graph: launching it would take longer than running it
GRAPHED_SECONDS = 2e-3
# what one replay lasts at least, so that the start of a graph does not count
REPLAY_SECONDS = 1e-3


def call_seconds(
    calls: Sequence[Call], device: torch.device | str, seconds: float = 0.2, least: int = 5, most: int = 200
) -> list[float]:
    """Time a call again and again, after a warm-up.

    Args:
        calls: the same call, on inputs of its own each; they take turns, so that no cache holds what they read.
        device: what to wait for.
        seconds: for all repeats together; at least `least` are made, and at most `most`.

    Returns:
        Seconds of one call, a number for each repeat.
    """
    device = torch.device(device)
    if device.type != "cuda":
        calls[0]()
        return _on_cpu(calls, seconds, least, most)
    with torch.cuda.device(device):
        for call in calls:
            call()
        estimate = _by_events(lambda: [call() for call in calls], 2)[-1] / len(calls)
        rounds, turn = 1, None
        if estimate < GRAPHED_SECONDS:
            rounds = max(1, round(REPLAY_SECONDS / (estimate * len(calls))))
            turn = _graph(list(calls) * rounds)
        if turn is None:
            rounds, turn = 1, lambda: [call() for call in calls]
        count = len(calls) * rounds
        repeats = min(most, max(least, round(seconds / (estimate * count))))
        return [one / count for one in _by_events(turn, repeats)]


def _on_cpu(calls: Sequence[Call], seconds: float, least: int, most: int) -> list[float]:
    found: list[float] = []
    while len(found) < least or (sum(found) < seconds and len(found) < most):
        start = time.perf_counter()
        calls[len(found) % len(calls)]()
        found.append(time.perf_counter() - start)
    return found


def _by_events(turn: Call, repeats: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        turn()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _graph(calls: Sequence[Call]) -> Call | None:
    """All calls as one graph to replay; None where one of them cannot be recorded."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay

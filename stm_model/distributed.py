"""The processes that torchrun starts: which one this is, where it runs, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import distributed

from stm_model.runtime import OtherRankFailed

Result = TypeVar("Result")
Item = TypeVar("Item")

TIMEOUT = timedelta(days=1)
"""How long a rank waits for one with longer videos."""


class Ranks:
    """This process among those of a run; alone unless torchrun started it. A context manager.

    `backend` is `nccl` where GPUs share gradients; `timeout` is how long a rank waits for another.
    """

    def __init__(self, backend: str = "gloo", timeout: timedelta | None = TIMEOUT):
        self.backend, self.timeout = backend, timeout
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.index = int(os.environ.get("RANK", 0))
        self.own_group = self.count > 1 and not distributed.is_initialized()

    def __enter__(self) -> Ranks:
        if self.own_group:
            distributed.init_process_group(self.backend, timeout=self.timeout)
        return self

    def __exit__(self, *_: object) -> None:
        if self.own_group:
            distributed.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.index == 0

    def device(self, asked: str | None) -> str | None:
        """Where this rank runs: as asked; where no GPU is named, on the one of its own number, if there are any."""
        if asked in (None, "cuda") and self.count > 1 and torch.cuda.is_available():
            return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
        return asked

    def share(self, items: Sequence[Item], weight: Callable[[Item], float]) -> list[Item]:
        """The items of this rank: the heaviest first, each to the rank with the least to do."""
        loads, mine = [0.0] * self.count, []
        for item in sorted(items, key=weight, reverse=True):
            lightest = loads.index(min(loads))
            loads[lightest] += weight(item)
            if lightest == self.index:
                mine.append(item)
        return mine

    def each(self, work: Callable[[], Result]) -> list[Result]:
        """Run `work` in every process and return all results, in all of them. A failure is raised at once: torchrun
        ends the other processes then. Raises OtherRankFailed where another process ended.
        """
        result = work()
        if self.count == 1:
            return [result]
        gathered: list = [None] * self.count
        try:
            distributed.all_gather_object(gathered, result)
        except RuntimeError as error:
            raise OtherRankFailed(f"another rank ended: {error}") from error
        return gathered

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Run `work` in the first process alone and return its result in all of them; raises as `each`."""
        return cast(Result, self.each(lambda: work() if self.first else None)[0])

"""Times of calls, with cold caches."""

import time
from collections.abc import Callable

import torch
from machine import last_level_cache


class Timer:
    """Seconds per call with cold caches."""

    def __init__(self, device: str, repeats: int):
        self.device, self.repeats = device, repeats
        self.flushed = torch.empty(2 * last_level_cache(device), dtype=torch.uint8, device=device)

    def __call__(self, call: Callable) -> list[float]:
        for _ in range(2):
            call()
        if self.device == "cuda":
            call = self._captured(call)
        return [self._once(call) for _ in range(self.repeats)]

    def _captured(self, call: Callable) -> Callable:
        """The replay of a graph of the call; the call itself where it asks the device, which a
        graph cannot.
        """
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream):
                call()
        except RuntimeError:
            return call
        return graph.replay

    def _once(self, call: Callable) -> float:
        self.flushed.add_(1)
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

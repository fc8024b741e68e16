"""Times of calls, with cold caches."""

from collections.abc import Callable

import torch
from machine import device_seconds, last_level_cache


class Timer:
    """Seconds per call with cold caches.

    Attributes:
        spoilt: a capture has failed, after which torch's allocator may take it for still under way.
    """

    def __init__(self, device: str, repeats: int):
        self.device, self.repeats, self.spoilt = device, repeats, False
        self.flushed = torch.empty(2 * last_level_cache(device), dtype=torch.uint8, device=device)

    def __call__(self, call: Callable, captured: bool = True) -> list[float]:
        """On a GPU of a replay of the call, unless not ``captured``.

        Raises:
            RuntimeError: the call waits for the device, so that it cannot be captured.
        """
        for _ in range(2):
            call()
        if self.device == "cuda" and captured:
            call = self._captured(call)
        return [self._once(call) for _ in range(self.repeats)]

    def _captured(self, call: Callable) -> Callable:
        """The replay of a graph of the call. What waits for the device is found before a capture
        begins, which could not be ended.
        """
        here, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            call()
            torch.cuda.set_sync_debug_mode("error")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        here.wait_stream(side)
        self.spoilt = True
        # The outer context restores the stream, which a failed capture would leave switched.
        with torch.cuda.stream(here), torch.cuda.graph(graph, stream=side):
            call()
        self.spoilt = False
        return graph.replay

    def _once(self, call: Callable) -> float:
        self.flushed.add_(1)
        return device_seconds(self.device, call)

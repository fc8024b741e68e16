"""Ask the machine: its caches, its bandwidth, its names."""

import ctypes
import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def last_level_cache(device: str) -> int:
    """Bytes; 32 MiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    return max(
        (int(s[:-1]) * units[s[-1]] for s in (path.read_text().strip() for path in sizes)),
        default=32 * 2**20,
    )


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by Tensor.copy_ of eight times the last-level cache, on a
    GPU of 2 GiB, by its own clock: the median of nine.
    """
    size = 2 << 30 if device == "cuda" else 8 * last_level_cache(device)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    copy()
    seconds = statistics.median(device_seconds(device, copy) for _ in range(9))
    return 2 * size / seconds


def device_seconds(device: str, call: Callable) -> float:
    """Return how long a call takes, on a GPU between two events on its stream."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class ReadBandwidth:
    """Bytes per second that threads read from memory together: ``memchr`` over what it does not
    find, eight times as much as the last-level cache; the best of five.
    """

    def __init__(self, threads: int):
        self.part = 8 * last_level_cache("cpu") // threads
        self.data = [torch.ones(self.part, dtype=torch.uint8) for _ in range(threads)]
        self.threads = ThreadPoolExecutor(threads)
        self.memchr = ctypes.CDLL(None).memchr
        self.memchr.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t

    def __call__(self) -> float:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            list(self.threads.map(lambda x: self.memchr(x.data_ptr(), 0, self.part), self.data))
            seconds.append(time.perf_counter() - start)
        return self.part * len(self.data) / min(seconds)


def git_commit() -> str:
    """Return the checkout's commit, of a copy without history what ``MSN_COMMIT`` says; else
    "unknown".
    """
    describe = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MSN_COMMIT", "unknown")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    if "model name" not in facts:
        return platform.processor()
    # A virtual machine's name is short of what tells a generation.
    family = facts.get("cpu family")
    return facts["model name"] + (f", family {family}, model {facts['model']}" if family else "")

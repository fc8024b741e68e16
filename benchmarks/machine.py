"""Ask the machine: its caches, its bandwidth, its names."""

import platform
import statistics
import subprocess
import time
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
    """Bytes read and written per second by Tensor.copy_ of eight times the last-level cache: the
    median of nine.
    """
    source = torch.ones(8 * last_level_cache(device), dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(10):
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / statistics.median(seconds[1:])


def git_commit() -> str:
    """Return the checkout's commit; "unknown" outside one."""
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
        return "unknown"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

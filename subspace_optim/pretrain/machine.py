"""What the run ran on, how much memory it took and where its time went."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from subspace_optim import distributed

T = TypeVar("T")

_STATUS = Path("/proc/self/status")


class Stopwatch:
    """Seconds by phase. On a GPU a phase ends when its kernels do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to a phase.

        Args:
            name: The phase.
        """
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.add(name, time.perf_counter() - begin)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class MemoryMeter:
    """Memory in use and at its peak since the meter was made: of the GPU's allocator, or resident in this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # a kernel without this file keeps the peak of the whole process
                Path("/proc/self/clear_refs").write_text("5")
        self.baseline = self.now()

    @property
    def kind(self) -> str:
        """What is measured, in words."""
        return "allocated on the GPU" if self._device.type == "cuda" else "resident set size"

    def now(self) -> int:
        """Bytes in use."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _resident("VmRSS")

    def peak(self) -> int:
        """The most bytes that were in use."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _resident("VmHWM")

    def tensors(self, there: int, work: Callable[[], T]) -> tuple[T, int]:
        """What a piece of work gives, and the most bytes that tensors had while it ran.

        Args:
            there: Bytes that they have before, for a CPU, whose allocator keeps no count.
            work: The work, which a CPU takes longer for: its events are recorded.
        """
        if self._device.type == "cuda":
            return work(), self.peak() - self.baseline
        given: list[T] = []
        most = there + peak_bytes(lambda: given.append(work()))
        return given[0], most


def _resident(field: str) -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        # Not Linux: only the peak of the process is known, in bytes on macOS.
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that a piece of work has allocated on the CPU at a time, by the events of torch's allocator.

    Args:
        work: What BLAS and LAPACK allocate inside it is not seen.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # acc_events changes nothing here; without it torch 2.11 warns of what a second cycle would lose.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())), initial=0))


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages behind some tensors; of sharded ones, of the shards that are here.

    Args:
        tensors: Any tensors; None and shared storages are counted as they deserve.
    """
    storages = (distributed.local(tensor).untyped_storage() for tensor in tensors if tensor is not None)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, without anything that names its owner.

    Args:
        device: Where the run took place.
    """
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _total_memory(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of every package that has a part in the numbers."""
    found = {"python": platform.python_version()}
    for package in ("subspace-optim", "torch", "transformers", "tokenizers", "datasets", "numpy"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found

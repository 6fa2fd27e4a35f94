"""
Facts about the machine: the device, memory, the allocator, and the provenance of a result.
"""

import ctypes
import math
import mmap
import os
import platform
import subprocess
import sys

import torch


def pick_device(device: str) -> str:
    """Name of the device; "auto" becomes cuda, mps or cpu. Raises ValueError if the device cannot be used."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(device).type in ("cpu", "cuda", "mps"):
            torch.empty(0, device=device)
            return device
        reason = "not one of cpu, cuda and mps"
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
    raise ValueError(f"device={device} cannot be used: {reason}; try --device=cpu")


def process_memory(key: str, process: int | str = "self") -> int | None:
    """Bytes of a process by a key of /proc/PROCESS/status: VmRSS (now), VmHWM (peak), RssAnon (now, mapped files left
    out). None where the system does not tell."""
    if not os.path.exists("/proc/self/status"):
        return None
    with open(f"/proc/{process}/status") as f:
        return next((int(line.split()[1]) * 1024 for line in f if line.startswith(key + ":")), None)


def peak_memory(device: str = "cpu") -> float:
    """Peak bytes of tensors on a GPU, or of this process on a CPU. NaN where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    # getrusage would give the peak of the process that started this one, if that is larger.
    if (peak := process_memory("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: str = "cpu") -> int | None:
    """Bytes that a device can still give, in a container at most its limit. None where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    if device != "cpu" or not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo") as f:
        free = next((int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable:")), None)
    if free is not None and os.path.exists("/sys/fs/cgroup/memory.max"):
        with open("/sys/fs/cgroup/memory.max") as f:
            limit = f.read().strip()
        free = min(free, int(limit)) if limit.isdigit() else free
    return free


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step. Other C libraries are left as they are.

    By default glibc returns large tensors to the system, which clears every page again. Evaluation frees logits, and
    QAT frees as many fake-quantized weights as there are weights.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    if mallopt(m_mmap_threshold, 2**30):  # glibc before 2.35 refuses more than 32 MiB
        mallopt(m_trim_threshold, 2**31 - 1)


def return_freed_memory() -> None:
    """Makes glibc return memory that was freed to the system. Other C libraries are left as they are."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass


def provenance() -> dict:
    """Origin of a measured figure: command, commit, machine, threads and versions."""

    def output(*command):
        try:
            return subprocess.run(
                command, capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__))
            ).stdout.strip()
        except OSError:
            return ""

    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            cpu = next((line.partition(":")[2].strip() for line in f if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    commit = output("git", "rev-parse", "--short=12", "HEAD")
    results = [f":!results/*.{kind}" for kind in ("json", "md", "png")]  # a measurement may rewrite these
    changed = "+changes" if output("git", "status", "--porcelain", "--untracked-files=no", ".", *results) else ""
    return {
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "commit": commit + changed if commit else None,
        "machine": f"{cpu}, {os.cpu_count()} cores" + (f", {gpu}" if gpu else ""),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def large_pages(size: int) -> torch.Tensor:
    """Memory (size) uint8, on Linux in pages of 2 MiB where they are available. A processor reads them faster than pages
    of 4 KiB, because it looks up fewer addresses."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a system without large pages
        pass
    return torch.frombuffer(memory, dtype=torch.uint8)

"""Memory that is freed and asked for again at once: it stays with the process, where the C library can be told so.

glibc gives a block of many megabytes back to the system as soon as it is freed, and asks for it anew a moment later;
the kernel then clears it, page by page. A network's forward pass on the CPU does that at every layer: half of the time
of MobileNetV2 went there (benchmarks/roofline.py). No number is changed by where it lies.
"""

import contextlib
import ctypes
import os
import platform
import threading
from collections.abc import Iterator

# Whoever sets one of these has chosen.
VARIABLES = (
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
)
# Of mallopt(3): how much may lie free at the heap's end, from which size on blocks are mapped, and how many may be.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: (1 << 31) - 1}
# What glibc comes to by itself once blocks of such sizes have been freed, which it counts as it goes.
USUAL = {MMAP_MAX: 65_536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}
_lock = threading.Lock()
_blocks = {"open": 0}


def _libc() -> ctypes.CDLL | None:
    """None = another C library, or somebody has told it what to do."""
    is_free = platform.libc_ver()[0] == "glibc" and not any(name in os.environ for name in VARIABLES)
    return ctypes.CDLL(None) if is_free else None


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the block freed memory stays with the process, for the next tensor; afterwards it is given back.

    What glibc had learnt of sizes cannot be put back; afterwards it has those that it comes to in a process of tensors.
    """
    with _lock:
        _blocks["open"] += 1
        if _blocks["open"] == 1:
            _set(KEPT)
    try:
        yield
    finally:
        with _lock:
            _blocks["open"] -= 1
            if not _blocks["open"]:
                _set(USUAL)
        give_back()


def keep_nothing() -> None:
    """In a process that was forked within the block: do as usual."""
    _set(USUAL)


def _set(options: dict[int, int]) -> None:
    if (libc := _libc()) is not None:
        for option, value in options.items():
            libc.mallopt(option, value)


def give_back() -> None:
    """Give the system what is free."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)

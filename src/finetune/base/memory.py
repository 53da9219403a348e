"""How much memory and how many cores there are; a guard that asks a run to stop before the machine dies of it."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from finetune.base.allocator import give_back
from finetune.base.signals import StopRequest

MB = 1_000_000
# So much is left for saving, and for everybody else on the machine.
RESERVE_FRACTION, LEAST_RESERVE_BYTES, MOST_RESERVE_BYTES = 0.03, 200 * MB, 1_000 * MB
SECONDS_BETWEEN_LOOKS = 1.0
CGROUPS = Path("/sys/fs/cgroup")
# What the kernel keeps of files without need, and gives back when somebody wants the room (memory.stat).
RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Limit:
    """Something that memory can run into.

    Attributes:
        what: in words.
        total_bytes, free_bytes: of it.
    """

    what: str
    total_bytes: int
    free_bytes: int

    @property
    def is_near(self) -> bool:
        reserve = min(max(RESERVE_FRACTION * self.total_bytes, LEAST_RESERVE_BYTES), MOST_RESERVE_BYTES)
        # Of a machine so small that the reserve were most of it, a tenth.
        return self.free_bytes < min(reserve, self.total_bytes / 10)


@dataclass(frozen=True)
class Use:
    """Resident memory of this process, and of its children together (worker processes)."""

    own_bytes: int
    children_bytes: int


def memory_in_use() -> Use:
    process = psutil.Process()
    children = 0
    for child in process.children(recursive=True):
        with suppress(psutil.Error):
            children += child.memory_info().rss
    return Use(process.memory_info().rss, children)


def limits() -> list[Limit]:
    """The machine's memory, that of the control group (containers, Slurm), and that which `ulimit -v` allows."""
    machine = psutil.virtual_memory()
    found = [Limit("the machine's memory", machine.total, machine.available)]
    found += [limit for limit in (_control_group_limit(), _address_space_limit()) if limit is not None]
    return found


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" = no limit
        return None


def _statistic(path: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _control_group_limit(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> Limit | None:
    """The tightest memory limit of the groups that this process is in (Linux, version 1 and 2).

    What the kernel keeps without need does not count: it gives that back first.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    found: list[Limit] = []
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers == "":
            names: tuple[str, ...]
            base, names = root, ("memory.max", "memory.current", *RECLAIMABLE)
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", *(f"total_{name}" for name in RECLAIMABLE[:2]))
        else:
            continue
        place = base / inside.lstrip("/")
        for folder in (place, *place.parents):
            total, used = _read_number(folder / names[0]), _read_number(folder / names[1])
            if total is not None and used is not None:
                used -= sum(_statistic(folder / "memory.stat", name) for name in names[2:])
                found.append(Limit("the memory of this container or job", total, max(total - used, 0)))
            if folder == base:
                break
    machine = psutil.virtual_memory().total
    real = [limit for limit in found if limit.total_bytes < machine]
    return min(real, key=lambda limit: limit.free_bytes, default=None)


def _address_space_limit() -> Limit | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    total, _ = resource.getrlimit(resource.RLIMIT_AS)
    if total == resource.RLIM_INFINITY:
        return None
    return Limit("the address space (ulimit -v)", total, max(total - psutil.Process().memory_info().vms, 0))


def describe_shortage(limit: Limit, before: Use, now: Use) -> str:
    """What is short, and what grew."""
    parts = [f"this process from {before.own_bytes // MB:,} to {now.own_bytes // MB:,} MB"]
    if now.children_bytes:
        parts.append(f"its worker processes from {before.children_bytes // MB:,} to {now.children_bytes // MB:,} MB")
    mine = now.own_bytes + now.children_bytes - before.own_bytes - before.children_bytes
    hint = "" if mine > MB * 100 else "; it is other programs that fill it"
    return (
        f"because only {limit.free_bytes // MB:,} of {limit.total_bytes // MB:,} MB of {limit.what} are left "
        f"(since the start {', '.join(parts)}{hint})"
    )


@contextmanager
def guard_memory(stop: StopRequest, seconds_between_looks: float = SECONDS_BETWEEN_LOOKS) -> Iterator[None]:
    """Ask the run to stop when memory is nearly used up. Looks from a thread of its own, so that a long step, a
    validation or the pass over the backbone is watched too."""
    before = memory_in_use()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(seconds_between_looks):
            if not any(limit.is_near for limit in limits()):
                continue
            give_back()  # what lies free with us is not in use
            near = [limit for limit in limits() if limit.is_near]
            if near:
                stop.ask(describe_shortage(near[0], before, memory_in_use()))
                return

    thread = threading.Thread(target=watch, name="memory guard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

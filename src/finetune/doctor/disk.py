"""Where finetune and its libraries keep things on the disk: how much room there is, and what the file system can do."""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs
import psutil
from filelock import FileLock, Timeout

from finetune.base.cache_folders import FOLDER_VARIABLE, features_folder
from finetune.base.formatting import size_text
from finetune.doctor.checks import Findings
from finetune.errors import one_line
from finetune.store.run_folder import RUNS_FOLDER

LITTLE_BYTES, TOO_LITTLE_BYTES = 5_000_000_000, 200_000_000
# Sizes of folders are added up for so long.
SIZE_SECONDS = 5.0
TRIAL_BYTES = 1_000_000
SLOW_SYNC_SECONDS = 1.0
NETWORK = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "gluster", "lustre", "gpfs", "beegfs", "fuse.sshfs", "fuse.s3fs")


def places() -> dict[str, Path]:
    """What is kept -> where."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {
        "runs": RUNS_FOLDER.resolve(),
        "features": features_folder().resolve(),
        "torch's weights": Path(os.environ.get("TORCH_HOME") or cache / "torch") / "hub",
        "the hub's models": _hub_folder(cache),
        "runs in a bucket": Path(platformdirs.user_data_dir("finetune")) / "remote",
    }


def _hub_folder(cache: Path) -> Path:
    named = os.environ.get("HF_HUB_CACHE")
    return Path(named) if named else Path(os.environ.get("HF_HOME") or cache / "huggingface") / "hub"


def look_at_disk(findings: Findings) -> list[dict[str, Any]]:
    facts = []
    for what, path in places().items():
        base = path
        while not base.exists() and base != base.parent:
            base = base.parent
        one: dict[str, Any] = {"what": what, "path": str(path), "free_bytes": shutil.disk_usage(base).free}
        one["size_bytes"], one["is_whole_size"] = folder_size(path)
        one["file_system"] = file_system(base)
        one["is_network"] = one["file_system"].startswith(NETWORK)
        if what in ("runs", "features"):
            one |= trial(base)
            judge(one, findings)
        facts.append(one)
    if not findings.found:
        findings.ok(f"{size_text(facts[0]['free_bytes'])} are free for runs; files can be linked, locked and synced")
    return facts


def folder_size(folder: Path) -> tuple[int, bool]:
    """(bytes on the disk, whether there was time for all of it); what is linked several times counts once."""
    seen: set[tuple[int, int]] = set()
    total, waiting, deadline = 0, [folder], time.monotonic() + SIZE_SECONDS
    while waiting:
        if time.monotonic() > deadline:
            return total, False
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                        continue
                    found = entry.stat(follow_symlinks=False)
                    if (found.st_dev, found.st_ino) not in seen:
                        seen.add((found.st_dev, found.st_ino))
                        total += found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size
    return total, True


def file_system(path: Path) -> str:
    """Its kind, like ext4 or nfs4; "" where that is not told."""
    best = ("", "")
    for partition in psutil.disk_partitions(all=True):
        if path.is_relative_to(partition.mountpoint) and len(partition.mountpoint) >= len(best[0]):
            best = (partition.mountpoint, partition.fstype)
    return best[1]


def trial(folder: Path) -> dict[str, Any]:
    """What a file system can do, tried out in a folder of our own, which is removed.

    Returns:
        failure: why nothing can be written there, or "".
        links, locks: whether hard links and locks work.
        sync_seconds: how long it takes until a megabyte is on the disk; None = that cannot be asked for.
    """
    facts: dict[str, Any] = {"failure": "", "links": None, "locks": None, "sync_seconds": None}
    try:
        with tempfile.TemporaryDirectory(prefix=".finetune-doctor-", dir=folder) as name:
            own = Path(name)
            with open(own / "file", "wb") as stream:
                stream.write(bytes(TRIAL_BYTES))
                stream.flush()
                started = time.monotonic()
                with suppress(OSError):
                    os.fsync(stream.fileno())
                    facts["sync_seconds"] = round(time.monotonic() - started, 4)
            try:
                os.link(own / "file", own / "link")
                facts["links"] = (own / "link").samefile(own / "file")
            except OSError:
                facts["links"] = False
            facts["locks"] = _locks_work(own / "lock")
    except OSError as error:
        facts["failure"] = error.strerror or one_line(error)
    return facts


def _locks_work(path: Path) -> bool:
    """Whether what one holds another does not get."""
    try:
        with FileLock(path, timeout=0):
            try:
                with FileLock(path, timeout=0):
                    return False
            except Timeout:
                return True
    except (OSError, NotImplementedError):
        return False


def judge(place: dict[str, Any], findings: Findings) -> None:
    """Say what is wrong with a place that runs or features are written to."""
    what, where = place["what"], f"{place['what']} ({place['path']})"
    # Without features a run is slow, without checkpoints it is none.
    bad = findings.problem if what == "runs" else findings.note
    if place["failure"]:
        instead = "work in another folder, or give --run" if what == "runs" else f"set {FOLDER_VARIABLE} to another"
        bad(f"{where}: cannot be written ({place['failure']}); {instead}")
        return
    free = size_text(place["free_bytes"])
    if place["free_bytes"] < TOO_LITTLE_BYTES:
        bad(f"{where}: {free} are free, too little for most {what}; make room")
    elif place["free_bytes"] < LITTLE_BYTES:
        findings.note(f"{where}: {free} are free")
    if place["sync_seconds"] is None:
        bad(f"{where}: this file system cannot say when a file is on the disk: a power cut may cost what lies there")
    elif place["sync_seconds"] > SLOW_SYNC_SECONDS and what == "runs":
        findings.note(f"{where}: it takes {place['sync_seconds']:.1f} s until a megabyte is on the disk; save seldom")
    if place["locks"] is False:
        findings.note(f"{where}: locks do not work there: see to it that no two processes use one run")
    if place["is_network"]:
        findings.note(f"{where}: a network drive ({place['file_system']}); a disk of this machine is quicker")
    if what == "runs" and place["links"] is False:
        findings.note(f"{where}: no hard links there, so each checkpoint takes its room up to three times")
    if what == "runs" and place["file_system"] in ("tmpfs", "ramfs"):
        findings.note(f"{where}: lies in memory and is gone after a restart; give --run a folder on a disk")
    if what == "runs" and place["file_system"] in ("overlay", "aufs"):
        findings.note(f"{where}: lies in a container and goes with it; give --run a folder that is mounted into it")

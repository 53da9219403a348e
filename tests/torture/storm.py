"""Real runs, SIGKILLed at random moments again and again until they end. Says where each kill fell."""

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from conftest import last_step

from finetune.features.feature_file import read_layout
from finetune.store.run_folder import RunFolder

# Loaded by Python at the child's start: writes down, in one shared byte, what the child is doing. Nothing else differs.
WATCHER = """
import mmap, os, sys

def install():
    file = open(os.environ["STORM_PLACE"], "r+b")
    place = mmap.mmap(file.fileno(), 1)

    def within(owner, name, letter):
        inner = getattr(owner, name)
        def outer(*args, **options):
            before = place[0]
            place[0] = ord(letter)
            try:
                return inner(*args, **options)
            finally:
                place[0] = before
        setattr(owner, name, outer)

    from finetune.features import kept
    from finetune.runs import start
    from finetune.training import context, session
    within(kept.Features, "fill", "f")
    within(start, "train", "t")
    within(session, "validate", "v")
    within(context, "write_checkpoint", "s")

if os.environ.get("STORM_PLACE") and any("finetune" in word for word in sys.orig_argv):
    install()
"""
PLACES = {"i": "start-up", "f": "filling the cache", "t": "training", "v": "validation", "s": "a save"}


@dataclass
class Storm:
    """What happened to one run.

    Attributes:
        kills: by where they fell.
        with_progress: of them, those that came after a step was saved or features were kept since the one before.
        resumes: starts after a kill that went on by themselves.
    """

    kills: Counter = field(default_factory=Counter)
    with_progress: int = 0
    resumes: int = 0


def filled_rows(folder: Path) -> int:
    """Bytes of kept features that are there: grows while a cache is filled."""
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            read_layout(path)
            total += path.stat().st_blocks
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return total


def storm(words: list[str], run: RunFolder, folder: Path, seed: int, kills: int, seconds: tuple[float, float]) -> Storm:
    """Start `finetune WORDS --run RUN --resume`, kill its whole process group after a random time, start it again; until
    `kills` of them came after new progress or the run has ended; then let it end.

    Args:
        folder: for the watcher and the features.
        seconds: between a start and its kill, the least and the most.
    """
    chance, result = random.Random(seed), Storm()
    (folder / "sitecustomize.py").write_text(WATCHER)
    place = folder / "place"
    place.write_bytes(b"i")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "STORM_PLACE": str(place),
        "FINETUNE_CACHE": str(folder / "features"),
    }
    command = [sys.executable, "-m", "finetune.cli", *words, "--run", str(run.path), "--resume", "--quiet"]
    progress = (0, 0)
    while True:
        place.write_bytes(b"i")
        with open(folder / "output", "w+") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                wait = chance.uniform(*seconds) if result.with_progress < kills else 900
                process.wait(timeout=wait)
                output.seek(0)
                assert process.returncode == 0, (
                    f"after {result.kills.total()} kills: exit {process.returncode}\n{output.read()}"
                )
                return result
            except subprocess.TimeoutExpired:
                where = PLACES[chr(place.read_bytes()[0])]
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        now = (last_step(run), filled_rows(folder / "features"))
        result.kills[where] += 1
        result.with_progress += now > progress
        progress = max(now, progress)
        result.resumes += 1

"""A run that one version began and another ends: the same bits as the unbroken run of the version that began it. Where the
newer one names choices that the older does not know, the older refuses, by that reason, and leaves the run as good as before.

    python tests/torture/two_versions.py [OLD [NEW]]

OLD and NEW are revisions of this repository; each is cloned into a temporary folder and runs from there, with the packages
of the Python that runs this. Runs are killed with SIGKILL in mid-epoch. Prints a line for each comparison; exit 1 if one
differs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
# The last one before the packages of today: checkpoints and run folders of schema 4.
OLD = "a4e6f2f"
STARTS = ("--save-every-steps", "1", "--device", "cpu", "--quiet", "--no-report", "--track", "none")
# Recipe and options, steps of an epoch, the step after which the run is killed.
RUNS = {
    "vgg_head": (["vgg_head", "--augment", "light", "--workers", "2", "--dropout", "0.2", "--epochs", "4"], 23),
    "bert_head": (["bert_head", "--epochs", "4", "--dropout", "0.2"], 20),
}
REFUSED = "a newer finetune wrote it: upgrade"
# What says when and where, not what was computed.
NOT_COMPARED = ("run_id", "history", "metrics_file")


def clone(revision: str, folder: Path) -> Path:
    subprocess.run(["git", "clone", "-q", "--no-checkout", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "checkout", "-q", revision], check=True)
    return folder


def start(source: Path, work: Path, *words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(source / "src"), "FINETUNE_CACHE": str(work / "features")}
    code = f"import finetune; assert finetune.__file__.startswith({str(source)!r}); from finetune.cli import run; run()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=work, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(f"exit {process.returncode}: {output}")
    return output


def last_step(run: Path) -> int:
    return max((int(path.stem.partition("-")[2]) for path in run.glob("checkpoints/step-*.pt")), default=0)


def kill_after(process: subprocess.Popen[str], run: Path, step: int) -> int:
    while last_step(run) < step:
        if process.poll() is not None:
            raise SystemExit(f"ended before step {step}: {process.communicate()[0]}")
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return last_step(run)


def differences(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """Where two plain values differ, to the last bit."""
    if type(ours) is not type(theirs):
        yield f"{path}: {type(ours).__name__} and {type(theirs).__name__}"
    elif isinstance(ours, dict):
        for key in dict.fromkeys([*ours, *theirs]):
            yield from differences(ours.get(key), theirs.get(key), f"{path}/{key}")
    elif isinstance(ours, list):
        if len(ours) != len(theirs):
            yield f"{path}: {len(ours)} and {len(theirs)} entries"
        for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
            yield from differences(one, other, f"{path}/{number}")
    elif isinstance(ours, torch.Tensor):
        if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            yield f"{path}: tensors differ"
    elif ours != theirs:
        yield f"{path}: {ours!r} and {theirs!r}"


def content(run: Path) -> dict[str, Any]:
    """Checkpoints and log of a run that has ended."""
    found: dict[str, Any] = {}
    for name in ("latest.pt", "best.pt"):
        plain = torch.load(run / "checkpoints" / name, weights_only=True)
        found[name] = {key: value for key, value in plain.items() if key not in NOT_COMPARED}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("time/", "memory/", "device/")
    found["metrics"] = [{key: value for key, value in line.items() if not key.startswith(clock)} for line in lines]
    return found


def names(config: dict[str, Any]) -> set[str]:
    """The names of all choices of a saved recipe, those of its parts behind a dot."""
    found = set()
    for name, value in config.items():
        found.add(name)
        found |= {f"{name}.{inner}" for inner in names(value)} if isinstance(value, dict) else set()
    return found


def without_new_names(record: dict[str, Any], older: dict[str, Any]) -> dict[str, Any]:
    """What an older version began, without the names that came since."""
    kept = {name: value for name, value in record.items() if name in older}
    parts = {name for name, value in kept.items() if isinstance(value, dict) and isinstance(older[name], dict)}
    return kept | {name: without_new_names(kept[name], older[name]) for name in parts}


def compare(old: Path, new: Path, work: Path) -> bool:
    """Both directions of both recipes; whether all are equal."""
    versions, good = {"old": old, "new": new}, True
    for name, (words, step) in RUNS.items():
        wanted = {}
        for version, source in versions.items():
            unbroken = work / f"{name}-{version}"
            end(start(source, work, *words, *STARTS, "--run", str(unbroken)))
            wanted[version] = content(unbroken)
        unknown = names(wanted["new"]["latest.pt"]["config"]) - names(wanted["old"]["latest.pt"]["config"])
        for first, second in (("old", "new"), ("new", "old"), ("old", "old"), ("new", "new")):
            run = work / f"{name}-{first}-{second}"
            killed = kill_after(start(versions[first], work, *words, *STARTS, "--run", str(run)), run, step)
            found, refused = [], bool(unknown) and (first, second) == ("new", "old")
            if refused:
                process = start(old, work, "resume", str(run), "--device", "cpu")
                said = process.communicate(timeout=600)[0]
                if process.returncode != 2 or REFUSED not in said:
                    found.append(f"exit {process.returncode}, not refused: {said}")
            said = end(start(versions["new" if refused else second], work, "resume", str(run), "--device", "cpu"))
            ours, theirs = content(run), wanted[first]
            found += differences(without_new_names(ours, theirs), theirs)
            if "not bit for bit" in said:
                found.append("the resume says that it is not bit for bit")
            print(f"{name}: begun by {first}, killed after step {killed} of {theirs['latest.pt']['step']}, "
                  f"{f'refused by {second}, ended by {first}' if refused else f'ended by {second}'}: "
                  f"{'differs: ' + '; '.join(found[:3]) if found else 'the same bits'}", flush=True)  # fmt: skip
            good &= not found
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", default=OLD)
    parser.add_argument("new", nargs="?", default="HEAD")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        old, new = clone(options.old, Path(folder) / "old"), clone(options.new, Path(folder) / "new")
        return 0 if compare(old, new, work) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Memory that is freed and asked for again: that it changes no number, costs fewer page faults, and is given back."""

import json
import subprocess
import sys

import pytest
import torch

from finetune.base import allocator
from finetune.base.allocator import freed_memory_kept, give_back

# In a process of its own: what the allocator has learnt stays with it.
CODE = """
import json, resource, sys, contextlib, hashlib
import psutil, torch
from finetune.base.allocator import freed_memory_kept
torch.manual_seed(0)
layers = torch.nn.Sequential(*[torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(6)]).eval()
images = torch.randn(8, 16, 128, 128)
with freed_memory_kept() if sys.argv[1] == "kept" else contextlib.nullcontext(), torch.inference_mode():
    for _ in range(3):
        layers(images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        found = layers(images)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    inside = psutil.Process().memory_info().rss
digest = hashlib.sha256(found.numpy().tobytes()).hexdigest()
del found
print(json.dumps([digest, faults, inside - psutil.Process().memory_info().rss]))
"""
is_glibc = allocator._libc() is not None


def in_process(way):
    run = subprocess.run([sys.executable, "-c", CODE, way], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.skipif(not is_glibc, reason="the C library here is not glibc, and does as it likes")
def test_tensors_are_not_asked_for_anew_page_by_page_and_no_bit_changes():
    digest, faults, _ = in_process("as it is")
    kept_digest, kept_faults, given_back = in_process("kept")
    assert kept_digest == digest
    assert kept_faults < faults / 5
    assert given_back > 8 << 20  # of the 8 MB of each tensor


def test_a_block_within_another_leaves_it_as_it_is(monkeypatch):
    calls = []
    monkeypatch.setattr(allocator, "_set", lambda options: calls.append(options))
    with freed_memory_kept():
        with freed_memory_kept():
            torch.zeros(1 << 20)
        assert calls == [allocator.KEPT]
    with pytest.raises(ValueError, match="no"), freed_memory_kept():
        raise ValueError("no")
    assert calls == [allocator.KEPT, allocator.USUAL] * 2


def test_whoever_has_told_the_library_what_to_do_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert allocator._libc() is None


WORKER = """
import sys
import psutil, torch
from finetune.base.allocator import freed_memory_kept
from finetune.data.loader import _prepare_worker
def rss(): return psutil.Process().memory_info().rss
with freed_memory_kept():
    if sys.argv[1] == "worker":
        _prepare_worker(0)
    before = rss()
    large = [torch.ones(10 << 20) for _ in range(4)]
    small = torch.ones(1)
    del large
    print(rss() - before)
"""


@pytest.mark.skipif(not is_glibc, reason="the C library here is not glibc, and does as it likes")
def test_a_worker_process_keeps_nothing_of_its_largest_picture():
    kept = {}
    for way in ("worker", "alone"):
        run = subprocess.run([sys.executable, "-c", WORKER, way], capture_output=True, text=True, check=True)
        kept[way] = int(run.stdout)
    assert kept["worker"] < 20 << 20 < 100 << 20 < kept["alone"]


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    with freed_memory_kept():
        give_back()
